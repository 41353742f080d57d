"""Device helpers on one page or one tile of tokens: rotation, rounding, chunk and ring as one run of tokens.

The rotation is a product with the ±1 Hadamard matrix on tensor cores, exact up to fp32 summation: fp32 numbers go
through as three bfloat16 parts. head_dim 256 is two halves of 128 and one butterfly between them.
"""

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 rounded to nearest in DTYPE; Triton's interpreter cuts bfloat16 off instead."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def hadamard(x, matrix, M: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """(M, DP) fp32 -> unscaled transform of each row, fp32. PARTS 1: x is exact in TYPE; 3: any fp32; 0: plain fp32."""
    i = tl.arange(0, L.W)
    h = tl.load(matrix + i[:, None] * L.W + i[None, :])
    y = tl.reshape(x, (M * L.HALVES, L.W))
    if PARTS == 0:
        z = tl.dot(y, h.to(tl.float32), input_precision="ieee")
    elif PARTS == 1:
        z = tl.dot(y.to(TYPE), h.to(TYPE))
    else:
        g = h.to(tl.bfloat16)
        a = y.to(tl.bfloat16)
        rest = y - a.to(tl.float32)
        b = rest.to(tl.bfloat16)
        c = (rest - b.to(tl.float32)).to(tl.bfloat16)
        z = tl.dot(c, g)
        z = tl.dot(b, g, z)
        z = tl.dot(a, g, z)
    if L.HALVES == 2:
        low, high = tl.split(tl.permute(tl.reshape(z, (M, 2, L.W)), (0, 2, 1)))
        z = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(z, (M, L.DP))


@triton.jit
def rint(x):
    """Round to the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def fp16_up(x):
    """Round x >= 0 up to fp16, saturating."""
    x = tl.minimum(x, FP16_MAX)
    h = x.to(tl.float16)
    up = (h.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(h.to(tl.float32) < x, up, h)


@triton.jit
def finite(x):
    """NaN as 0, clamped to what fp16 can hold; fp32."""
    x = x.to(tl.float32)
    return clamp(tl.where(x == x, x, 0.0), -FP16_MAX, FP16_MAX)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")  # false for NaN


@triton.jit
def store16(at, x, mask=None):
    """Store fp16 at byte addresses."""
    tl.store(at.to(tl.pointer_type(tl.float16)), x, mask=mask)


@triton.jit
def load16(at, mask=None):
    """fp16 at byte addresses, as fp32."""
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask=mask).to(tl.float32)


@triton.jit
def column_of(i, some, order, b, n, VALID: tl.constexpr):
    """Chunk column of the i-th real token."""
    if VALID:
        return tl.load(order + b * n + i, mask=some, other=0)
    else:
        return i


@triton.jit
def token_rows(p, inside, start, count, order, b, h, n, sb, sh, sn, H: tl.constexpr, L: tl.constexpr,
               VALID: tl.constexpr):  # fmt: skip
    """Where the tokens at positions p stand: (element offsets in the ring, in the chunk, mask of each)."""
    old = inside & (p >= 0) & (p < start)
    new = inside & (p >= start) & (p < start + count)
    column = column_of(p - start, new, order, b, n, VALID)
    ring = ((b * H + h) * L.C + p % L.C).to(tl.int64) * L.D
    chunk = b.to(tl.int64) * sb + h.to(tl.int64) * sh + column.to(tl.int64) * sn
    return ring, chunk, old, new


@triton.jit
def load_rows(ring, chunk, at_ring, at_chunk, old, new, c, L: tl.constexpr):
    """Tokens as they stand in ring and chunk: (rows, DP) fp32, zero elsewhere."""
    see = (c < L.D)[None, :]
    a = tl.load(ring + at_ring[:, None] + c[None, :], mask=old[:, None] & see, other=0.0)
    x = tl.load(chunk + at_chunk[:, None] + c[None, :], mask=new[:, None] & see, other=0.0)
    return tl.where(old[:, None], a.to(tl.float32), x.to(tl.float32))


@triton.jit
def reader_samples(q, column, some, b, h, sb, sh, sn, c, DTYPE: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
                   L: tl.constexpr):  # fmt: skip
    """RMS over the group of the queries in `column` (ROWS,), rounded to the readers' dtype: (ROWS, DP) fp32."""
    total = tl.zeros((ROWS, L.DP), tl.float32)
    at = b.to(tl.int64) * sb + column.to(tl.int64)[:, None] * sn + c[None, :]
    for g in range(G):
        x = tl.load(q + at + (h * G + g).to(tl.int64) * sh, mask=some[:, None] & (c < L.D)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += x * x
    return narrow(finite(tl.sqrt(total / G)), DTYPE).to(tl.float32)
