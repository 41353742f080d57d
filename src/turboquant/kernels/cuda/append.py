"""cache_append on NVIDIA GPUs: a launch that encodes the pages a chunk completes, and one that writes the rest.

Nothing is read back to the host, so it can be captured in a CUDA graph. The bytes are those of the reference: sums and
roots follow maths/exact.py; only log2 may round the other way.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cuda import nvrtc
from turboquant.kernels.cuda.common import DTYPES, PAGE, page_macros
from turboquant.maths.codec import TIE, TRIALS, codebook, log_decode, token_scale
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout

THREADS = 256


class _Call(ctypes.Structure):  # mirrors `Call` of csrc/append.cu
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("pages", "table", "length", "nonfinite", "starts")],
        *[(n, ctypes.c_void_p) for n in ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker", "states")],
        *[(n, ctypes.c_void_p) for n in ("q", "k", "v")],
        *[(f"{t}_{s}", ctypes.c_longlong) for t in "qkv" for s in "bhn"],
        *[(n, ctypes.c_int) for n in ("pool", "width", "batch", "heads", "group", "tokens", "slots", "sinks")],
        *[(n, ctypes.c_int) for n in ("samples", "several")],
    ]


def _floats(name: str, values: list[float]) -> str:
    return f"__constant__ float {name}[{len(values)}] = {{{', '.join(f'{v!r}f' for v in values)}}};"


def config(layout: PageLayout, dtype: torch.dtype) -> str:
    """config.cuh: what append.cu needs to know about the recipe and the model."""
    kv = layout.kv
    numbers = page_macros(layout, dtype) | {
        "TRIALS": ", ".join(f"{t!r}f" for t in TRIALS), "TIE": f"{TIE!r}f",
        "DECAY_OLD": f"{1 - (1 - kv.decay)!r}f", "DECAY_NEW": f"{1 - kv.decay!r}f",
        "BLEND_OLD": f"{1 - kv.blend!r}f", "BLEND_NEW": f"{kv.blend!r}f",
    }  # fmt: skip
    lines = [f"#define {k} {v}" for k, v in numbers.items() if k != "SIGN_BITS"]
    tables = [str(numbers["SIGN_BITS"])]
    tables.append(_floats("S_TABLE", log_decode(torch.arange(256, dtype=torch.uint8)).tolist()))
    tables.append(_floats("A_TABLE", token_scale(torch.arange(256), torch.ones((), dtype=torch.float16)).tolist()))
    for part, bits in (("KEY", kv.key_bits), ("VALUE", kv.value_bits)):
        levels = codebook(bits)
        edges = ((levels[1:] + levels[:-1]) / 2).tolist()
        above = edges[len(edges) // 2 :] if bits < 8 else []  # 0 and the positive ones
        tables.append(_floats(f"{part}_EDGES", (above + [0.0] * 8)[:8]))
        tables.append(_floats(f"{part}_LEVELS", (levels.tolist() if bits < 8 else []) + [0.0] * 16))
    return "\n".join(["#pragma once", *lines, *tables, ""])


def _memory(layout: PageLayout) -> int:
    """Bytes of `Memory` of csrc/append.cu, generously."""
    d, half = layout.head_dim, layout.key_bytes
    return 2 * PAGE * d + max(half, layout.page_bytes - half) + 4 * (6 * d + 2 * PAGE + 24 + layout.hot) + 256


@lru_cache(maxsize=256)
def _kernels(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> list[Any]:
    names = ("encode", "stats", "track", "store")
    return nvrtc.functions("append.cu", config(layout, dtype), names, device, _memory(layout))


def _dense(x: Tensor) -> Tensor:
    """x with dense, 16-byte aligned rows."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and not any(s % 8 for s in x.stride()[:3])
    return x if aligned else x.contiguous()


def cache_append(buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """`reference.cache_append` for what `supports` and `serves` say."""
    assert valid is None
    b, h, n, d = k.shape
    dtype = buf.ring_k.dtype
    if dtype not in DTYPES or any(t.dtype != dtype for t in (q, k, v)):
        raise ValueError(f"queries in {q.dtype}, keys in {k.dtype}, ring in {dtype}: all must be one of {DTYPES}")
    encode, stats, track, store = _kernels(layout, dtype, k.device)
    q, k, v = map(_dense, (q, k, v))
    pages = -(-n // PAGE)  # that the chunk may complete
    several = pages if pages > 1 else 0
    work = torch.empty(2 * b + several * b * h * 3 * d, dtype=torch.float32, device=k.device)
    call = _Call(
        buf.pages.data_ptr(), buf.table.data_ptr(), buf.length.data_ptr(), buf.nonfinite.data_ptr(), work.data_ptr(),
        buf.ring_k.data_ptr(), buf.ring_v.data_ptr(), buf.sink_k.data_ptr(), buf.sink_v.data_ptr(),
        buf.readers.data_ptr(), buf.tracker.data_ptr(), work.data_ptr() + 8 * b,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        buf.pages.shape[0], buf.table.shape[1], b, h, q.shape[1] // h, n, layout.kv.ring_slots, layout.kv.sinks,
        buf.readers.shape[2], several,
    )  # fmt: skip
    stream = nvrtc.stream_of(k.device)
    if several:
        nvrtc.launch(stats, (pages, h, b), THREADS, 0, stream, call)
        nvrtc.launch(track, (-(-3 * d // 128), h, b), 128, 0, stream, call)
    nvrtc.launch(encode, (pages, h, 2 * b), THREADS, _memory(layout), stream, call)
    nvrtc.launch(store, (n, b, 1), THREADS, 0, stream, call, after=True)
