"""CUDA: decode attention on packed pages in CUDA C++, compiled at first use by NVRTC, see `attention`; linear layers by
humming-kernels, see `linear`."""

from typing import Any

from turboquant.kernels.cuda import attention
from turboquant.kernels.cuda import linear as _linear
from turboquant.kernels.cuda.attention import DTYPES, cache_attention, serves
from turboquant.kernels.cuda.linear import linear

GRADIENTS = False

__all__ = ["DTYPES", "GRADIENTS", "cache_attention", "linear", "serves", "supports"]


def supports(op: str, layout: Any, device: Any) -> str | None:
    """None if the op can run, else why not."""
    return (_linear if op in ("linear", "quantize", "rotate") else attention).supports(op, layout, device)
