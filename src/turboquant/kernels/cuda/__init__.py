"""CUDA: the cache ops in CUDA C++, compiled at first use by NVRTC, see `append` and `attention`; linear layers by
humming-kernels and, for few rows, in CUDA C++, see `linear` and `product`; what quantizes their inputs, see `rows`."""

from typing import Any

import torch

from turboquant.kernels.cuda import linear as _linear
from turboquant.kernels.cuda import nvrtc, rows
from turboquant.kernels.cuda.append import cache_append
from turboquant.kernels.cuda.attention import MAX_ROWS, MAX_TOKENS, cache_attention
from turboquant.kernels.cuda.common import DTYPES, refusal
from turboquant.kernels.cuda.linear import linear, note
from turboquant.kernels.cuda.rows import add_norm_quantize, gate_quantize, norm_quantize, quantize
from turboquant.packed.page import PageLayout

GRADIENTS = False

__all__ = [
    "DTYPES", "GRADIENTS", "add_norm_quantize", "cache_append", "cache_attention", "gate_quantize", "linear",
    "norm_quantize", "note", "quantize", "serves", "supports",
]  # fmt: skip


def supports(op: str, layout: Any, device: torch.device) -> str | None:
    """None if the op can run, else why not."""
    if device.type != "cuda":
        return f"cuda: tensors are on {device.type}"
    if not op.startswith("cache_"):
        return rows.supports(op, layout, device) if op in rows.OPS else _linear.supports(op, layout, device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "cuda: needs compute capability 8.0 or newer"
    return (refusal(layout) if layout is not None else None) or nvrtc.missing()


def serves(op: str, layout: PageLayout | None, chunk: Any) -> str | None:
    """None if chunks like `ops.Chunk` can run, else why not."""
    tokens = chunk.tokens
    if chunk.masked:
        return "cuda: not for chunks with padding or a mask"
    if chunk.mixed:
        return "cuda: not for queries, keys and a cache of different dtypes"
    if op == "cache_append":
        return None
    if tokens > MAX_TOKENS or chunk.rows > MAX_ROWS:
        return f"cuda: attention only for chunks of up to {MAX_TOKENS} tokens and {MAX_ROWS} query rows a KV head"
    if layout is not None and tokens > layout.kv.ring_slots - layout.kv.ring + 1:
        return f"cuda: a chunk of {tokens} tokens would overwrite ring slots that its first row reads"
    return None
