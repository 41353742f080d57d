"""Attention in one pass over packed pages, ring, sinks and chunk: decode and verify steps, and any other chunk.

A program owns one KV head of one sequence and a tile of its query rows (all heads of the group), so that every byte is
read once for them. The query is scaled and rotated per page, never the keys; values accumulate in the rotated domain
and are rotated back once. Few rows are split over ranges of pages and merged (`_merge`); the last split serves what
stands in 16 bit. Where keys are unseen their rows are not loaded; a value that is not finite reaches its readers only.

16-bit models multiply in fp16 (queries normalised to 1, values to their page's base) with fp32 sums, fp32 models in
fp32. 4-bit rows are taken as even and odd channels on NVIDIA GPUs, other widths through a table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton.append import check
from turboquant.kernels.triton.levels import nibble_levels, row_levels
from turboquant.kernels.triton.spec import constants, spec, tables, triton_type
from turboquant.kernels.triton.tile import hadamard, is_finite, load16, narrow
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ("n", "width", "low", "mask_stride", "tiles", "window")


@triton.jit
def _online(s, top, total):
    """One step of the running softmax in base 2: (p, correction, top, total)."""
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    fix = tl.exp2(top - base)
    return p, fix, new, total * fix + tl.sum(p, 1)


@triton.jit
def _cap(s, softcap, SOFTCAP: tl.constexpr):
    """softcap·tanh(s/softcap)·log2(e), or s·log2(e)."""
    if SOFTCAP:
        e = tl.exp2(tl.minimum(tl.abs(s) / softcap * (2 * LOG2E), 100.0))
        s = tl.where(s < 0, -softcap, softcap) * (1 - 2 / (e + 1)) + (s - s)  # NaN stays
    return s * LOG2E


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _poison(acc, p, seen, v):
    """Add p·v of the values that are not finite to the rows that read them."""
    reads = (seen & (p > 0)).to(tl.float16)
    drops = (seen & ~(p > 0)).to(tl.float16)  # 0·inf
    zero = tl.zeros_like(acc)
    up = tl.dot(reads, (v == float("inf")).to(tl.float16), zero)
    down = tl.dot(reads, (v == -float("inf")).to(tl.float16), zero)
    nan = tl.dot(reads, (v != v).to(tl.float16), tl.dot(drops, (~is_finite(v)).to(tl.float16), zero))
    acc += tl.where(up > 0, float("inf"), 0.0)
    acc += tl.where(down > 0, -float("inf"), 0.0)
    return acc + tl.where(nan > 0, float("nan"), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _attend(
    q, k, v, where, mask, pages, table, length, ring_k, ring_v, sink_k, sink_v, tab, matrix, sink_logits,
    result, part_out, part_top, part_sum, n, width, low, mask_stride, tiles, scaling, softcap, window,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, L: tl.constexpr,
    VALID: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINK_LOGITS: tl.constexpr,
    CHUNK: tl.constexpr, DIRECT: tl.constexpr, NIBBLES: tl.constexpr, CT: tl.constexpr, ET: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0) // H, tl.program_id(0) % H
    split, b = tl.program_id(1), tl.program_id(2)
    m, c, half = tl.arange(0, M), tl.arange(0, L.DP), tl.arange(0, L.DP // 2)
    r = tile * M + m
    inside = r < G * n
    i, g = r // G, r % G
    start = tl.load(length + b).to(tl.int32)
    rel = i
    if VALID:
        rel = tl.load(where + b * n + i, mask=inside, other=-1)
    used = inside & (rel >= 0)
    t = start + rel
    newest = tl.max(tl.where(used, t, -1), 0)
    oldest = tl.min(tl.where(used, t, 1 << 30), 0)
    real = c < L.D
    at_q = q + b.to(tl.int64) * qb + (h * G + g).to(tl.int64) * qh + i.to(tl.int64) * qn
    qf = tl.load(at_q[:, None] + c[None, :], mask=used[:, None] & real[None, :], other=0.0)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, L.DP], tl.float32)
    # ---- packed pages
    if SPLITS == 1 or split < SPLITS - 1:
        sub: tl.constexpr = L.P // L.TILE
        last = tl.minimum(tl.minimum(start // L.P, width), tl.where(newest >= L.R, (newest - L.R) // L.P + 1, 0))
        first = low // L.P
        if WINDOW:
            first = tl.maximum(first, tl.maximum(oldest - window + 1, 0) // L.P)
        count = tl.maximum(last - first, 0) * sub
        per = count if SPLITS == 1 else tl.cdiv(count, SPLITS - 1)
        begin = 0 if SPLITS == 1 else split * per
        q32 = qf.to(tl.float32)
        size = tl.max(tl.abs(q32), 1)
        size = tl.where(size > 0, size, 1.0)
        qn32 = q32 / size[:, None]
        gain = size * scaling
        token, hot = tl.arange(0, L.TILE), tl.arange(0, L.HOTP)
        some_hot = hot < L.HOT
        sign = tl.load(tab + L.T_signs + c, mask=real, other=0.0)
        even = tl.zeros([M, L.DP // 2], tl.float32)
        odd = tl.zeros([M, L.DP // 2], tl.float32)
        see_code = real[None, :] & (token >= 0)[:, None]
        rq = tl.zeros([M, L.DP], tl.float32)
        if not L.LIVE:
            rq = hadamard(qn32 * sign[None, :], matrix, M, L, PARTS, CT)
        for it in range(begin, tl.minimum(begin + per, count)):
            page, inner = first + it // sub, it % sub * L.TILE
            number = tl.load(table + b * width + page).to(tl.int64)
            at = pages + (tl.maximum(number, 0) * H + h) * L.BYTES
            j = page * L.P + inner + token
            row = inner + token
            bias = tl.zeros([M], tl.float32)
            if L.LIVE:
                s = tl.load(tab + L.T_s + tl.load(at + L.O_key_log_s + c, mask=real, other=128).to(tl.int32))
                mean = tl.load(at + L.O_key_mean_code + c, mask=real, other=0).to(tl.int8, bitcast=True).to(tl.float32)
                qs = qn32 * s[None, :]
                bias = tl.sum(qs * mean[None, :], 1) * load16(at + L.O_key_mean_step)
                if L.HOT > 0:
                    index = tl.load(at + L.O_key_hot_index + hot, mask=some_hot, other=0).to(tl.int32)
                    hit = (c[:, None] == index[None, :]) & some_hot[None, :]
                    qs = tl.where((tl.sum(hit.to(tl.int32), 1) > 0)[None, :], 0.0, qs)
                    see = used[:, None] & some_hot[None, :]
                    qhot = tl.load(at_q[:, None] + index[None, :], mask=see, other=0.0).to(tl.float32) / size[:, None]
                    bias += tl.sum(
                        qhot * tl.where(some_hot, load16(at + L.O_key_hot_mean + 2 * hot, some_hot), 0.0)[None, :], 1
                    )
                rq = hadamard(qs * sign[None, :], matrix, M, L, PARTS, CT)
                ks = tl.load(at + L.O_key_log_scale + row).to(tl.int32)
                ka = tl.load(tab + L.T_a + ks) * (load16(at + L.O_key_base) * L.KUNIT * L.NORM)
                vs = tl.load(at + L.O_value_log_scale + row, mask=(row >= 0) & (number >= 0), other=255).to(tl.int32)
                unit = load16(at + L.O_value_base) * L.VUNIT
                va = tl.load(tab + L.T_a + vs)
            else:
                ka = load16(at + L.O_key_scale + 2 * row) * L.NORM
                va = load16(at + L.O_value_scale + 2 * row)
                unit = tl.max(va, 0)
                va = va / tl.where(unit > 0, unit, 1.0)
            unit = tl.where(number >= 0, unit, 0.0)
            va = tl.where(number >= 0, va, 0.0)
            if NIBBLES and L.KB == 4:
                rq_even, rq_odd = tl.split(tl.reshape(rq, (M, L.DP // 2, 2)))
                codes = tl.load(
                    at + L.O_key_codes + row[:, None] * L.KROW + half[None, :], mask=(half < L.D // 2)[None, :], other=0
                )
                lo, hi = nibble_levels(codes)
                x = _dot(rq_even.to(CT), tl.trans(lo), tl.zeros([M, L.TILE], tl.float32))
                x = _dot(rq_odd.to(CT), tl.trans(hi), x)
            else:
                kt = row_levels(at + L.O_key_codes, row[:, None], c[None, :], see_code, tab + L.T_key_levels,
                                1 / L.KUNIT, L.KROW, L.KB)  # fmt: skip
                x = _dot(rq.to(CT), tl.trans(kt).to(CT), tl.zeros([M, L.TILE], tl.float32))
            x = x * ka[None, :] + bias[:, None]
            if L.HOT > 0:
                step = tl.where(some_hot, load16(at + L.O_key_hot_step + 2 * hot, some_hot), 0.0)
                codes = tl.load(
                    at + L.O_key_hot_codes + hot[:, None] * L.P + row[None, :], mask=some_hot[:, None], other=0
                )
                x = _dot((qhot * step[None, :]).to(CT), codes.to(tl.int8, bitcast=True).to(tl.float32).to(CT), x)
            x = _cap(x * gain[:, None], softcap, SOFTCAP)
            seen = used[:, None] & (tl.where(number >= 0, j, -1) >= tl.maximum(low, L.S))[None, :]
            seen = seen & (j[None, :] <= (t - L.R)[:, None])
            if WINDOW:
                seen = seen & ((t[:, None] - j[None, :]) < window)
            p, fix, top, total = _online(tl.where(seen, x, -float("inf")), top, total)
            w = (p * va[None, :]).to(CT)
            if NIBBLES and L.VB == 4:
                codes = tl.load(
                    at + L.O_value_codes + row[:, None] * L.VROW + half[None, :],
                    mask=(half < L.D // 2)[None, :],
                    other=0,
                )
                lo, hi = nibble_levels(codes)
                zero = tl.zeros([M, L.DP // 2], tl.float32)
                even = even * fix[:, None] + _dot(w, lo, zero) * unit
                odd = odd * fix[:, None] + _dot(w, hi, zero) * unit
            else:
                vt = row_levels(at + L.O_value_codes, row[:, None], c[None, :], see_code, tab + L.T_value_levels,
                                1 / L.VUNIT, L.VROW, L.VB)  # fmt: skip
                acc = acc * fix[:, None] + _dot(w, vt.to(CT), tl.zeros([M, L.DP], tl.float32)) * unit
        if NIBBLES and L.VB == 4:
            acc = tl.reshape(tl.join(even, odd), (M, L.DP))
        acc = hadamard(acc, matrix, M, L, 3 if PARTS > 0 else 0, CT) * (sign * L.NORM)[None, :]
    # ---- what stands in 16 bit: sinks, ring, chunk
    if SPLITS == 1 or split == SPLITS - 1:
        e = tl.arange(0, E)
        packed_end = start // L.P * L.P
        n_sink: tl.constexpr = (L.S + E - 1) // E
        n_old: tl.constexpr = n_sink + (L.C + E - 1) // E
        columns = 0
        if CHUNK:
            columns = n if MASKED else tl.minimum(tl.max(tl.where(used, i, 0), 0) + 1, n)
        for step in range(tl.where(start > 0, 0, n_old), n_old + tl.cdiv(columns, E)):
            if step < n_sink:
                slot = step * E + e
                j = tl.where(slot < tl.minimum(L.S, start), slot, -1)
                base_k, base_v = (
                    sink_k + (b * H + h).to(tl.int64) * L.S * L.D,
                    sink_v + (b * H + h).to(tl.int64) * L.S * L.D,
                )
                stride_k, stride_v = slot.to(tl.int64) * L.D, slot.to(tl.int64) * L.D
                seen = used[:, None] & (j >= 0)[None, :]
            elif step < n_old:
                slot = (step - n_sink) * E + e
                behind = (start - 1 - slot) % L.C
                j = start - 1 - tl.where(behind < 0, behind + L.C, behind)
                j = tl.where((slot < L.C) & (j >= L.S), j, -1)
                base_k, base_v = (
                    ring_k + (b * H + h).to(tl.int64) * L.C * L.D,
                    ring_v + (b * H + h).to(tl.int64) * L.C * L.D,
                )
                stride_k, stride_v = slot.to(tl.int64) * L.D, slot.to(tl.int64) * L.D
                seen = used[:, None] & (j >= 0)[None, :]
                seen = seen & ((j[None, :] > (t - L.R)[:, None]) | (j >= packed_end)[None, :])
            else:
                slot = (step - n_old) * E + e
                column = slot
                if VALID:
                    column = tl.load(where + b * n + slot, mask=slot < n, other=-1)
                j = tl.where((slot < n) & (column >= 0), start + column, -1)
                base_k, base_v = (
                    k + b.to(tl.int64) * kb + h.to(tl.int64) * kh,
                    v + b.to(tl.int64) * vb + h.to(tl.int64) * vh,
                )
                stride_k, stride_v = slot.to(tl.int64) * kn, slot.to(tl.int64) * vn
                seen = used[:, None] & (j >= 0)[None, :]
                if MASKED:
                    at_mask = mask + b.to(tl.int64) * mask_stride + i.to(tl.int64)[:, None] * n + slot[None, :]
                    seen = seen & (tl.load(at_mask, mask=seen, other=0) > 0)
                else:
                    seen = seen & (j[None, :] <= t[:, None])
            if WINDOW:
                inner = (t[:, None] - j[None, :]) < window
                if MASKED:
                    inner = inner | (step >= n_old)
                seen = seen & inner
            load = (tl.max(seen.to(tl.int32), 0) > 0)[:, None] & real[None, :]
            kt = tl.load(base_k + stride_k[:, None] + c[None, :], mask=load, other=0.0).to(ET)
            vt = tl.load(base_v + stride_v[:, None] + c[None, :], mask=load, other=0.0).to(ET)
            x = _dot(qf.to(ET), tl.trans(kt), tl.zeros([M, E], tl.float32))
            x = _cap(x * scaling, softcap, SOFTCAP)
            p, fix, top, total = _online(tl.where(seen, x, -float("inf")), top, total)
            fin = is_finite(vt)
            acc = _dot(p.to(ET), tl.where(fin, vt, 0.0).to(ET), acc * fix[:, None])
            if tl.min(tl.min(fin.to(tl.int32), 1), 0) == 0:
                acc = _poison(acc, p, seen, vt)
    if DIRECT:
        if SINK_LOGITS:
            extra = tl.load(sink_logits + h * G + g, mask=used, other=0.0).to(tl.float32) * LOG2E
            new = tl.maximum(top, extra)
            fix = tl.exp2(top - new)
            acc, total = acc * fix[:, None], total * fix + tl.exp2(extra - new)
        y = tl.where(used[:, None], acc / tl.where(total == 0, 1.0, total)[:, None], 0.0)
        to = ((b * n + i).to(tl.int64) * H + h) * G + g  # result is (B, n, Hq, D)
        tl.store(result + to[:, None] * L.D + c[None, :], narrow(y, result.dtype.element_ty),
                 mask=inside[:, None] & real[None, :])  # fmt: skip
    else:
        part = (((b * H + h).to(tl.int64) * tiles + tile) * SPLITS + split) * M + m
        tl.store(part_out + part[:, None] * L.DP + c[None, :], acc)
        tl.store(part_top + part, top)
        tl.store(part_sum + part, total)


@triton.jit(do_not_specialize=("n", "tiles"))
def _merge(
    part_out, part_top, part_sum, sink_logits, result, n, tiles,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, L: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """One query row: sums over its splits."""
    r, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, i, g = tl.arange(0, L.DP), r // G, r % G
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([L.DP], tl.float32)
    if SINK_LOGITS:
        top = tl.load(sink_logits + h * G + g).to(tl.float32) * LOG2E
        total = 1.0
    first = (((b * H + h).to(tl.int64) * tiles + r // M) * SPLITS) * M + r % M
    for split in range(SPLITS):
        part = first + split * M
        x = tl.load(part_top + part)
        new = tl.maximum(top, x)
        base = tl.where(new == -float("inf"), 0.0, new)
        fix, w = tl.exp2(top - base), tl.exp2(x - base)
        acc = acc * fix + tl.load(part_out + part * L.DP + c) * w
        total = total * fix + tl.load(part_sum + part) * w
        top = new
    to = ((b * n + i).to(tl.int64) * H + h) * G + g
    y = acc / tl.where(total == 0, 1.0, total)
    tl.store(result + to * L.D + c, narrow(y, result.dtype.element_ty), mask=c < L.D)


def _units(device: torch.device) -> int:
    """Programs that keep the device busy."""
    return 8 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def generic(
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
    splits: int | None = None,
    partial: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`reference.cache_attention` by `_attend`; nothing is read back to the host.

    Args:
        splits: ranges of pages that run side by side, the 16-bit part included; None to fill the device.
        partial: leave the chunk and the packed tokens below this position out and return what the merge needs:
            sums (B, H, tiles, M, DP) fp32, maxima in base 2 and totals (B, H, tiles, M).
    """
    check(buf, layout, q, k, v, valid)
    s, device = spec(layout), q.device
    b, hq, n, d = q.shape
    h = k.shape[1]
    g, width = hq // h, buf.table.shape[1]
    full = buf.ring_k.dtype == torch.float32
    # Triton 3.6 gets fp32 tiles of 32 rows wrong on an H100 with four warps (right with two), of 16 not
    m = 16 if full else min(64 // s.HALVES, max(16, triton.next_power_of_2(g * n)))
    tiles = -(-g * n // m)
    if splits is None:
        spare = _units(device) // max(1, b * h * tiles)
        splits = 1 if spare < 2 or not width else 1 + min(spare, width, 64)
    if partial is not None:
        splits = 1
    interpreted, exact = triton.knobs.runtime.interpret, buf.ring_k.dtype
    q, k, v = _dense(q), _dense(k.to(exact)), _dense(v.to(exact))
    tab, matrix, _ = tables(layout, device)
    where = buf.length
    if valid is not None:
        where = torch.where(valid, valid.cumsum(1) - 1, -1).to(torch.int32)
    stride = 0
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask >= 0).expand(-1, 1, n, n).contiguous().view(torch.uint8)
        stride = n * n if mask.shape[0] > 1 else 0
    out = torch.empty(b, n, hq, d, dtype=q.dtype, device=device)
    direct = splits == 1 and partial is None
    parts = (b, h, tiles, splits, m) if not direct else (1,)
    sums = torch.empty(*parts, s.DP, dtype=torch.float32, device=device)
    tops, totals = (torch.empty(parts, dtype=torch.float32, device=device) for _ in range(2))
    logits = tops if sink_logits is None else sink_logits.contiguous()
    _attend[(tiles * h, splits, b)](
        q, k, v, where, where if mask is None else mask, buf.pages, buf.table, buf.length, buf.ring_k, buf.ring_v,
        buf.sink_k, buf.sink_v, tab, matrix, logits, out, sums, tops, totals, n, width, partial or 0, stride, tiles,
        float(scaling or d**-0.5), float(softcap or 0.0), window or 0,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H=h, G=g, M=m, E=32, SPLITS=splits, L=constants(layout), VALID=valid is not None, MASKED=mask is not None,
        WINDOW=window is not None, SOFTCAP=softcap is not None, SINK_LOGITS=sink_logits is not None,
        CHUNK=partial is None, DIRECT=direct,
        NIBBLES=s.LIVE and not full and not interpreted and torch.version.hip is None,
        CT=tl.float32 if full or interpreted else tl.float16,
        ET=tl.float32 if interpreted else triton_type(exact), PARTS=0 if interpreted else 3 if full else 1,
        num_warps=4, num_stages=1 if full else 2,
    )  # fmt: skip
    if partial is not None:
        return sums.squeeze(3), tops.squeeze(3), totals.squeeze(3)
    if not direct:
        _merge[(g * n, h, b)](
            sums, tops, totals, logits, out, n, tiles, H=h, G=g, M=m, SPLITS=splits, L=constants(layout),
            SINK_LOGITS=sink_logits is not None, num_warps=2,
        )  # fmt: skip
    return out.transpose(1, 2)
