"""cache_append on NVIDIA GPUs: one or two launches that encode the pages a chunk completes, one that writes the rest.

Nothing is read back to the host, so it can be captured in a CUDA graph. The bytes are those of the reference: sums and
roots follow maths/exact.py; only log2 may round the other way.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cuda import nvrtc
from turboquant.kernels.cuda.common import DTYPES, MAX_HOT, PAGE, page_macros
from turboquant.kernels.cuda.counters import TURN, zeros
from turboquant.maths.codec import (
    CODE_CELLS,
    SEARCH_CELL,
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
        *[(n, ctypes.c_void_p) for n in ("states", "arrived", "masks", "q", "k", "v")],
        *[(f"{t}_{s}", ctypes.c_longlong) for t in "qkv" for s in "bhn"],
        *[(n, ctypes.c_int) for n in ("pool", "width", "batch", "heads", "group", "tokens", "slots", "sinks")],
        *[(n, ctypes.c_int) for n in ("samples", "kept", "several", "front")],
    ]


CODE_REACH = 48 * CODE_CELLS  # to either side in the code table; a row has none beyond √256 times the outer level
CODE_STEP = 16  # cells of one entry, in which at most one code begins
SEARCH_REACH = 32768 // SEARCH_CELL  # cells of |y| at most


def threads(layout: PageLayout) -> int:
    """Of a block that sees a page: two for each row, four for longer ones."""
    return PAGE * (4 if layout.head_dim > 128 else 2)


def _floats(name: str, values: list[float]) -> str:
    """Not in constant memory, where lanes that want different ones wait for each other."""
    return f"__device__ const float {name}[{len(values)}] = {{{', '.join(f'{v!r}f' for v in values)}}};"


def _bytes(name: str, *parts: Tensor) -> str:
    """Bytes as words of eight; each part has 16 bytes more, and begins at a multiple of 16 as in csrc/rows.cuh."""
    padded = torch.cat([torch.nn.functional.pad(x.to(torch.uint8), (0, 16)) for x in parts])
    words = padded[: len(padded) // 16 * 16].view(torch.int64).tolist()
    text = ", ".join(f"{w % 2**64}ull" for w in words)
    return f"alignas(16) __device__ const unsigned long long {name}[] = {{{text}}};"


def segments(bits: int) -> tuple[list[int], list[tuple[int, int, int, int]]]:
    """The search's table of levels, taken apart.

    Returns:
        of each cell of |y|, its segment: neighbouring cells in which every trial has one level are one segment;
        steps (segment, trial, level added, square added) from the last segment down: a trial's level of a segment is
        the sum of its steps up to there.
    """
    columns, last = list(zip(*search_levels(bits), strict=True)), (0,) * len(TRIALS)
    of_cell: list[int] = []
    steps: list[tuple[int, int, int, int]] = []
    for column in columns:
        if column != last:
            here = of_cell[-1] + 1 if of_cell else 0
            pairs = enumerate(zip(column, last, strict=True))
            steps += [(here, t, a - b, a * a - b * b) for t, (a, b) in pairs if a != b]
            last = column
        else:
            here = of_cell[-1]
        of_cell.append(here)
    return of_cell, steps[::-1]


def _search(bits: int) -> str:
    """`Search<bits>` of csrc/rows.cuh."""
    of_cell, steps = segments(bits)
    lines = [f"template <> struct Search<{bits}> {{"]
    lines.append(f"  enum {{ SEGMENTS = {of_cell[-1] + 1}, STEPS = {len(steps)} }};")
    for name, values in zip(("segment", "trial", "step", "square"), zip(*steps, strict=True), strict=True):
        table = f"constexpr int x[] = {{{', '.join(map(str, values))}}};"
        lines.append(f"  __device__ static constexpr int {name}(int i) {{ {table} return x[i]; }}")
    lines.append(f"  __device__ static constexpr float unit() {{ return {int8_levels(bits)[1]!r}f; }}")
    return "\n".join([*lines, "};"])


def code_table(bits: int) -> Tensor:
    """Of every CODE_STEP cells from -CODE_REACH on: entry + cell, counted from there, has the code in bits 4 to 7."""
    first = torch.arange(-CODE_REACH, CODE_REACH + 1, CODE_STEP)
    edges = torch.tensor(code_edges(bits))
    code = torch.bucketize(first, edges, right=True)
    inside = edges - first[:, None]
    inside = torch.where((inside > 0) & (inside < CODE_STEP), CODE_STEP - inside, 0)
    assert (inside.count_nonzero(1) <= 1).all()
    return (code - torch.arange(len(first))) % 16 * 16 + inside.sum(1)


def config(layout: PageLayout, dtype: torch.dtype) -> str:
    """config.cuh: what append.cu needs to know about the recipe and the model."""
    kv = layout.kv
    used = {i for f in layout.fields.values() for i in range(f.offset, f.offset + f.nbytes)}
    gaps = [i for i in range(layout.page_bytes) if i not in used]
    small = sorted({kv.key_bits, kv.value_bits} - {8})  # 8 bit have neither search nor table
    numbers = page_macros(layout, dtype) | {
        "THREADS": threads(layout), "MEMORY": _memory(layout), "GAPS": len(gaps), "MAX_HOT": MAX_HOT,
        "CODE_CELLS": CODE_CELLS, "CODE_REACH": CODE_REACH, "CODE_STEP": CODE_STEP,
        "SEARCH_UNITS": SEARCH_UNITS, "SEARCH_CELL": SEARCH_CELL, "SEARCH_REACH": SEARCH_REACH,
        "DECAY_OLD": f"{1 - (1 - kv.decay)!r}f", "DECAY_NEW": f"{1 - kv.decay!r}f",
        "BLEND_OLD": f"{1 - kv.blend!r}f", "BLEND_NEW": f"{kv.blend!r}f",
        "MAX_SEGMENTS": max([segments(b)[0][-1] + 1 for b in small], default=1),
    }  # fmt: skip
    lines = [f"#define {k} {v}" for k, v in numbers.items() if k != "SIGN_BITS"]
    tables = [str(numbers["SIGN_BITS"])]
    tables.append(_floats("S_TABLE", log_decode(torch.arange(256, dtype=torch.uint8)).tolist()))
    tables.append(_floats("A_TABLE", token_scale(torch.arange(256), torch.ones((), dtype=torch.float16)).tolist()))
    tables.append(f"__constant__ short GAP[] = {{{', '.join(map(str, gaps or [0]))}}};")
    tables += ["template <int BITS> struct Search;", *map(_search, small)]
    for part, bits in (("KEY", kv.key_bits), ("VALUE", kv.value_bits)):
        of_cell = segments(bits)[0] if bits < 8 else []
        of_cell += of_cell[-1:] * (SEARCH_REACH - len(of_cell))
        codes = code_table(bits) if bits < 8 else torch.zeros(0)
        tables.append(_bytes(f"{part}_LOOKUP", torch.tensor(of_cell, dtype=torch.uint8), codes))
    return "\n".join(["#pragma once", *lines, *tables, ""])


def _memory(layout: PageLayout) -> int:
    """Bytes of `Memory` of csrc/append.cu, generously."""
    d = layout.head_dim
    rows = 4 * PAGE * max(d + 4, 64)  # the 64: sums of segments
    small = 2 * threads(layout) + PAGE + 6 * d + layout.hot + 8
    return rows + 4 * small + SEARCH_REACH + 2 * CODE_REACH // CODE_STEP + 256


@lru_cache(maxsize=256)
def _kernels(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> list[Any]:
    names = ("encode", "rows", "stats", "store")
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
    encode, rows, stats, store = _kernels(layout, dtype, k.device)
    q, k, v = map(_dense, (q, k, v))
    pages = -(-n // PAGE)  # that the chunk may complete
    several = pages if pages > 1 else 0
    words = several * b * h * 6 * d  # states, which are 16-byte aligned; then starts and masks, of 8 bytes each
    arrived = zeros(2 * b * h, k.device) if several else buf.length  # which is not looked at
    work = torch.empty(words + 2 * (b + 2 * b * h * several), dtype=torch.float32, device=k.device)
    starts = work.data_ptr() + 4 * words
    # tokens of which `store` keeps something, or that may be in no page of the chunk
    tail = min(n, max(layout.kv.ring_slots, PAGE, buf.readers.shape[2] * READER_STRIDE))
    front = min(layout.kv.sinks, n - tail) if several else n - tail
    call = _Call(
        buf.pages.data_ptr(), buf.table.data_ptr(), buf.length.data_ptr(), buf.nonfinite.data_ptr(), starts,
        buf.ring_k.data_ptr(), buf.ring_v.data_ptr(), buf.sink_k.data_ptr(), buf.sink_v.data_ptr(),
        buf.readers.data_ptr(), buf.tracker.data_ptr(), work.data_ptr(), arrived.data_ptr(), starts + 8 * b,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        buf.pages.shape[0], buf.table.shape[1], b, h, q.shape[1] // h, n, layout.kv.ring_slots, layout.kv.sinks,
        buf.readers.shape[2], buf.tracker.shape[1], several, front,
    )  # fmt: skip
    block = threads(layout)
    if several:
        units = -(-pages // (block // 32)) + 2 * pages  # headers, values, keys of a KV head
        with TURN:
            nvrtc.launch(stats, (pages, h, b), block, 0, k.device, call)
            nvrtc.launch(rows, (units * h, 1, b), block, _memory(layout), k.device, call, after=True)
            nvrtc.launch(store, (front + tail, b, 1), STORE_THREADS, 0, k.device, call, after=True)
        return
    nvrtc.launch(encode, (1, h, b), block, _memory(layout), k.device, call)
    nvrtc.launch(store, (front + tail, b, 1), STORE_THREADS, 0, k.device, call, after=True)
