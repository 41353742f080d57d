#!/usr/bin/env bash
# What a user gets: the sdist installs in a fresh environment with a compiler and without one, the wheel is manylinux, and
# every source compiles for aarch64.
# Usage: tests/package.sh; PYTHON names an interpreter whose environment has torch, transformers and the build packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$(realpath -s "${PYTHON:-.venv/bin/python}")"
OUT="$PWD/build/package"
rm -rf "$OUT" && mkdir -p "$OUT"
"$PYTHON" -c 'import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])' "$OUT" > "$OUT/log" 2>&1 \
  || { cat "$OUT/log"; exit 1; }
SDIST="$(ls "$OUT"/turboquant-*.tar.gz)"
export BORROWED="$("$PYTHON" -c 'import torch, os; print(os.path.dirname(os.path.dirname(torch.__file__)))')"

# check NAME CODE: the sdist in an environment of its own, which borrows torch and its kin
check() {
  "$PYTHON" -m venv "$OUT/$1"
  "$OUT/$1/bin/python" -m pip install -q --no-cache-dir --no-deps "$SDIST"
  (cd "$OUT" && HF_HUB_OFFLINE=1 "$OUT/$1/bin/python" -c "
import os, sys
sys.path.append(os.environ['BORROWED'])
sys.meta_path[:] = [f for f in sys.meta_path if 'Redirect' not in type(f).__name__]
import turboquant
assert '/$1/' in turboquant.__file__, turboquant.__file__
from turboquant.kernels import cpu, ops
rows = ops.explain()
$2
print('$1: ', rows[0])")
}

check compiler 'assert {r["kernel"] for r in rows} == {"cpu"}, rows'
CC=false CXX=false check none 'assert {r["kernel"] for r in rows} == {"reference"} and "not built" in rows[0]["why"], rows'

"$OUT/compiler/bin/python" -m pip install -q auditwheel
"$OUT/compiler/bin/python" -m pip wheel -q --no-deps -w "$OUT" "$SDIST"
"$OUT/compiler/bin/python" -m auditwheel show "$OUT"/turboquant-*.whl | tee "$OUT/auditwheel"
grep -q manylinux "$OUT/auditwheel"

# aarch64, Linux and macOS: every source compiles, and warns of nothing. Zig's package is a cross compiler; the headers of
# Python and nanobind are this machine's. Nothing is linked or run.
"$OUT/compiler/bin/python" -m pip install -q "$(grep '^ziglang==' constraints.txt)"
export ZIG_GLOBAL_CACHE_DIR="$OUT/zig" ZIG_LOCAL_CACHE_DIR="$OUT/zig"
INCLUDES=(-isystem "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
          -isystem "$("$PYTHON" -m nanobind --include_dir)")
# compiles TARGET ISA SOURCE [options]
compiles() {
  "$OUT/compiler/bin/python" -m ziglang c++ -target "$1" -std=c++17 -O1 -fPIC -Wall -Wextra -Werror -DTQ_ARM -DTQ_ISA="$2" \
    -DTQ_NAME="\"$2\"" "${INCLUDES[@]}" "${@:4}" -c "$3" -o "$OUT/$1.o" || { echo "$3 does not compile for $1, $2"; exit 1; }
}
CSRC=src/turboquant/kernels/cpu/csrc
for target in aarch64-linux-gnu aarch64-macos; do
  for source in "$CSRC"/*.cpp; do compiles "$target" portable "$source"; done
  for part in attend linear; do  # Zig's name for -march=armv8.2-a+dotprod
    compiles "$target" neondot "$CSRC/$part.cpp" -DTQ_NEONDOT -mcpu=generic+v8_2a+dotprod
  done
  echo "$target: $(ls "$CSRC"/*.cpp | wc -l) sources compile, and the two with dot products"
done
