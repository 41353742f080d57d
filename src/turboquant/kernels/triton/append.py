"""cache_append: two launches for a chunk of up to a page (a decode step, a verify step), four for a longer one.

_step     (head, sequence): looks at the new tokens and encodes the page that they complete, if they do
_values   (page, head, sequence): statistics and values of each complete page
_track    (channels, head, sequence): the tracker, page after page
_keys     (page, head, sequence): keys with the statistics frozen for them
_store    (tile, head, sequence): ring, sinks, reader samples, counters and, last, the length

How many pages a sequence completes is known on the device alone: programs without work leave at once. The encoders read
old tokens from the ring before `_store` overwrites it, and `_store` takes the length from `begin`, since it changes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton.encode import blend, encode_keys, encode_values, page_mean_var, page_power
from turboquant.kernels.triton.spec import constants, parts, spec, tables, triton_type
from turboquant.kernels.triton.tile import (
    FP16_MAX,
    column_of,
    finite,
    is_finite,
    load_rows,
    reader_samples,
    token_rows,
)
from turboquant.packed.buffers import STATES, CacheBuffers
from turboquant.packed.page import PageLayout

STORE_TILE = 32  # tokens that a program of _store moves
SIZES = ("n", "width", "many", "kept")  # change from call to call: one compiled kernel serves all
USABLE, BAD = tl.constexpr(1), tl.constexpr(2)  # bits of the flags


@triton.jit
def _span(length, counts, b, n, VALID: tl.constexpr):
    """(start, end, count) of a sequence."""
    start = tl.load(length + b).to(tl.int32)
    count = tl.load(counts + b).to(tl.int32) if VALID else n
    return start, start + count, count


@triton.jit
def _page_at(pages, table, width, b, h, page, H: tl.constexpr, L: tl.constexpr):
    """(address of the page's bytes, whether it has a place)."""
    number = tl.load(table + b * width + page, mask=page < width, other=-1).to(tl.int64)
    return pages + (tl.maximum(number, 0) * H + h) * L.BYTES, number >= 0


@triton.jit
def _state(tracker, b, h, page, kept, H: tl.constexpr, L: tl.constexpr):
    """Address of the tracker's state after a page."""
    return tracker + (((b * kept + (page + kept) % kept) * H + h) * 3).to(tl.int64) * L.D


@triton.jit(do_not_specialize=SIZES)
def _step(
    q, k, v, counts, order, pages, table, ring_k, ring_v, readers, tracker, length, flags, begin, tab, matrix, gaps,
    n, width, kept, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, VALID: tl.constexpr, PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(1)
    start, end, count = _span(length, counts, b, n, VALID)
    page = start // L.P
    if h == 0:
        tl.store(begin + b, start)
    c = tl.arange(0, L.DP)
    i = tl.arange(0, N)
    column = column_of(i, i < count, order, b, n, VALID)
    see = (i < count)[:, None] & (c < L.D)[None, :]
    x = tl.load(
        k + b.to(tl.int64) * kb + h.to(tl.int64) * kh + column.to(tl.int64)[:, None] * kn + c[None, :],
        mask=see,
        other=0.0,
    )
    y = tl.load(
        v + b.to(tl.int64) * vb + h.to(tl.int64) * vh + column.to(tl.int64)[:, None] * vn + c[None, :],
        mask=see,
        other=0.0,
    )
    bad = tl.max((~(is_finite(x) & is_finite(y))).to(tl.int32), 1)
    tl.store(flags + (b * H + h) * 2 * L.P + start - page * L.P + i, (bad * BAD).to(tl.uint8), mask=i < count)
    if end // L.P > page:
        rows = tl.arange(0, L.PP)
        p = page * L.P + rows
        at_ring, at_k, old, new = token_rows(p, rows < L.P, start, count, order, b, h, n, kb, kh, kn, H, L, VALID)
        _, at_v, _, _ = token_rows(p, rows < L.P, start, count, order, b, h, n, vb, vh, vn, H, L, VALID)
        kt = load_rows(ring_k, k, at_ring, at_k, old, new, c, L)
        vt = load_rows(ring_v, v, at_ring, at_v, old, new, c, L)
        over = (tl.abs(kt) <= FP16_MAX) & (tl.abs(vt) <= FP16_MAX)
        usable = (tl.min(over.to(tl.int32), 1) > 0) & (p >= L.S) & (rows < L.P)
        data, placed = _page_at(pages, table, width, b, h, page, H, L)
        kt = finite(kt)
        mean, var = tl.zeros((L.DP,), tl.float32), tl.zeros((L.DP,), tl.float32)
        power = mean
        if L.LIVE:
            mean, var = page_mean_var(kt, usable)
            power = page_power(q, readers, page, start, count, order, b, h, n, qb, qh, qn, c,
                               ring_k.dtype.element_ty, H, G, L, VALID)  # fmt: skip
            real = c < L.D
            before, after = _state(tracker, b, h, page - 1, kept, H, L) + c, _state(tracker, b, h, page, kept, H, L) + c
            if page > 0:
                m0 = tl.load(before, mask=real, other=0.0)
                v0 = tl.load(before + L.D, mask=real, other=0.0)
                p0 = tl.load(before + 2 * L.D, mask=real, other=0.0)
                tl.store(after, blend(m0, mean, L.DECAY), mask=real)
                tl.store(after + L.D, blend(v0, var, L.DECAY), mask=real)
                tl.store(after + 2 * L.D, blend(p0, power, L.DECAY), mask=real)
                var, power = blend(v0, var, L.BLEND), blend(p0, power, L.BLEND)
            else:
                tl.store(after, mean, mask=real)
                tl.store(after + L.D, var, mask=real)
                tl.store(after + 2 * L.D, power, mask=real)
        if placed:
            encode_values(finite(vt), usable, data, gaps, tab, matrix, L, PARTS, TYPE)
            encode_keys(kt, mean, var, power, usable, data, ring_k, k, at_ring, at_k, old, new, tab, matrix, L, PARTS,
                        TYPE)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _values(
    q, k, v, counts, order, pages, table, ring_k, ring_v, readers, length, flags, stats, tab, matrix, gaps,
    n, width, many, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, VALID: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    nth, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, count = _span(length, counts, b, n, VALID)
    page = start // L.P + nth
    if page * L.P < end:
        c, rows = tl.arange(0, L.DP), tl.arange(0, L.PP)
        p = page * L.P + rows
        at_ring, at_k, old, new = token_rows(p, rows < L.P, start, count, order, b, h, n, kb, kh, kn, H, L, VALID)
        _, at_v, _, _ = token_rows(p, rows < L.P, start, count, order, b, h, n, vb, vh, vn, H, L, VALID)
        kt = load_rows(ring_k, k, at_ring, at_k, old, new, c, L)
        vt = load_rows(ring_v, v, at_ring, at_v, old, new, c, L)
        over = (tl.abs(kt) <= FP16_MAX) & (tl.abs(vt) <= FP16_MAX)
        usable = (tl.min(over.to(tl.int32), 1) > 0) & (p >= L.S) & (rows < L.P)
        bad = (tl.min((is_finite(kt) & is_finite(vt)).to(tl.int32), 1) == 0) & new
        flag = usable.to(tl.int32) * USABLE + bad.to(tl.int32) * BAD
        tl.store(flags + ((b * H + h).to(tl.int64) * many + nth) * L.P + rows, flag.to(tl.uint8), mask=rows < L.P)
        if (page + 1) * L.P <= end:
            if L.LIVE:
                mean, var = page_mean_var(finite(kt), usable)
                power = page_power(q, readers, page, start, count, order, b, h, n, qb, qh, qn, c,
                                   ring_k.dtype.element_ty, H, G, L, VALID)  # fmt: skip
                at = stats + ((b * H + h).to(tl.int64) * many + nth) * 3 * L.DP + c
                tl.store(at, mean)
                tl.store(at + L.DP, var)
                tl.store(at + 2 * L.DP, power)
            data, placed = _page_at(pages, table, width, b, h, page, H, L)
            if placed:
                encode_values(finite(vt), usable, data, gaps, tab, matrix, L, PARTS, TYPE)


@triton.jit(do_not_specialize=SIZES)
def _track(
    counts, tracker, length, stats, begin, n, many, kept,
    H: tl.constexpr, L: tl.constexpr, VALID: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, _ = _span(length, counts, b, n, VALID)
    if (part == 0) & (h == 0):
        tl.store(begin + b, start)
    if L.LIVE:
        c = part * CHANNELS + tl.arange(0, CHANNELS)
        real, first = c < L.D, start // L.P
        total = end // L.P - first
        before, old = _state(tracker, b, h, first - 1, kept, H, L) + c, tl.where(real, first, 0) > 0
        m0 = tl.load(before, mask=old, other=0.0)
        v0 = tl.load(before + L.D, mask=old, other=0.0)
        p0 = tl.load(before + 2 * L.D, mask=old, other=0.0)
        at = stats + (b * H + h).to(tl.int64) * many * 3 * L.DP + c
        m, x, y = at, at + L.DP, at + 2 * L.DP
        for i in tl.range(0, total, num_stages=AHEAD):
            mean = tl.load(m + i * 3 * L.DP)
            var = tl.load(x + i * 3 * L.DP)
            power = tl.load(y + i * 3 * L.DP)
            past = tl.zeros((CHANNELS,), tl.int32) + (first + i) > 0
            tl.store(x + i * 3 * L.DP, tl.where(past, blend(v0, var, L.BLEND), var))
            tl.store(y + i * 3 * L.DP, tl.where(past, blend(p0, power, L.BLEND), power))
            m0 = tl.where(past, blend(m0, mean, L.DECAY), mean)
            v0 = tl.where(past, blend(v0, var, L.DECAY), var)
            p0 = tl.where(past, blend(p0, power, L.DECAY), power)
            after = _state(tracker, b, h, first + i, kept, H, L) + c
            late = tl.where(real, i, -kept) >= total - kept
            tl.store(after, m0, mask=late)
            tl.store(after + L.D, v0, mask=late)
            tl.store(after + 2 * L.D, p0, mask=late)


@triton.jit(do_not_specialize=SIZES)
def _keys(
    k, counts, order, pages, table, ring_k, length, flags, stats, tab, matrix,
    n, width, many, kb, kh, kn,
    H: tl.constexpr, L: tl.constexpr, VALID: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    nth, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, count = _span(length, counts, b, n, VALID)
    page = start // L.P + nth
    data, placed = _page_at(pages, table, width, b, h, page, H, L)
    if ((page + 1) * L.P <= end) & placed:
        c, rows = tl.arange(0, L.DP), tl.arange(0, L.PP)
        p = page * L.P + rows
        at_ring, at_k, old, new = token_rows(p, rows < L.P, start, count, order, b, h, n, kb, kh, kn, H, L, VALID)
        kt = finite(load_rows(ring_k, k, at_ring, at_k, old, new, c, L))
        row = (b * H + h).to(tl.int64) * many + nth
        usable = (tl.load(flags + row * L.P + rows, mask=rows < L.P, other=0).to(tl.int32) & USABLE) > 0
        at = stats + row * 3 * L.DP + c
        mean, var, power = tl.zeros((L.DP,), tl.float32), tl.zeros((L.DP,), tl.float32), tl.zeros((L.DP,), tl.float32)
        if L.LIVE:
            mean, var, power = tl.load(at), tl.load(at + L.DP), tl.load(at + 2 * L.DP)
        encode_keys(kt, mean, var, power, usable, data, ring_k, k, at_ring, at_k, old, new, tab, matrix, L, PARTS, TYPE)


@triton.jit
def _move(source, target, p, some, start, order, b, h, n, sb, sh, sn, slot, slots, H: tl.constexpr, L: tl.constexpr,
          VALID: tl.constexpr):  # fmt: skip
    """Chunk tokens at positions p to their slots of ring or sinks."""
    c = tl.arange(0, L.DP)
    column = column_of(p - start, some, order, b, n, VALID)
    see = some[:, None] & (c < L.D)[None, :]
    at = b.to(tl.int64) * sb + h.to(tl.int64) * sh + column.to(tl.int64)[:, None] * sn + c[None, :]
    to = ((b * H + h) * slots + slot).to(tl.int64)[:, None] * L.D + c[None, :]
    tl.store(target + to, tl.load(source + at, mask=see), mask=see)


@triton.jit(do_not_specialize=SIZES)
def _store(
    q, k, v, counts, order, ring_k, ring_v, sink_k, sink_v, readers, length, nonfinite, flags, begin,
    n, many, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    H: tl.constexpr, HP: tl.constexpr, G: tl.constexpr, L: tl.constexpr, VALID: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    z, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, count = _span(begin, counts, b, n, VALID)
    i = tl.arange(0, ROWS)
    p = tl.maximum(start, end - L.C) + z * ROWS + i
    _move(k, ring_k, p, p < end, start, order, b, h, n, kb, kh, kn, p % L.C, L.C, H, L, VALID)
    _move(v, ring_v, p, p < end, start, order, b, h, n, vb, vh, vn, p % L.C, L.C, H, L, VALID)
    if z == 0:
        if start < L.S:
            sink = start + tl.arange(0, L.SP)
            first = sink < tl.minimum(end, L.S)
            _move(k, sink_k, sink, first, start, order, b, h, n, kb, kh, kn, sink, L.S, H, L, VALID)
            _move(v, sink_v, sink, first, start, order, b, h, n, vb, vh, vn, sink, L.S, H, L, VALID)
        last = end // L.STRIDE
        if last > start // L.STRIDE:
            c = tl.arange(0, L.DP)
            j = tl.maximum(start // L.STRIDE, last - L.J) + tl.arange(0, L.JP)
            some = j < last
            column = column_of(j * L.STRIDE + L.STRIDE - 1 - start, some, order, b, n, VALID)
            x = reader_samples(q, column, some, b, h, qb, qh, qn, c, readers.dtype.element_ty, G, L.JP, L)
            to = readers + ((b * H + h) * L.J + j % L.J).to(tl.int64)[:, None] * L.D + c[None, :]
            tl.store(to, x.to(readers.dtype.element_ty), mask=some[:, None] & (c < L.D)[None, :])
        if h == 0:
            head, token = tl.arange(0, HP), tl.arange(0, 128)
            offset = start - start // L.P * L.P
            total = tl.zeros((128,), tl.int32)
            for i0 in range(0, count, 128):
                at = offset + i0 + token
                see = (head < H)[:, None] & (i0 + token < count)[None, :]
                f = tl.load(
                    flags + ((b * H + head).to(tl.int64) * many * L.P)[:, None] + at[None, :], mask=see, other=0
                )
                total += (tl.max(f.to(tl.int32) & BAD, 0) > 0).to(tl.int32)
            tl.store(nonfinite + b, tl.load(nonfinite + b) + tl.sum(total, 0))
            tl.store(length + b, end.to(tl.int64))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def check(buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """Refuse what the kernels would misread.

    Raises:
        ValueError: shapes that do not match, a buffer that is not contiguous or not of its shape and dtype.
    """
    b, h, n, d = k.shape
    if v.shape != k.shape or q.shape != (b, q.shape[1], n, d) or q.shape[1] % h or d != layout.head_dim:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not match")
    if valid is not None and (valid.shape != (b, n) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be ({b}, {n}) bool, got {tuple(valid.shape)} {valid.dtype}")
    states = max(STATES, buf.tracker.shape[1])
    specs = CacheBuffers.specs(layout, b, h, buf.ring_k.dtype, len(buf.pages), buf.table.shape[1], states)
    for name, want in specs.items():
        t = getattr(buf, name)
        if (tuple(t.shape), t.dtype) != want or not t.is_contiguous():
            raise ValueError(f"CacheBuffers.{name} must be {want} and contiguous, got {(tuple(t.shape), t.dtype)}")


def warps(elements: int) -> int:
    """Warps of a program that holds a tile of so many numbers: 64 a thread, 4 to 16 warps."""
    return min(16, max(4, elements // 2048))


def cache_append(buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """See `reference.cache_append`. Reads nothing back to the host, so it can be captured in a CUDA graph.

    A page without a place in the table (-1, or beyond its width) is not stored; the tracker of the plain codec, which
    nothing reads, is not written.

    Raises:
        ValueError: see `check`.
    """
    b, h, n, d = k.shape
    if not b or not n:
        return
    check(buf, layout, q, k, v, valid)
    q, k, v = _dense(q), _dense(k.to(buf.ring_k.dtype)), _dense(v.to(buf.ring_v.dtype))
    s, group, width, device = spec(layout), q.shape[1] // h, buf.table.shape[1], k.device
    kept = buf.tracker.shape[1]
    tab, matrix, gaps = tables(layout, device)
    counts = order = buf.length
    if valid is not None:
        counts = valid.sum(1, dtype=torch.int32)
        order = (~valid).to(torch.uint8).argsort(stable=True, dim=1).to(torch.int32)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    common = dict(H=h, L=constants(layout), VALID=valid is not None)
    encoder = dict(PARTS=parts(k.dtype), TYPE=triton_type(k.dtype), num_warps=warps(s.PP * s.DP))
    most = -(-n // s.P)  # pages that the chunk can complete
    begin = torch.empty(b, dtype=torch.int32, device=device)
    flags = torch.empty(b, h, most + 1, s.P, dtype=torch.uint8, device=device)
    if n <= s.P:
        _step[(h, b)](
            q, k, v, counts, order, buf.pages, buf.table, buf.ring_k, buf.ring_v, buf.readers, buf.tracker, buf.length,
            flags, begin, tab, matrix, gaps, n, width, kept, *strides,
            G=group, N=min(s.PP, 16 if n <= 16 else s.PP), **common, **encoder,
        )  # fmt: skip
    else:
        stats = torch.empty(b, h, most + 1, 3, s.DP, dtype=torch.float32, device=device)
        _values[(most + 1, h, b)](
            q, k, v, counts, order, buf.pages, buf.table, buf.ring_k, buf.ring_v, buf.readers, buf.length, flags, stats,
            tab, matrix, gaps, n, width, most + 1, *strides, G=group, **common, **encoder,
        )  # fmt: skip
        channels = min(32, s.DP)
        _track[(-(-d // channels), h, b)](
            counts, buf.tracker, buf.length, stats, begin, n, most + 1, kept,
            CHANNELS=channels, AHEAD=6, num_warps=1, **common,
        )  # fmt: skip
        _keys[(most, h, b)](
            k, counts, order, buf.pages, buf.table, buf.ring_k, buf.length, flags, stats, tab, matrix,
            n, width, most + 1, *k.stride()[:3], **common, **encoder,
        )  # fmt: skip
    rows = 2 if n <= 2 else STORE_TILE
    _store[(-(-min(n, s.C) // rows), h, b)](
        q, k, v, counts, order, buf.ring_k, buf.ring_v, buf.sink_k, buf.sink_v, buf.readers, buf.length, buf.nonfinite,
        flags, begin, n, most + 1, *strides, HP=triton.next_power_of_2(h), G=group, ROWS=rows, num_warps=4, **common,
    )  # fmt: skip
