"""Rotation and int8 in one pass over a row, behind (RMSNorm | SiLU·mul | nothing).

A block of A·B of a row, B <= 64, is a (B, A) matrix: its Walsh-Hadamard transform is H_B·X·H_A. The product with H_B
runs on tensor cores and is exact for bf16 and fp16, since entries of H are ±1 (fp32 goes as two bf16, 16 bits of it);
H_A is butterflies of fp32 additions, or, where the row is one block, another such product of two bf16 parts of X
(16 bits of it). All blocks of a row stand side by side in one (B, N) tile, whose columns are ordered so that a thread
holds all of A where there are four blocks or more. The tile stays in registers while its
largest entry is found; rows whose tile does not fit are cut into parts and rotated a second time for the codes. What
a norm or activation returns is rounded to the input's dtype first, as the layers of transformers round it.
"""

from functools import lru_cache
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
    v = (v ^ (v >> 4)) & 15
    return 1 - 2 * ((0x6996 >> v) & 1)


@triton.jit
def _butterfly(y, LOW: tl.constexpr):
    """(y0 + y1, y0 - y1) along the columns' bit of weight LOW."""
    B: tl.constexpr = y.shape[0]
    N: tl.constexpr = y.shape[1]
    y0, y1 = tl.split(y.reshape(B, N // LOW // 2, 2, LOW).permute(0, 1, 3, 2))
    return tl.join(y0 + y1, y0 - y1).permute(0, 1, 3, 2).reshape(B, N)


@triton.jit
def _transform(
    x, h, h2, A: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr
):
    """(N, B) columns x -> (B, N), not scaled by the norm of the transform.

    WHOLE: products in fp32 (the interpreter has no bf16 products). KIND: what x is exactly, or fp32.
    """
    if WHOLE:
        y = tl.dot(h, x.trans(), input_precision="ieee")
    elif tl.float32 == KIND:
        high = x.to(tl.bfloat16)
        y = tl.dot(h, high.trans())
        y = tl.dot(h, (x - high.to(tl.float32)).to(tl.bfloat16).trans(), y)
    else:
        y = tl.dot(h, x.to(KIND).trans())
    if TWO:
        if WHOLE:
            y = tl.dot(y, h2, input_precision="ieee")
        else:
            high = y.to(tl.bfloat16)
            y = tl.dot((y - high.to(tl.float32)).to(tl.bfloat16), h2, tl.dot(high, h2))
    elif FOUR:
        y = _butterfly(y, 1)
        for bit in tl.static_range(14):
            if 4 << bit <= A:
                y = _butterfly(y, 8 << bit)
    else:
        for bit in tl.static_range(14):
            if 2 << bit <= A:
                y = _butterfly(y, 1 << bit)
    return y


@triton.jit
def _load(x_ptr, w_ptr, sign_ptr, at, inside, inv, shift, MODE: tl.constexpr):
    """What the linear layer reads at columns `at`, times the signs: fp32, rounded to the input's dtype."""
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == 1:  # x·inv rounded, then times the norm's weight, as transformers' norms do
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift
        x = ((x * inv).to(kind).to(tl.float32) * w).to(kind).to(tl.float32)
    if MODE == 2:
        gate = (x / (1.0 + tl.exp(-x))).to(kind).to(tl.float32)
        up = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (gate * up).to(kind).to(tl.float32)
    return x * tl.load(sign_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row(
    row, x_ptr, w_ptr, sign_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, h, h2,
    K: tl.constexpr, B: tl.constexpr, A: tl.constexpr, N: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr,
    MODE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.arange(0, N)
    if FOUR:  # columns are block.high, a.high, block.low (2 bits), a.low (1 bit); block.low is what lanes hold
        a = (n // 8) % (A // 2) * 2 + n % 2
        block = n // 8 // (A // 2) * 4 + n // 2 % 4
    else:
        a, block = n % A, n // A
    column = block * (A * B) + a * B
    put = tl.arange(0, B)[:, None] + column[None, :]
    get = tl.arange(0, B)[None, :] + column[:, None]
    part: tl.constexpr = N * B
    x_ptr += row.to(tl.int64) * x_stride
    if MODE == 2:
        w_ptr += row.to(tl.int64) * w_stride
    codes_ptr += row.to(tl.int64) * K
    inv = 1.0
    if MODE == 1:
        square = 0.0
        for start in tl.static_range(0, K, part):
            v = tl.load(x_ptr + start + get, mask=(start + column < K)[:, None], other=0.0).to(tl.float32)
            square += tl.sum(v * v)
        inv = 1.0 / tl.sqrt(square / K + eps)
    top = 0.0
    for start in tl.static_range(0, K, part):
        x = _load(x_ptr, w_ptr, sign_ptr, start + get, (start + column < K)[:, None], inv, shift, MODE)
        y = _transform(x, h, h2, A, FOUR, TWO, WHOLE, kind)
        top = tl.maximum(top, tl.max(tl.abs(y)))
    unit = tl.maximum(top * norm / 127.0, 1e-30)
    tl.store(unit_ptr + row, unit)
    factor = norm / unit
    for start in tl.static_range(0, K, part):
        if part < K:
            x = _load(x_ptr, w_ptr, sign_ptr, start + get, (start + column < K)[:, None], inv, shift, MODE)
            y = _transform(x, h, h2, A, FOUR, TWO, WHOLE, kind)
        v = y * factor
        v = (v + tl.where(v < 0, -0.5, 0.5)).to(tl.int32)  # cut: half rounds away from zero; |v| <= 127 by the unit
        tl.store(codes_ptr + start + put, v.to(tl.int8), mask=(start + column < K)[None, :])


@triton.jit
def _kernel(
    x_ptr, w_ptr, sign_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, rows,
    K: tl.constexpr, B: tl.constexpr, A: tl.constexpr, N: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr,
    MODE: tl.constexpr, WHOLE: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = x_ptr.dtype.element_ty
    h = _hadamard(B).to(tl.float32 if WHOLE else tl.float16 if kind == tl.float16 else tl.bfloat16)
    h2 = _hadamard(A).to(tl.float32 if WHOLE else tl.bfloat16) if TWO else h
    if SWEEP:
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
            _row(
                row, x_ptr, w_ptr, sign_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, h, h2,
                K, B, A, N, FOUR, TWO, MODE, WHOLE,
            )  # fmt: skip
    else:
        _row(
            tl.program_id(0), x_ptr, w_ptr, sign_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, h, h2,
            K, B, A, N, FOUR, TWO, MODE, WHOLE,
        )  # fmt: skip


SWEEP_FROM = 1024  # rows from which a program takes several, one after another, with one H
PROGRAMS = 528  # of those: four for each multiprocessor of an H100
LARGEST_SWEPT = 4096  # numbers of a row for that: the loads it has under way take shared memory
LARGEST_TILE = 32768  # numbers of a row that one program keeps in registers


def tile_of(width: int) -> tuple[int, int, int]:
    """(B, A, N): how a row of `width` is cut, see the top of the file.

    Raises:
        ValueError: the width is not a multiple of 16.
    """
    block = hadamard_block(width)
    if block < 16:
        raise ValueError(f"width={width} is not allowed: a multiple of 16")
    b = min(block, 64)
    blocks = min(triton.next_power_of_2(width // block), max(1, LARGEST_TILE // block))
    return b, block // b, max(16, block // b * blocks)


def warps_of(numbers: int) -> int:
    """Warps of a program that holds so many numbers: 32 a thread, at 16384 or more 64."""
    return max(1, min(8, numbers // 1024)) if numbers <= 16384 else 16


@lru_cache(maxsize=64)
def _signs(width: int, device: torch.device) -> Tensor:
    return signs(width, device).to(torch.bfloat16)


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
    b, a, n = tile_of(k)
    first = x if gate is None else gate  # the one that goes through SiLU
    flat, second = _rows(first), _rows(x) if gate is not None else norm
    m = flat.shape[0]
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    unit = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if m:
        mode = NORM if norm is not None else GATE if gate is not None else NOTHING
        other: Any = flat if second is None else second
        sweep = m >= SWEEP_FROM and b * n <= LARGEST_SWEPT
        _kernel[(min(m, PROGRAMS) if sweep else m,)](
            flat, other, _signs(k, x.device), codes, unit, flat.stride(0), other.stride(0), eps, shift,
            hadamard_block(k) ** -0.5, m, K=k, B=b, A=a, N=n, FOUR=a > 1 and n // a >= 4, TWO=n == a and a <= 128,
            MODE=mode, WHOLE=triton.knobs.runtime.interpret, SWEEP=sweep, num_warps=warps_of(b * n),
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
