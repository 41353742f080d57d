"""Device helpers that encode one page: its statistics, its keys, its values. The order of maths/codec.py.

Differences from the reference are those of summation order (of a row's RMS, of means and variances), so a number next
to a rounding boundary may fall on its other side; the search for a row's scale adds whole numbers, exactly.
"""

import triton
import triton.language as tl

from turboquant.kernels.triton.tile import (
    FP16_MAX,
    clamp,
    finite,
    fp16_up,
    hadamard,
    reader_samples,
    rint,
    store16,
)
from turboquant.maths import codec

UNITS, CELL, CELLS = (tl.constexpr(n) for n in (codec.SEARCH_UNITS, codec.SEARCH_CELL, codec.SEARCH_CELLS))
CODE_CELLS = tl.constexpr(float(codec.CODE_CELLS))


@triton.jit
def page_mean_var(k, usable):
    """(PP, DP) fp32, (PP,) bool -> mean and variance of the usable tokens, (DP,)."""
    n = tl.maximum(tl.sum(usable.to(tl.float32), 0), 1.0)
    mean = tl.sum(tl.where(usable[:, None], k, 0.0), 0) / n
    off = tl.where(usable[:, None], k - mean[None, :], 0.0)
    return mean, tl.sum(off * off, 0) / n


@triton.jit
def page_power(q, readers, page, start, count, order, b, h, n, sb, sh, sn, c, DTYPE: tl.constexpr, H: tl.constexpr,
               G: tl.constexpr, L: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Mean of q² over the page's reader samples, those before the chunk from `readers`: (DP,)."""
    i = tl.arange(0, L.NSP)
    p = page * L.P + i * L.STRIDE + L.STRIDE - 1
    old = (i < L.NS) & (p < start)
    new = (i < L.NS) & (p >= start)
    slot = (p // L.STRIDE) % L.J
    at = readers + ((b * H + h) * L.J + slot).to(tl.int64)[:, None] * L.D + c[None, :]
    x = tl.load(at, mask=old[:, None] & (c < L.D)[None, :], other=0.0).to(tl.float32)
    column = p - start
    if VALID:
        column = tl.load(order + b * n + column, mask=new, other=0)
    y = reader_samples(q, column, new, b, h, sb, sh, sn, c, DTYPE, G, L.NSP, L)
    x = tl.where(old[:, None], x, y)
    return tl.sum(x * x, 0) / L.NS


@triton.jit
def hottest(importance, c, HOT: tl.constexpr, DP: tl.constexpr):
    """(DP,) int32: 1 for the HOT channels c of the largest importance, the first of equals; it is -1 where there is no
    channel.
    """
    is_hot = tl.zeros((DP,), tl.int32)
    for _ in range(HOT):
        at = tl.min(tl.where(importance == tl.max(importance, 0), c, DP), 0)
        is_hot = tl.where(c == at, 1, is_hot)
        importance = tl.where(c == at, -1.0, importance)
    return is_hot


@triton.jit
def blend(a, b, w):
    """(1-w)·a + w·b, rounded the same way wherever it is compiled."""
    return tl.fma(b, w + tl.zeros_like(b), a * (1 - w))


@triton.jit
def magnitude(a, edges, BITS: tl.constexpr):
    """How many of the positive edges lie below a >= 0, int32."""
    half: tl.constexpr = 1 << (BITS - 1)
    n = tl.zeros_like(a).to(tl.int32)
    if BITS <= 4:
        for e in tl.static_range(half - 1):
            n += (a > tl.load(edges + half + e)).to(tl.int32)
    else:
        for bit in tl.static_range(BITS - 1):
            more = n + (half >> (bit + 1))
            n = tl.where(a > tl.load(edges + half - 1 + more), more, n)
    return n


@triton.jit
def store_codes(at, code, rows, ROW: tl.constexpr, BITS: tl.constexpr, L: tl.constexpr):
    """Pack (PP, DP) int32 codes and store their bytes; eight codes are BITS bytes."""
    if BITS == 8:
        c = tl.arange(0, L.DP)
        tl.store(
            at + rows[:, None] * ROW + c[None, :], code.to(tl.uint8), mask=(rows < L.P)[:, None] & (c < L.D)[None, :]
        )
    else:
        g = tl.arange(0, L.DP // 8)
        see = (rows < L.P)[:, None] & (g < L.D // 8)[None, :]
        shift = tl.arange(0, 8) * BITS
        word = tl.reshape(code, (L.PP, L.DP // 8, 8)).to(tl.uint32) << shift[None, None, :].to(tl.uint32)
        word = tl.sum(word, 2).to(tl.uint32)
        at = at + rows[:, None] * ROW + g[None, :] * BITS
        if BITS == 4:
            tl.store(at.to(tl.pointer_type(tl.uint32)), word, mask=see)
        elif BITS == 2:
            tl.store(at.to(tl.pointer_type(tl.uint16)), word.to(tl.uint16), mask=see)
        else:
            tl.store(at, (word & 255).to(tl.uint8), mask=see)
            tl.store(at + 1, ((word >> 8) & 255).to(tl.uint8), mask=see)
            tl.store(at + 2, ((word >> 16) & 255).to(tl.uint8), mask=see)


@triton.jit
def quotient(y, scale):
    """y / scale per row, 0 where the scale is 0."""
    some = scale > 0
    return tl.where(some[:, None], tl.div_rn(y, tl.where(some, scale, 1.0)[:, None]), 0.0)


@triton.jit
def encode_rows(y, usable, base_at, scale_at, codes_at, edges, search, tab, UNIT: tl.constexpr, BITS: tl.constexpr,
                ROW: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Choose scales, code rotated rows y (PP, DP) and store base, log_scale (or the plain scale) and codes."""
    rows, c = tl.arange(0, L.PP), tl.arange(0, L.DP)
    real = (c < L.D)[None, :]
    half: tl.constexpr = 1 << (BITS - 1)
    square = tl.sum(y * y, 1)
    rms = tl.sqrt(square / L.D)
    if not L.LIVE:
        h = tl.minimum(rms, FP16_MAX).to(tl.float16)
        store16(scale_at + 2 * rows, h, mask=rows < L.P)
        u = quotient(y, h.to(tl.float32))
        m = magnitude(tl.abs(u), edges, BITS)
        store_codes(codes_at, tl.where(u > 0, half + m, half - 1 - m), rows, ROW, BITS, L)
    else:
        a = tl.abs(y)
        if BITS == 8:
            u = quotient(a, tl.max(a, 1))
            level = tl.div_rn(clamp(tl.ceil(u * 127 - 0.5), 0.0, 127.0), 127.0 + tl.zeros_like(u))
            scale = tl.sum(a * level, 1) / tl.maximum(tl.sum(level * level, 1), 1e-30)
        else:
            per_unit = tl.where(rms > 0, tl.div_rn(UNITS + tl.zeros_like(rms), tl.where(rms > 0, rms, 1.0)), 0.0)
            units = tl.minimum(rint(a * per_unit[:, None]), 32767.0).to(tl.int32)
            cell = tl.minimum(units // CELL, CELLS - 1)
            best = tl.zeros_like(rms)
            overlap = tl.zeros_like(rms)
            for t in tl.static_range(L.TRIALS):
                level = tl.where(real, tl.load(search + 256 * t + cell).to(tl.int32), 0)
                dot = tl.sum(units * level, 1).to(tl.float32)
                fit = tl.div_rn(dot * dot, tl.sum(level * level, 1).to(tl.float32))
                better = fit > best
                best, overlap = tl.where(better, fit, best), tl.where(better, dot, overlap)
            overlap = overlap * UNIT * (rms * (1.0 / UNITS))
            scale = tl.where(overlap > 0, tl.div_rn(square, tl.where(overlap > 0, overlap, 1.0)), 0.0)
        base16 = fp16_up(tl.max(tl.where(usable, scale, 0.0), 0))
        store16(base_at, base16)
        base = base16.to(tl.float32)
        some = tl.minimum(scale, base) > 0
        ratio = tl.where(scale > 0, base / tl.where(scale > 0, scale, 1.0), 1.0)
        log = clamp(rint(tl.log2(tl.maximum(ratio, 1.0)) * 32), 0.0, 254.0)
        log = tl.where(some, log, 255.0).to(tl.int32)
        tl.store(scale_at + rows, log.to(tl.uint8), mask=rows < L.P)
        scale = base * tl.load(tab + L.T_a + log)
        if BITS == 8:
            u = quotient(y, scale)
            m = clamp(tl.ceil(tl.abs(u) * 127 - 0.5), 0.0, 127.0).to(tl.int32)
            code = tl.where(u > 0, 127 + m, 127 - m)
        else:
            some = scale > 0
            per_cell = tl.where(some, tl.div_rn(CODE_CELLS + tl.zeros_like(scale), tl.where(some, scale, 1.0)), 0.0)
            cells = y * per_cell[:, None]
            code = tl.zeros_like(y).to(tl.int32)
            for e in tl.static_range(2 * half - 1):
                code += (cells >= tl.load(edges + e)).to(tl.int32)
        store_codes(codes_at, code, rows, ROW, BITS, L)


@triton.jit
def rotated(x, tab, matrix, L: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """R·x of every row of (PP, DP) fp32."""
    c = tl.arange(0, L.DP)
    sign = tl.load(tab + L.T_signs + c, mask=c < L.D, other=0.0)
    return hadamard(x * sign[None, :], matrix, L.PP, L, PARTS, TYPE) * L.NORM


@triton.jit
def encode_values(v, usable, page, gaps, tab, matrix, L: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """Values (PP, DP), finite, and the page's padding bytes; `page` is the address of its bytes."""
    g = tl.arange(0, 64)
    for i in range(0, L.GAPS, 64):
        tl.store(page + tl.load(gaps + i + g, mask=i + g < L.GAPS, other=0), tl.zeros((64,), tl.uint8),
                 mask=i + g < L.GAPS)  # fmt: skip
    y = rotated(v, tab, matrix, L, PARTS, TYPE)
    scale: tl.constexpr = L.O_value_log_scale if L.LIVE else L.O_value_scale
    encode_rows(y, usable, page + L.O_value_base, page + scale, page + L.O_value_codes, tab + L.T_value_edges,
                tab + L.T_value_search, tab, L.VUNIT, L.VB, L.VROW, L)  # fmt: skip


@triton.jit
def floored_root(x):
    return tl.sqrt(tl.maximum(x, 0.0) + (1e-8 * tl.max(x, 0) + 1e-20))


@triton.jit
def encode_keys(k, mean, var, power, usable, page, ring, chunk, at_ring, at_chunk, old, new, tab, matrix,
                L: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Keys (PP, DP), finite, with the statistics (DP,) frozen for the page; ring and chunk are where they came from."""
    if not L.LIVE:
        y = rotated(k, tab, matrix, L, PARTS, TYPE)
        encode_rows(y, usable, page, page + L.O_key_scale, page + L.O_key_codes, tab + L.T_key_edges,
                    tab + L.T_key_search, tab, L.KUNIT, L.KB, L.KROW, L)  # fmt: skip
    else:
        c = tl.arange(0, L.DP)
        real = c < L.D
        sk, sq = floored_root(var), floored_root(power)
        s = tl.sqrt(sk / sq)
        s = s / tl.sqrt(tl.sum(tl.where(real, s * s, 0.0), 0) / L.D)
        log = clamp(rint(tl.log2(s) * 16) + 128, 0.0, 255.0).to(tl.int32)
        tl.store(page + L.O_key_log_s + c, log.to(tl.uint8), mask=real)
        s = tl.load(tab + L.T_s + log)
        is_hot = hottest(tl.where(real, sk * sq, -1.0), c, L.HOT, L.DP)
        cold = (is_hot == 0) & real
        relative = tl.where(cold, mean / s, 0.0)
        step16 = fp16_up(tl.max(tl.abs(relative), 0) / 127)
        store16(page + L.O_key_mean_step, step16)
        step = step16.to(tl.float32)
        code = clamp(rint(tl.where(step > 0, relative / tl.where(step > 0, step, 1.0), 0.0)), -127.0, 127.0)
        tl.store(page + L.O_key_mean_code + c, code.to(tl.int8).to(tl.uint8, bitcast=True), mask=real)
        rest = tl.div_rn(k, tl.zeros_like(k) + s[None, :]) - (code * step)[None, :]
        y = rotated(tl.where(cold[None, :], rest, 0.0), tab, matrix, L, 3 if PARTS > 0 else 0, TYPE)
        encode_rows(y, usable, page + L.O_key_base, page + L.O_key_log_scale, page + L.O_key_codes,
                    tab + L.T_key_edges, tab + L.T_key_search, tab, L.KUNIT, L.KB, L.KROW, L)  # fmt: skip
        if L.HOT > 0:
            i = tl.arange(0, L.HOTP)
            some = i < L.HOT
            place = tl.cumsum(is_hot, 0) - 1
            hit = (place[None, :] == i[:, None]) & (is_hot > 0)[None, :]
            index = tl.sum(tl.where(hit, c[None, :], 0), 1)
            tl.store(page + L.O_key_hot_index + i, index.to(tl.uint8), mask=some)
            mean16 = clamp(tl.sum(tl.where(hit, mean[None, :], 0.0), 1), -FP16_MAX, FP16_MAX).to(tl.float16)
            store16(page + L.O_key_hot_mean + 2 * i, mean16, mask=some)
            a = tl.load(ring + at_ring[None, :] + index[:, None], mask=some[:, None] & old[None, :], other=0.0)
            x = tl.load(chunk + at_chunk[None, :] + index[:, None], mask=some[:, None] & new[None, :], other=0.0)
            picked = finite(tl.where(old[None, :], a.to(tl.float32), x.to(tl.float32))) - mean16.to(tl.float32)[:, None]
            step16 = fp16_up(tl.max(tl.where(usable[None, :], tl.abs(picked), 0.0), 1) / 127)
            store16(page + L.O_key_hot_step + 2 * i, step16, mask=some)
            code = clamp(rint(quotient(picked, step16.to(tl.float32))), -127.0, 127.0)
            rows = tl.arange(0, L.PP)
            to = page + L.O_key_hot_codes + i[:, None] * L.P + rows[None, :]
            see = some[:, None] & (rows < L.P)[None, :]
            tl.store(to, code.to(tl.int8).to(tl.uint8, bitcast=True), mask=see)
