"""The aarch64 code with dot products against the portable code: the intrinsics emulated on any machine, and, where a
cross compiler and qemu-user are installed, its instructions. `make sanitize` runs all other tests on the emulated code.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles attention twice

HERE = Path(__file__).parent / "emulation" / "neon"
SOURCES = Path(__file__).parents[2] / "src" / "turboquant" / "kernels" / "cpu" / "csrc"
FLAGS = ("-std=c++17", "-O1", "-Wno-psabi", f"-I{SOURCES}")


def built(compiler, folder, neon, last=()):
    """The program of check.cpp; `neon`: what the dot-product sources need."""
    jobs = []
    for isa, more in (("portable", ()), ("neondot", ("-DTQ_NEONDOT", *neon))):
        for part, contract in (("attend", "fast"), ("linear", "off")):
            command = [compiler, *FLAGS, *more, f"-DTQ_ISA={isa}", f'-DTQ_NAME="{isa}"', f"-ffp-contract={contract}"]
            jobs.append([*command, "-c", SOURCES / f"{part}.cpp", "-o", folder / f"{part}_{isa}.o"])
    running = [subprocess.Popen(job) for job in jobs]
    assert not any([job.wait() for job in running]), "a source does not compile"
    rest = (SOURCES / f"{name}.cpp" for name in ("attention", "product", "pool"))
    objects = sorted(folder.glob("*.o"))
    command = [compiler, *FLAGS, HERE / "check.cpp", *rest, *objects, "-ldl", "-pthread", *last]
    subprocess.run([*command, "-o", folder / "check"], check=True)
    return folder / "check"


def passes(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_emulated_intrinsics(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "no C++ compiler"
    passes([built(compiler, tmp_path, (f"-I{HERE}",))])


def test_instructions_under_qemu(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or qemu is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64 (g++-aarch64-linux-gnu, qemu-user of Debian), which pip does "
            "not bring; the other test runs the same source on emulated intrinsics"
        )
    passes([qemu, built(compiler, tmp_path, ("-march=armv8.2-a+dotprod",), ("-static",))])
