"""cache_attention for decode and verify steps on NVIDIA GPUs: one launch over packed pages, ring and chunk.

Every size and offset comes from PageLayout and every table from maths/; the CUDA sources in csrc/ know none. Rows are
independent: a row has the same bits alone and among the other rows of a verify step, as long as the work is cut in the
same places. That depends on the tokens in the cache before the step, in steps of 8 pages and of a sixteenth, and on
whether all sequences are in one step; it does not depend on how many tokens come.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from turboquant.kernels.cuda import counters, nvrtc
from turboquant.kernels.cuda.common import DTYPES, PAGE, page_macros
from turboquant.maths.codec import int8_levels
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout

MAX_ROWS = 128  # query rows of a KV head: heads of its group times tokens of the chunk
MAX_TOKENS = 8  # of the chunk
WARPS = 16  # of a block, one block a multiprocessor; half or fewer where registers or shared memory do not suffice
BUFFERS = 2  # half pages, or keys and values of a tile, that a warp has in flight
SHIFT = 112  # a copy begins so far into its buffer at most: where its source does in 128 bytes
TILE_TOKENS = 16  # of the 16-bit part of a sequence, one item of work
LOG2E = 1.4426950408889634


class _Call(ctypes.Structure):  # mirrors `Call` of csrc/state.cuh
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("pages", "table", "length", "ring_k", "ring_v", "sink_k", "sink_v")],
        *[(n, ctypes.c_void_p) for n in ("q", "k", "v", "sink_logits", "out", "part", "top")],
        *[(n, ctypes.c_void_p) for n in ("cut_part", "cut_top", "arrived")],
        *[(f"{t}_{s}", ctypes.c_longlong) for t in "qkv" for s in "bhn"],
        *[(n, ctypes.c_int) for n in ("pool", "width", "batch", "heads", "group", "tokens", "ring", "slots", "sinks")],
        *[(n, ctypes.c_int) for n in ("window", "exact", "warps")],
        *[(n, ctypes.c_float) for n in ("scale", "cap")],
    ]


def tiles_of(layout: PageLayout, group: int, rows: int) -> tuple[int, int]:
    """(rows of a tile, tiles) of a work item, for `rows` query rows of a KV head with `group` query heads.

    More rows are more items. Only the group decides on the number of tiles, so that a verify step sums as single steps.
    """
    if layout.head_dim > 128 or group <= 8:
        return 4 if rows <= 4 and layout.hot <= 4 and layout.head_dim <= 128 else 8, 1
    return 8, 2


def half_bytes(layout: PageLayout, rows: int) -> int:
    """Bytes of a buffer: half a page, or 16 rows of the ring; all of a warp's together hold its partial result."""
    d, half = layout.head_dim, layout.key_bytes
    return max(SHIFT + max(half, layout.page_bytes - half, 2 * TILE_TOKENS * d), 4 * rows * d // BUFFERS)


def scratch_bytes(layout: PageLayout, rows: int) -> int:
    """Shared memory of a warp: `Scratch` of csrc/packed.cuh."""
    d, half = layout.head_dim, half_bytes(layout, rows)
    words = max(1, -(-layout.hot // 4))
    steps = -(-d // 32)
    row = 64 * (steps + (steps + 1) % 2) + 2 * 16
    zeros = rows == 4  # a row of them
    size = BUFFERS * half + 8 * d + 8 * PAGE + 4 * PAGE * words + row * (rows + zeros) + 16 * rows + 8 * BUFFERS
    return -(-size // 16) * 16


def _words(table: list[int]) -> list[str]:
    return [hex(sum(b << 8 * i for i, b in enumerate(table[at : at + 4]))) + "u" for at in range(0, len(table), 4)]


def config(
    layout: PageLayout, dtype: torch.dtype, rows_of_tile: int, tiles: int, warps: int, many: bool, cap: bool
) -> str:
    """config.cuh: what the sources need to know about the recipe, the model and the launch."""
    kv, four = layout.kv, int8_levels(4)[0]
    numbers = page_macros(layout, dtype) | {
        "ROWS": rows_of_tile, "TILES": tiles, "WARPS": warps, "BUFFERS": BUFFERS, "MANY": int(many), "CAP": int(cap),
        "MAX_TOKENS": MAX_TOKENS,
        "SCRATCH_BYTES": scratch_bytes(layout, rows_of_tile * tiles), "HALF": half_bytes(layout, rows_of_tile * tiles),
        "KEY_UNIT": f"{int8_levels(kv.key_bits)[1]!r}f", "VALUE_UNIT": f"{int8_levels(kv.value_bits)[1]!r}f",
    }  # fmt: skip
    tables = {"LEVELS4_UP": _words(list(four[:7:-1])), "LEVELS4_DOWN": _words([-c for c in four[:8]])}
    tables["LEVELS3_"] = _words([c + 128 for c in int8_levels(3)[0]])
    for name, words in tables.items():
        numbers |= {f"{name}{i}": w for i, w in enumerate(words)}
    numbers["LEVELS2"] = _words([c + 128 for c in int8_levels(2)[0]])[0]
    lines = [f"#define {k} {v}" for k, v in numbers.items() if k != "SIGN_BITS"]
    return "\n".join(["#pragma once", *lines, str(numbers["SIGN_BITS"]), ""])


class _Kernel:
    """The kernel for one layout, dtype and number of rows on one device, and the launch that suits it."""

    def __init__(
        self, layout: PageLayout, dtype: torch.dtype, group: int, rows: int, many: bool, cap: bool, device: torch.device
    ) -> None:
        rows_of_tile, tiles = tiles_of(layout, group, rows)
        self.rows = rows_of_tile * tiles
        chip = torch.cuda.get_device_properties(device)
        # as many warps as share a multiprocessor, by the larger tile, so that work is cut the same way for any rows
        most = WARPS if tiles == 1 and layout.head_dim <= 128 else WARPS // 2
        memory: int = chip.shared_memory_per_block_optin  # type: ignore[attr-defined]
        fit = (memory - 1024) // scratch_bytes(layout, 8 * tiles)
        if not fit:
            raise nvrtc.CompileError(f"{layout.kv.name} with head_dim {layout.head_dim} does not fit {chip.name}")
        self.block_warps = next(w for w in (16, 8, 4, 2, 1) if w <= min(most, fit))
        self.blocks, self.shared = chip.multi_processor_count, self.block_warps * scratch_bytes(layout, self.rows)
        source = config(layout, dtype, rows_of_tile, tiles, self.block_warps, many, cap)
        (self.attend,) = nvrtc.functions("attention.cu", source, ("attend",), device, self.shared)


@lru_cache(maxsize=256)
def _kernel(
    layout: PageLayout, dtype: torch.dtype, group: int, rows: int, many: bool, cap: bool, device: torch.device
) -> _Kernel:
    return _Kernel(layout, dtype, group, rows, many, cap, device)


def cache_attention(
    buf: CacheBuffers,
    layout: PageLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`reference.cache_attention` for what `supports` says; no host reads, so it can be captured in a CUDA graph."""
    b, hq, n, d = q.shape
    h = k.shape[1]
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype or buf.ring_k.dtype != q.dtype:
        raise ValueError(
            f"queries in {q.dtype}, keys in {k.dtype}, ring in {buf.ring_k.dtype}: all must be one of {DTYPES}"
        )
    kv, rows = layout.kv, hq // h * n
    if n > MAX_TOKENS:
        raise ValueError(f"{n} tokens a sequence are more than {MAX_TOKENS}")
    if rows > MAX_ROWS:
        raise ValueError(f"{hq // h} query heads of a group times {n} tokens is more than {MAX_ROWS} rows")
    kernel = _kernel(layout, q.dtype, hq // h, rows, n > 1, softcap is not None, q.device)
    q, k, v = (t if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 else t.contiguous() for t in (q, k, v))
    blocks = -(-rows // kernel.rows)
    warps = kernel.block_warps * kernel.blocks
    out = torch.empty(b, hq, n, d, dtype=q.dtype, device=q.device)
    # results of warps, of tiles and of pages, and of blocks at either end; of each row d numbers, and two
    parts = [2 * kernel.rows * blocks * (warps + b * h), 2 * kernel.rows * blocks * kernel.blocks]
    space = torch.empty(sum(parts) * (d + 2), dtype=torch.float32, device=q.device)
    part, tops, cut, cut_tops = (t.data_ptr() for t in space.split([x * y for x in parts for y in (d, 2)]))
    arrived = counters.zeros(blocks * b * h * kernel.rows, q.device)
    extra = None if sink_logits is None else sink_logits.float().contiguous()
    call = _Call(
        buf.pages.data_ptr(), buf.table.data_ptr(), buf.length.data_ptr(),
        buf.ring_k.data_ptr(), buf.ring_v.data_ptr(), buf.sink_k.data_ptr(), buf.sink_v.data_ptr(),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if extra is None else extra.data_ptr(), out.data_ptr(),
        part, tops, cut, cut_tops, arrived.data_ptr(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        buf.pages.shape[0], buf.table.shape[1], b, h, hq // h, n, kv.ring, kv.ring_slots, kv.sinks, window or 0,
        -(-kv.ring_slots // TILE_TOKENS) - (-kv.sinks // TILE_TOKENS), warps,
        (scaling or d**-0.5) * LOG2E, (softcap or 0.0) * LOG2E,
    )  # fmt: skip
    with counters.TURN:
        nvrtc.launch(
            kernel.attend, (kernel.blocks, blocks, 1), kernel.block_warps * 32, kernel.shared,
            q.device, call, after=True,
        )  # fmt: skip
    return out
