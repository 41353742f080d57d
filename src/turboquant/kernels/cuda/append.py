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
from turboquant.maths.codec import (
    CODE_CELLS,
    SEARCH_CELL,
    SEARCH_CELLS,
    SEARCH_UNITS,
    TRIALS,
    code_edges,
    int8_levels,
    log_decode,
    search_levels,
    token_scale,
)
from turboquant.packed.buffers import READER_STRIDE, CacheBuffers
from turboquant.packed.page import PageLayout

STORE_THREADS = 256


class _Call(ctypes.Structure):  # mirrors `Call` of csrc/append.cu
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("pages", "table", "length", "nonfinite", "starts")],
        *[(n, ctypes.c_void_p) for n in ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker")],
        *[(n, ctypes.c_void_p) for n in ("states", "masks", "q", "k", "v")],
        *[(f"{t}_{s}", ctypes.c_longlong) for t in "qkv" for s in "bhn"],
        *[(n, ctypes.c_int) for n in ("pool", "width", "batch", "heads", "group", "tokens", "slots", "sinks")],
        *[(n, ctypes.c_int) for n in ("samples", "several", "front")],
    ]


CODE_REACH = 3 * CODE_CELLS  # cells of a scale that the code table covers to either side: beyond lie the outer codes


def threads(layout: PageLayout) -> int:
    """Of a block that sees a page: a thread holds 32 numbers of it."""
    return 512 if layout.head_dim > 128 else 256


def _floats(name: str, values: list[float]) -> str:
    return f"__constant__ float {name}[{len(values)}] = {{{', '.join(f'{v!r}f' for v in values)}}};"


def _words(name: str, table: Tensor) -> str:
    words = table.to(torch.uint8).contiguous().flatten().view(torch.int64).tolist()
    return f"__device__ const unsigned long long {name}[] = {{{', '.join(f'{w}ull' for w in words)}}};"


def config(layout: PageLayout, dtype: torch.dtype) -> str:
    """config.cuh: what append.cu needs to know about the recipe and the model."""
    kv = layout.kv
    used = {i for f in layout.fields.values() for i in range(f.offset, f.offset + f.nbytes)}
    gaps = [i for i in range(layout.page_bytes) if i not in used]
    numbers = page_macros(layout, dtype) | {
        "THREADS": threads(layout), "CODE_CELLS": CODE_CELLS, "CODE_REACH": CODE_REACH, "GAPS": len(gaps),
        "SEARCH_UNITS": SEARCH_UNITS, "SEARCH_CELL": SEARCH_CELL, "SEARCH_CELLS": SEARCH_CELLS,
        "DECAY_OLD": f"{1 - (1 - kv.decay)!r}f", "DECAY_NEW": f"{1 - kv.decay!r}f",
        "BLEND_OLD": f"{1 - kv.blend!r}f", "BLEND_NEW": f"{kv.blend!r}f",
        "KEY_UNIT": f"{int8_levels(kv.key_bits)[1]!r}f", "VALUE_UNIT": f"{int8_levels(kv.value_bits)[1]!r}f",
    }  # fmt: skip
    lines = [f"#define {k} {v}" for k, v in numbers.items() if k != "SIGN_BITS"]
    tables = [str(numbers["SIGN_BITS"])]
    tables.append(_floats("S_TABLE", log_decode(torch.arange(256, dtype=torch.uint8)).tolist()))
    tables.append(_floats("A_TABLE", token_scale(torch.arange(256), torch.ones((), dtype=torch.float16)).tolist()))
    tables.append(f"__constant__ short GAP[] = {{{', '.join(map(str, gaps or [0]))}}};")
    cells = torch.arange(-CODE_REACH, CODE_REACH)
    for part, bits in (("KEY", kv.key_bits), ("VALUE", kv.value_bits)):
        small = bits < 8  # 8 bit have neither search nor table
        search = torch.tensor(search_levels(bits)) if small else torch.zeros(len(TRIALS), SEARCH_CELLS)
        codes = torch.bucketize(cells, torch.tensor(code_edges(bits)), right=True) if small else 0 * cells
        tables += [_words(f"{part}_SEARCH", search.T), _words(f"{part}_CODES", codes)]
    return "\n".join(["#pragma once", *lines, *tables, ""])


def _memory(layout: PageLayout) -> int:
    """Bytes of `Memory` of csrc/append.cu, generously."""
    d = layout.head_dim
    return 2 * PAGE * (d + 8) + 8 * SEARCH_CELLS + 2 * CODE_REACH + 4 * (7 * d + PAGE + layout.hot) + 256


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
    words = 2 * b * h * several  # 8 bytes each: starts, masks; then states
    work = torch.empty(2 * (b + words) + several * b * h * 3 * d, dtype=torch.float32, device=k.device)
    # tokens of which `store` keeps something, or that may be in no page of the chunk
    tail = min(n, max(layout.kv.ring_slots, PAGE, buf.readers.shape[2] * READER_STRIDE))
    front = min(layout.kv.sinks, n - tail) if several else n - tail
    call = _Call(
        buf.pages.data_ptr(), buf.table.data_ptr(), buf.length.data_ptr(), buf.nonfinite.data_ptr(), work.data_ptr(),
        buf.ring_k.data_ptr(), buf.ring_v.data_ptr(), buf.sink_k.data_ptr(), buf.sink_v.data_ptr(),
        buf.readers.data_ptr(), buf.tracker.data_ptr(), work.data_ptr() + 8 * (b + words), work.data_ptr() + 8 * b,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        buf.pages.shape[0], buf.table.shape[1], b, h, q.shape[1] // h, n, layout.kv.ring_slots, layout.kv.sinks,
        buf.readers.shape[2], several, front,
    )  # fmt: skip
    stream, block = nvrtc.stream_of(k.device), threads(layout)
    if several:
        nvrtc.launch(stats, (pages, h, b), block, 0, stream, call)
        nvrtc.launch(track, (-(-3 * d // 128), h, b), 128, 0, stream, call, after=True)
    nvrtc.launch(encode, (pages, h, 2 * b), block, _memory(layout), stream, call, after=bool(several))
    nvrtc.launch(store, (front + tail, b, 1), STORE_THREADS, 0, stream, call, after=True)
