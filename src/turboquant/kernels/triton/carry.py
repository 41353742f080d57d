"""CacheBuffers of rows whose 16-bit tail lies in blocks of a pool (integrations/vllm/blocks.py), and back.

Every row stands at a position and has a table of blocks that the device knows.
Nothing is read back to the host, so a step can be captured in a CUDA graph. `put` runs before `gather`: a row may begin
where another row of the step has just ended (a prefix hit), and then finds that row's tokens in the tail.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton.drift import drifted
from turboquant.packed.buffers import READER_STRIDE, STATES, CacheBuffers, reader_slots
from turboquant.packed.page import PageLayout

_STATES, _STRIDE = tl.constexpr(STATES), tl.constexpr(READER_STRIDE)
SIZES = ("n", "width", "slots")  # change from call to call


@triton.jit
def _block(table, width, b, index, some):
    """Ids of blocks of a row, 0 for none."""
    return tl.load(table + b * width + index, mask=some & (index >= 0) & (index < width), other=0).to(tl.int64)


@triton.jit
def _state(tracker, b, h, page, slots, H: tl.constexpr, D: tl.constexpr):
    """Address of the tracker's state after a page."""
    return tracker + ((b.to(tl.int64) * slots + page % slots) * H + h) * 3 * D


@triton.jit(do_not_specialize=SIZES)
def _put(
    pool, table, length, k, v, n, width, kb, kh, kn, vb, vh, vn,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Keys and values of the new tokens into their blocks. Program: (tail block from the row's start on, head, row)."""
    z, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(length + b).to(tl.int32)
    block = start // T + z
    at = _block(table, width, b, block, block >= 0)
    if at != 0:
        c, i = tl.arange(0, DP), tl.arange(0, T)
        token = block * T + i - start
        see = ((token >= 0) & (token < n))[:, None] & (c < D)[None, :]
        token = token.to(tl.int64)[:, None]
        to = pool + (at * H + h) * ROW + i[:, None] * D + c[None, :]
        x = tl.load(k + b.to(tl.int64) * kb + h * kh + token * kn + c[None, :], mask=see)
        tl.store(to, x.to(pool.dtype.element_ty), mask=see)
        x = tl.load(v + b.to(tl.int64) * vb + h * vh + token * vn + c[None, :], mask=see)
        tl.store(to + T * D, x.to(pool.dtype.element_ty), mask=see)


@triton.jit(do_not_specialize=SIZES)
def _gather(
    pool, states, table, start_of, length, nonfinite, ring_k, ring_v, sink_k, sink_v, readers, tracker, width, slots,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, J: tl.constexpr,
    JP: tl.constexpr, AT_READERS: tl.constexpr, AT_STATE: tl.constexpr, SHARE: tl.constexpr, SHARE_P: tl.constexpr,
):  # fmt: skip
    """What the next tokens read of a row. Program: (tail block of the ring, then sinks, then the rest; head; row)."""
    z, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ring_blocks = tl.num_programs(0) - 2
    start = tl.load(start_of + b).to(tl.int32)
    c = tl.arange(0, DP)
    real = (c < D)[None, :]
    head = b.to(tl.int64) * H + h
    i = tl.arange(0, T)
    if z < ring_blocks:
        first = tl.maximum(0, tl.minimum(start - R + 1, start // P * P))
        block = first // T + z
        if block * T < start:
            position = block * T + i
            see = ((position >= first) & (position < start))[:, None] & real
            id_ = _block(table, width, b, block, block >= 0)
            source = pool + (id_ * H + h) * ROW + i[:, None] * D + c[None, :]
            slot = (head * C + position % C)[:, None] * D + c[None, :]
            tl.store(ring_k + slot, tl.load(source, mask=see), mask=see)
            tl.store(ring_v + slot, tl.load(source + T * D, mask=see), mask=see)
    elif z == ring_blocks:
        if h == 0:
            tl.store(length + b, start.to(tl.int64))
            tl.store(nonfinite + b, start.to(tl.int64) * 0)
        if S > 0:
            sink = tl.arange(0, SP)
            early = (sink < S) & (sink < start)
            sink_row = (_block(table, width, b, sink // T, early) * H + h) * ROW + sink % T * D
            sink_source = pool + sink_row[:, None] + c[None, :]
            sink_slot = (head * S + sink)[:, None] * D + c[None, :]
            kept = early[:, None] & real
            tl.store(sink_k + sink_slot, tl.load(sink_source, mask=kept), mask=kept)
            tl.store(sink_v + sink_slot, tl.load(sink_source + T * D, mask=kept), mask=kept)
    else:
        n = tl.arange(0, JP)
        sample = start // _STRIDE - 1 - n
        taken = (sample >= 0) & (n < J)
        token = sample * _STRIDE
        sample_row = (_block(table, width, b, token // T, taken) * H + h) * ROW + token % T // _STRIDE * D
        sample_source = pool + AT_READERS + sample_row[:, None] + c[None, :]
        sample_slot = (head * J + (sample + J) % J)[:, None] * D + c[None, :]
        wanted = taken[:, None] & real
        tl.store(readers + sample_slot, tl.load(sample_source, mask=wanted), mask=wanted)
        page = start // P - 1
        if page >= 0:
            e = tl.arange(0, SHARE_P)
            state = _state(tracker, b, h, page, slots, H, D) + e
            for share in tl.static_range(P // T):
                share_id = _block(table, width, b, page * (P // T) + share, page >= 0)
                own = (e < SHARE) & (share * SHARE + e < 3 * D)
                part = tl.load(states + (share_id * H + h) * WORDS + AT_STATE + e, mask=own)
                tl.store(state + share * SHARE, part, mask=own)


@triton.jit(do_not_specialize=SIZES)
def _keep(
    pool, states, table, start_of, nonfinite, total, alarms, readers, tracker, n, width, slots,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr,
    P: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, AT_READERS: tl.constexpr, AT_STATE: tl.constexpr,
    SHARE: tl.constexpr, SHARE_P: tl.constexpr, LIVE: tl.constexpr, HOT: tl.constexpr, OLD: tl.constexpr,
):  # fmt: skip
    """New reader samples, the states after the last pages, the counts of tokens not finite and of pages that drifted.
    Program: (head, row, completed page); the first of a row's does all but the last.
    """
    h, b = tl.program_id(0), tl.program_id(1)
    start = tl.load(start_of + b).to(tl.int32)
    end = start + n
    c, head = tl.arange(0, DP), b.to(tl.int64) * H + h
    here = _block(table, width, b, (end - 1) // T, n > 0) != 0  # padding of a captured batch has no block
    if LIVE:
        nth = start // P + tl.program_id(2)
        if here & (nth > 0) & (nth < end // P):
            before, after = _state(tracker, b, h, nth - 1, slots, H, D), _state(tracker, b, h, nth, slots, H, D)
            tl.atomic_add(alarms, drifted(before, after, c, OLD, D, DP, HOT).to(tl.int64))
    if tl.program_id(2) == 0:
        if here & (h == 0):
            tl.atomic_add(total, tl.load(nonfinite + b))
        i = tl.arange(0, JP)
        sample = end // _STRIDE - 1 - i
        some = (sample >= start // _STRIDE) & (i < J)
        position = sample * _STRIDE
        block = _block(table, width, b, position // T, some)
        to = (block * H + h) * ROW + AT_READERS + position % T // _STRIDE * D
        see = (some & (block != 0))[:, None] & (c < D)[None, :]
        x = tl.load(readers + (head * J + (sample + J) % J)[:, None] * D + c[None, :], mask=see)
        tl.store(pool + to[:, None] + c[None, :], x, mask=see)
        e = tl.arange(0, SHARE_P)
        for back in tl.static_range(_STATES):
            page = end // P - 1 - back
            if here & (page >= start // P):
                state = _state(tracker, b, h, page, slots, H, D) + e
                for share in tl.static_range(P // T):
                    share_id = _block(table, width, b, page * (P // T) + share, page >= 0)
                    own = (e < SHARE) & (share * SHARE + e < 3 * D) & (share_id != 0)
                    part = tl.load(state + share * SHARE, mask=own)
                    tl.store(states + (share_id * H + h) * WORDS + AT_STATE + e, part, mask=own)


class Carrier:
    """The way of a layer's rows between tail blocks and CacheBuffers.

    Args:
        layout: of a page in a block.
        tokens: of a tail block.
        pool: (N, H, row) uint8, every block.
        parts: k, v, readers in the model's dtype and tracker in fp32, views of `pool`: where they lie in a block.
    """

    def __init__(self, layout: PageLayout, tokens: int, pool: Tensor, parts: Mapping[str, Tensor]) -> None:
        kv, d, k = layout.kv, layout.head_dim, parts["k"]
        share = parts["tracker"].shape[-1]
        at = {name: x.storage_offset() - pool.storage_offset() // x.itemsize for name, x in parts.items()}
        assert at["k"] == 0 and at["v"] == tokens * d, "keys come first in a tail block, then values"
        self.layout, self.tokens, self.heads, self.device = layout, tokens, pool.shape[1], pool.device
        self.rows, self.states = pool.view(k.dtype), pool.view(torch.float32)
        samples = reader_slots(kv)
        self.ring_blocks = -(-(max(kv.ring, kv.page) - 1) // tokens) + 1  # that the tokens read in 16 bit can touch
        sizes = {"H": self.heads, "D": d, "DP": triton.next_power_of_2(d), "T": tokens, "ROW": self.rows.shape[2]}
        keep = sizes | {
            "WORDS": self.states.shape[2], "P": kv.page, "J": samples, "JP": triton.next_power_of_2(samples),
            "AT_READERS": at["readers"], "AT_STATE": at["tracker"], "SHARE": share,
            "SHARE_P": triton.next_power_of_2(share),
        }  # fmt: skip
        drift = {"LIVE": kv.codec == "live", "HOT": layout.hot, "OLD": kv.decay / (1 - kv.decay)}
        sinks = triton.next_power_of_2(max(1, kv.sinks))
        gather = keep | {"R": kv.ring, "C": kv.ring_slots, "S": kv.sinks, "SP": sinks}
        self.constants = {_put: sizes, _keep: keep | drift, _gather: gather}

    def put(self, table: Tensor, start: Tensor, k: Tensor, v: Tensor) -> None:
        """Store new keys and values (G, H, n, d) of rows at `start`, as far as there are blocks for them.

        Args:
            table: (G, M) int32, tail blocks of the rows. start: (G,) int64.
        """
        g, h, n, _ = k.shape
        blocks = -(-(n - 1) // self.tokens) + 1
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        strides = (*k.stride()[:3], *v.stride()[:3])
        _put[(blocks, h, g)](self.rows, table, start, k, v, n, table.shape[1], *strides, **self.constants[_put])

    def gather(self, pages: Tensor, page_table: Tensor, table: Tensor, start: Tensor, n: int) -> CacheBuffers:
        """The buffers of rows as they are before their new tokens, as far as these read them.

        Args:
            n: tokens that are appended at once, at most: the tracker's states after all their pages are kept.
        """
        states = max(STATES, -(-n // self.layout.kv.page) + 1)
        specs = _specs(self.layout, len(start), self.heads, self.rows.dtype, states)
        new = {name: torch.empty(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in specs.items()}
        buf = CacheBuffers(pages=pages, table=page_table, **new)
        _gather[(self.ring_blocks + 2, self.heads, len(start))](
            self.rows, self.states, table, start, buf.length, buf.nonfinite, buf.ring_k, buf.ring_v, buf.sink_k,
            buf.sink_v, buf.readers, buf.tracker, table.shape[1], states, **self.constants[_gather],
        )  # fmt: skip
        return buf

    def keep(self, buf: CacheBuffers, table: Tensor, start: Tensor, n: int, nonfinite: Tensor, alarms: Tensor) -> None:
        """Store what `cache_append` of n tokens to rows at `start` has added beside keys and values.

        Args:
            nonfinite, alarms: () int64, take the tokens that were not finite and the pages of a KV head that drifted
                (`ChannelTracker.misfit` from DRIFT on).
        """
        pages = -(-n // self.layout.kv.page)  # that are complete now, at most
        _keep[(self.heads, len(start), pages)](
            self.rows, self.states, table, start, buf.nonfinite, nonfinite, alarms, buf.readers, buf.tracker, n,
            table.shape[1], buf.tracker.shape[1], num_warps=1, **self.constants[_keep],
        )  # fmt: skip


@lru_cache(maxsize=256)
def _specs(
    layout: PageLayout, rows: int, heads: int, dtype: torch.dtype, states: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    specs = CacheBuffers.specs(layout, rows, heads, dtype, states=states)
    return {name: spec for name, spec in specs.items() if name not in ("pages", "table")}
