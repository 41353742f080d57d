"""Compiles csrc/ at first use with NVRTC, keeps the result on disk, and launches.

Needs the package cuda-bindings, which torch's CUDA builds bring; no toolkit, no compiler. Compiled kernels lie in
$XDG_CACHE_HOME/turboquant (or ~/.cache/turboquant), one file per source and architecture.
"""

import ctypes
import hashlib
import os
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "csrc"


class CompileError(RuntimeError):
    """A kernel did not compile; the message holds NVRTC's log."""


@cache
def missing() -> str | None:
    """None if kernels can be compiled here, else what is missing."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as e:  # not installed, or its library is not found
        return (
            f"cuda: kernels cannot be compiled, cuda-bindings or NVRTC is missing (pip install 'turboquant[cuda]'): {e}"
        )
    return None


def _check(result: tuple[Any, ...], what: str) -> Any:
    error, *values = result
    if int(error):
        raise CompileError(f"{what}: {error.name}")
    return values[0] if values else None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turboquant"


def compile_source(name: str, config: str, arch: str) -> bytes:
    """The cubin of csrc/`name` with `config` as config.cuh, for an architecture such as "sm_90a".

    Raises:
        CompileError: with NVRTC's log.
    """
    from cuda.bindings import nvrtc

    headers = {p.name: p.read_bytes() for p in SOURCES.glob("*.cuh")} | {"config.cuh": config.encode()}
    program = _check(
        nvrtc.nvrtcCreateProgram(
            (SOURCES / name).read_bytes(),
            name.encode(),
            len(headers),
            list(headers.values()),
            [n.encode() for n in headers],
        ),
        "nvrtc",
    )
    options = [f"-arch={arch}".encode(), b"-std=c++17", b"-fmad=false", b"-default-device"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtc")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CompileError(f"{name} does not compile for {arch}:\n{log.decode().rstrip(chr(0))}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "nvrtc")
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtc")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _cubin(name: str, config: str, arch: str) -> bytes:
    from cuda.bindings import nvrtc

    version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    parts = [p.read_bytes() for p in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*parts, name.encode(), config.encode(), arch.encode(), version.encode()]))
    path = cache_folder() / f"{Path(name).stem}-{arch}-{key.hexdigest()[:24]}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = compile_source(name, config, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError as e:
        warnings.warn(f"compiled kernels cannot be kept in {path.parent}: {e.strerror}", stacklevel=2)
    return cubin


def functions(name: str, config: str, kernels: tuple[str, ...], device: torch.device, shared: int) -> list[Any]:
    """Compile or fetch csrc/`name`, load it on the device, and return its kernels.

    Args:
        shared: bytes of dynamic shared memory that a kernel is launched with at most.
    """
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context that the module is loaded into
        module = _check(driver.cuModuleLoadData(_cubin(name, config, f"sm_{major}{minor}" + "a" * (major >= 9))), name)
        found = [_check(driver.cuModuleGetFunction(module, k.encode()), k) for k in kernels]
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for kernel in found:
            _check(driver.cuFuncSetAttribute(kernel, attribute, shared), name)
    return found


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(
    kernel: Any,
    blocks: tuple[int, int, int],
    threads: int,
    shared: int,
    device: torch.device,
    call: ctypes.Structure,
    after: bool = False,
    cluster: int = 1,
) -> None:
    """Launch on a device, in torch's current stream there, with one argument, a structure passed by value.

    Args:
        after: the kernel may start while the one before it ends; it waits for its results by itself (sm_90 and later).
        cluster: blocks along x that share their memory (sm_90 and later).
    """
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, int(torch.cuda.current_stream(device).cuda_stream)
    attributes = []
    if after:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    if cluster > 1:
        size = driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        attributes.append(size)
    config.attrs, config.numAttrs = attributes, len(attributes)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call))
    with torch.cuda.device(device):
        _check(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(pointers), 0), "cuLaunchKernelEx")
