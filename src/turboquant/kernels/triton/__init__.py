"""The cache ops and `quantize` in Triton: on any GPU it supports, and in its interpreter on the CPU for the tests.

Triton is imported at the first call.
"""

import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant.packed.page import PageLayout

GRADIENTS = False
LARGEST_PAGE = 1 << 15  # numbers of a page, rounded up to powers of two, that one program can hold


@lru_cache(maxsize=16)
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"triton: {torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def supports(op: str, layout: Any, device: torch.device) -> str | None:
    """None if the op can run, else why not; layout: a PageLayout, or the LinearSpec of a linear op."""
    if device.type not in ("cpu", "cuda"):
        return f"triton: tensors are on {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton: tensors are on cpu, where only its interpreter runs (TRITON_INTERPRET=1, for tests)"
    if importlib.util.find_spec("triton") is None:
        return "triton: not installed"
    if not op.startswith("cache_"):
        inputs, bits = getattr(layout, "inputs", 0), getattr(layout, "activation_bits", 8)
        if inputs % 16 or bits != 8:
            return f"triton: quantizes to 8 bit and in sixteens, not {inputs} inputs to {bits} bit"
        return _too_old(device) if device.type == "cuda" else None
    if layout is not None:
        size = 1 << (layout.kv.page - 1).bit_length() << (layout.head_dim - 1).bit_length()
        if size > LARGEST_PAGE:
            return f"triton: a page of {layout.kv.page} tokens with head_dim {layout.head_dim} is too large"
    return _too_old(device) if device.type == "cuda" else None


def cache_append(buf: Any, layout: PageLayout, *args: Any, **kwargs: Any) -> None:
    """See `append.cache_append`."""
    from turboquant.kernels.triton.append import cache_append

    cache_append(buf, layout, *args, **kwargs)


def cache_attention(buf: Any, layout: PageLayout, *args: Any, **kwargs: Any) -> Tensor:
    """See `prefill.cache_attention`."""
    from turboquant.kernels.triton.prefill import cache_attention

    return cache_attention(buf, layout, *args, **kwargs)


def dequantize_pages(buf: Any, layout: PageLayout, first: int, last: int, out_k: Tensor, out_v: Tensor) -> None:
    """See `prefill.dequantize_pages`."""
    from turboquant.kernels.triton.prefill import dequantize_pages

    dequantize_pages(buf, layout, first, last, out_k, out_v)


def quantize(*args: Any, **kwargs: Any) -> Any:
    """See `rows.quantize`."""
    from turboquant.kernels.triton import rows

    return rows.quantize(*args, **kwargs)


def norm_quantize(*args: Any, **kwargs: Any) -> Any:
    """See `rows.norm_quantize`."""
    from turboquant.kernels.triton import rows

    return rows.norm_quantize(*args, **kwargs)


def gate_quantize(*args: Any, **kwargs: Any) -> Any:
    """See `rows.gate_quantize`."""
    from turboquant.kernels.triton import rows

    return rows.gate_quantize(*args, **kwargs)
