"""Codes to levels inside a Triton kernel: byte permutes for 4 bit, a small table for the other widths.

The levels of the live codec are whole int8 units, exact in fp16, and so is their sum over a Hadamard transform in fp32.
A 4-bit code c below 8 is the level -m[7-c], from 8 on m[c-8]; m are eight fp16 magnitudes. Four bytes (eight codes) at
a time: selectors from the low three bits, flipped where the top bit is clear; one permute each fetches the high bytes,
the low bytes and the signs; four more interleave them to fp16. That is 18 instructions for eight numbers; widening and
a polynomial cost about five each.
"""

import torch
import triton
import triton.language as tl

from turboquant.maths.codec import int8_levels


def _permute_asm() -> str:
    m = torch.tensor(int8_levels(4)[0][8:]).half().view(torch.int16).tolist()
    word = lambda part: sum(b << (8 * i) for i, b in enumerate(part))  # noqa: E731
    high, low = [x >> 8 & 255 for x in m], [x & 255 for x in m]
    h0, h1, l0, l1 = (f"0x{word(x):08x}" for x in (high[:4], high[4:], low[:4], low[4:]))
    return f"""
    {{
    .reg .b32 t, u, s, ha, la, sa, hb, lb, sb;
    .reg .b32 h0, h1, l0, l1, sg;
    mov.b32 h0, {h0}; mov.b32 h1, {h1}; mov.b32 l0, {l0}; mov.b32 l1, {l1}; mov.b32 sg, 0x8000;
    not.b32 t, $4; and.b32 t, t, 0x88888888;
    shr.u32 u, t, 3;
    sub.u32 s, t, u; xor.b32 s, $4, s; and.b32 s, s, 0x77777777;
    prmt.b32 ha, h0, h1, s; prmt.b32 la, l0, l1, s; prmt.b32 sa, sg, sg, u;
    shr.u32 s, s, 16; shr.u32 u, u, 16;
    prmt.b32 hb, h0, h1, s; prmt.b32 lb, l0, l1, s; prmt.b32 sb, sg, sg, u;
    or.b32 ha, ha, sa; or.b32 hb, hb, sb;
    prmt.b32 $0, la, ha, 0x6240; prmt.b32 $1, lb, hb, 0x6240;
    prmt.b32 $2, la, ha, 0x7351; prmt.b32 $3, lb, hb, 0x7351;
    }}
    """


PERMUTE = tl.constexpr(_permute_asm())


@triton.jit
def nibble_levels(b):
    """(p, w) bytes of two 4-bit codes -> fp16 units of the low and of the high nibbles, (p, w) each. NVIDIA only."""
    low, high = tl.inline_asm_elementwise(
        PERMUTE, "=r,=r,=r,=r,r", [b], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )
    return low, high


@triton.jit
def row_levels(rows, i, j, see, levels, inverse: tl.constexpr, ROW: tl.constexpr, BITS: tl.constexpr):
    """fp32 units of codes j of rows i, any width, one number at a time; `rows` points to packed rows of ROW bytes."""
    bit = j * BITS
    at = rows + i * ROW + bit // 8
    word = tl.load(at, mask=see, other=0).to(tl.int32)
    if BITS == 3:
        more = see & (bit % 8 > 5)
        word = word | (tl.load(at + 1, mask=more, other=0).to(tl.int32) << 8)
    code = (word >> (bit % 8)) & ((1 << BITS) - 1)
    return tl.load(levels + code, mask=see, other=0.0) * inverse
