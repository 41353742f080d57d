#!/usr/bin/env bash
# Build the native CPU module with the address and undefined-behaviour sanitizers and run its tests on it, and those of the
# cache once more on the code for aarch64, whose intrinsics are emulated.
# Usage: tests/sanitize.sh [pytest arguments]; PYTHON names an interpreter with the build and test packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
OUT=build/sanitize
mkdir -p "$OUT"
"$PYTHON" -m cmake --version > /dev/null 2>&1 && CMAKE=("$PYTHON" -m cmake) || CMAKE=(cmake)
"${CMAKE[@]}" -S . -B "$OUT/cmake" -DTURBOQUANT_SANITIZE=ON -DTURBOQUANT_EMULATE_NEON=ON \
  -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dnanobind_DIR="$("$PYTHON" -m nanobind --cmake_dir)" > "$OUT/log" || { cat "$OUT/log"; exit 1; }
"${CMAKE[@]}" --build "$OUT/cmake" --parallel 2 > "$OUT/log" || { cat "$OUT/log"; exit 1; }
rm -rf "$OUT/src" && cp -r src "$OUT/src" && rm -f "$OUT"/src/turboquant/kernels/cpu/_native*.so
cp "$OUT"/cmake/_native*.so "$OUT/src/turboquant/kernels/cpu/"
# an editable install would answer before the path does: its finder is taken off first
sanitized() {
  LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$PWD/$OUT/src" \
    "$PYTHON" -c '
import glob, sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
import pytest
import turboquant.kernels.cpu as cpu
assert "sanitize" in cpu.__file__, cpu.__file__
files = [a for a in sys.argv[1:] if a.endswith(".py")] or [*sorted(glob.glob("tests/kernels/test_cpu_*.py")), "tests/transformers/test_decoder.py", "tests/transformers/test_chain.py"]
sys.exit(pytest.main(["-q", *files, *(a for a in sys.argv[1:] if not a.endswith(".py"))]))
' "$@"
}
sanitized "$@"
TURBOQUANT_CPU_ISA=neondot sanitized tests/kernels/test_cpu_cache.py "$@"
