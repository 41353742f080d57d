"""The CPU backend: packed codes read with AVX-512 VNNI, AVX-512, AVX2, aarch64 dot products or portable vectors.

See `cache`, `rows`, `product`, `step` and `head`; the C++ is in csrc/. `linear` says which layers need auto-round-lib.
"""

from typing import Any

from turboquant.kernels.cpu import cache
from turboquant.kernels.cpu import linear as _linear
from turboquant.kernels.cpu.cache import DTYPES, cache_append, cache_attention
from turboquant.kernels.cpu.head import ROWS as DENSE_ROWS
from turboquant.kernels.cpu.head import dense
from turboquant.kernels.cpu.linear import linear, linears, mlp, quantize
from turboquant.kernels.cpu.rows import gate_quantize, norm_quantize
from turboquant.kernels.cpu.step import DecoderStep as decoder_step

GRADIENTS = False

__all__ = [
    "DENSE_ROWS", "DTYPES", "GRADIENTS", "cache_append", "cache_attention", "decoder_step", "dense", "gate_quantize",
    "linear", "linears", "mlp", "norm_quantize", "quantize", "supports",
]  # fmt: skip


def supports(op: str, layout: Any, device: Any) -> str | None:
    """None if the op can run, else why not."""
    return (cache if op.startswith("cache_") else _linear).supports(op, layout, device)
