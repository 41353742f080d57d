"""Rotation and int8 in one pass over a row, behind (RMSNorm | SiLU·mul | nothing).

One program has one row. It runs over the row twice (with a norm, three times): for the largest rotated entry, and for
the codes. Rotating again is cheaper than keeping the row: the Walsh-Hadamard transform of a block of P1·P2 is
H_P1·X·H_P2 on the block as a (P1, P2) matrix, two small products on tensor cores. Their operand is split into two
bf16 parts, which carries 16 bits of it; entries of H are ±1, so nothing else is rounded. Blocks below 256 go 16 at a
time, with one product from the right. What a norm or activation returns is rounded to the input's dtype first, as the
layers of transformers round it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.maths.activations import Int4Rows, Int8Rows
from turboquant.maths.rotation import hadamard_block, signs
from turboquant.recipe import ActivationRecipe

NOTHING, NORM, GATE = 0, 1, 2


@triton.jit
def _hadamard(n: tl.constexpr):
    """(n, n) of ±1, Sylvester's order: the parity of i & j; n <= 256."""
    v = tl.arange(0, n)[:, None] & tl.arange(0, n)[None, :]
    v = v ^ (v >> 4)
    v = v ^ (v >> 2)
    v = v ^ (v >> 1)
    return 1 - 2 * (v & 1)


@triton.jit
def _split(x):
    """Two bf16 that add up to 16 bits of x."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _transform(x, h1, h2, BOTH: tl.constexpr, WHOLE: tl.constexpr, FIT: tl.constexpr):
    """h1 @ x @ h2, or x @ h2; WHOLE: in fp32 (the interpreter has no bf16 products). FIT: x is bf16 exactly."""
    if WHOLE:
        y = tl.dot(x, h2, input_precision="ieee")
        if BOTH:
            y = tl.dot(h1, y, input_precision="ieee")
    else:
        high, low = _split(x)
        y = tl.dot(high, h2)
        if not FIT:
            y = tl.dot(low, h2, y)
        if BOTH:
            high, low = _split(y)
            y = tl.dot(h1, low, tl.dot(h1, high))
    return y


@triton.jit
def _load(x_ptr, w_ptr, at, inside, inv, shift, MODE: tl.constexpr):
    """What the linear layer reads at columns `at`: fp32, rounded to the input's dtype."""
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == 1:  # x·inv rounded, then times the norm's weight, as transformers' norms do
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift
        x = ((x * inv).to(kind).to(tl.float32) * w).to(kind).to(tl.float32)
    if MODE == 2:
        gate = (x / (1.0 + tl.exp(-x))).to(kind).to(tl.float32)
        up = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (gate * up).to(kind).to(tl.float32)
    return x


@triton.jit
def _kernel(
    x_ptr, w_ptr, sign_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm,
    K: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BOTH: tl.constexpr, MODE: tl.constexpr,
    WHOLE: tl.constexpr, FIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if MODE == 2:
        w_ptr += row * w_stride
    tile = tl.arange(0, P1)[:, None] * P2 + tl.arange(0, P2)[None, :]  # (P1, P2) columns
    h2 = _hadamard(P2).to(tl.float32 if WHOLE else tl.bfloat16)
    h1 = _hadamard(P1).to(tl.float32 if WHOLE else tl.bfloat16)
    inv = 1.0
    if MODE == 1:
        square = 0.0
        for start in range(0, K, P1 * P2):
            at = start + tile
            v = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            square += tl.sum(v * v)
        inv = 1.0 / tl.sqrt(square / K + eps)
    top = 0.0
    for start in range(0, K, P1 * P2):
        at = start + tile
        y = _load(x_ptr, w_ptr, at, at < K, inv, shift, MODE) * tl.load(sign_ptr + at, mask=at < K, other=0.0)
        y = _transform(y, h1, h2, BOTH, WHOLE, FIT)
        top = tl.maximum(top, tl.max(tl.abs(y)))
    unit = tl.maximum(top * norm / 127.0, 1e-30)
    tl.store(unit_ptr + row, unit)
    factor = norm / unit
    for start in range(0, K, P1 * P2):
        at = start + tile
        y = _load(x_ptr, w_ptr, at, at < K, inv, shift, MODE) * tl.load(sign_ptr + at, mask=at < K, other=0.0)
        y = _transform(y, h1, h2, BOTH, WHOLE, FIT)
        v = y * factor
        v = tl.floor(tl.abs(v) + 0.5) * tl.where(v < 0, -1.0, 1.0)
        v = tl.minimum(tl.maximum(v, -127.0), 127.0)
        tl.store(codes_ptr + row * K + at, v.to(tl.int8), mask=at < K)


def tile_of(width: int) -> tuple[int, int, bool]:
    """(P1, P2, whether the block spans both): how a row of `width` is cut.

    Raises:
        ValueError: the width is not a multiple of 16.
    """
    block = hadamard_block(width)
    if block < 16:
        raise ValueError(f"width={width} is not allowed: a multiple of 16")
    if block >= 256:
        second = 64 if block <= 4096 else 128
        second = min(second, block // 16)
        return block // second, second, True
    return 16, block, False


def fused_quantize(
    x: Tensor, *, norm: Tensor | None = None, eps: float = 1e-6, shift: float = 0.0, gate: Tensor | None = None
) -> Int8Rows:
    """Rotated int8 rows of x, of RMSNorm(x)·(norm + shift), or of SiLU(gate)·x.

    Args:
        x: (..., K) fp32, bf16 or fp16, K a multiple of 16 whose power-of-two part is at most 16384.
        norm: (K,) weight of the norm; shift is 1 for Gemma's.
        gate: like x.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    k = x.shape[-1]
    if norm is not None and gate is not None:
        raise ValueError("norm and gate exclude each other")
    if norm is not None and norm.shape != (k,):
        raise ValueError(f"norm is {tuple(norm.shape)}, expected ({k},)")
    if gate is not None and (gate.shape != x.shape or gate.dtype != x.dtype):
        raise ValueError(f"gate is {tuple(gate.shape)} {gate.dtype}, expected {tuple(x.shape)} {x.dtype}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}, expected float32, bfloat16 or float16")
    p1, p2, both = tile_of(k)
    first = x if gate is None else gate  # the one that goes through SiLU
    flat, second = _rows(first), _rows(x) if gate is not None else norm
    m = flat.shape[0]
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    unit = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if m:
        mode = NORM if norm is not None else GATE if gate is not None else NOTHING
        other: Any = flat if second is None else second
        _kernel[(m,)](
            flat, other, signs(k, x.device), codes, unit, flat.stride(0), other.stride(0), eps, shift,
            hadamard_block(k) ** -0.5, K=k, P1=p1, P2=p2, BOTH=both, MODE=mode,
            WHOLE=triton.knobs.runtime.interpret, FIT=x.dtype == torch.bfloat16,
            num_warps=4 if p1 * p2 <= 4096 else 8,
        )  # fmt: skip
    return Int8Rows(codes.view(x.shape), unit.view(*x.shape[:-1], 1))


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def quantize(x: Tensor, recipe: ActivationRecipe, hot: Any = None) -> Int8Rows | Int4Rows:
    """Contract in `kernels.linear.quantize`; codes may differ where a value lies on a rounding boundary."""
    if recipe.bits == 8 and x.shape[-1] % 16 == 0:
        return fused_quantize(x.detach())
    from turboquant.kernels import linear

    return linear.quantize(x, recipe, hot)
