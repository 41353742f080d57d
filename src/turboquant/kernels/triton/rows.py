"""Rotation and int8 in one pass over a row, behind (RMSNorm | SiLU·mul | nothing).

A block of A·B of a row, B <= 64, is a (B, A) matrix: its Walsh-Hadamard transform is H_B·X·H_A. The product with H_B
runs on tensor cores and is exact for bf16 and fp16, since entries of H are ±1 (fp32 goes as two bf16, 16 bits of it);
H_A is butterflies of fp32 additions, or, where the row is one block, another such product of two bf16 parts of X
(16 bits of it). All blocks of a row stand side by side in one (B, N) tile, whose columns are ordered so that a thread
holds all of A where there are four blocks or more. The tile stays in registers while its
largest entry is found; rows whose tile does not fit are cut into parts and rotated a second time for the codes. What
a norm or activation returns is rounded to the input's dtype first, as the layers of transformers round it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant.kernels.fused import NUMBERS, NormRule
from turboquant.kernels.linear import FEW
from turboquant.maths.activations import Int4Rows, Int8Rows
from turboquant.maths.rotation import hadamard_block, signs
from turboquant.recipe import ActivationRecipe

NOTHING, NORM, GATE = 0, 1, 2


@triton.jit
def _hadamard(n: tl.constexpr, ONE: tl.constexpr):
    """(n, n) of bits of ±1 in the 16-bit format whose one is ONE; Sylvester's order: the parity of i & j; n <= 256."""
    v = tl.arange(0, n)[:, None] & tl.arange(0, n)[None, :]
    v = (v ^ (v >> 4)) & 15
    return (ONE | ((0x6996 >> v) & 1) << 15).to(tl.int16)


@triton.jit
def _split(y):
    """fp32 -> two bf16 whose sum has 15 bits of it: cut, not rounded, for shifts are cheaper than conversions."""
    bits = y.to(tl.int32, bitcast=True)
    high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return high, (y - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def _cut(x, kind: tl.constexpr, WHOLE: tl.constexpr):
    """x rounded to `kind`, as fp32; two at a time on a GPU, where one at a time is several times slower."""
    if WHOLE or kind == tl.float32:
        y = x.to(kind)
    elif kind == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    return y.to(tl.float32)


@triton.jit
def _sigmoid(x, WHOLE: tl.constexpr):
    """1 / (1 + exp(-x)); on a GPU by the approximations of its instructions, about 22 bits."""
    if WHOLE:
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return y


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
        high, low = _split(x)
        y = tl.dot(h, low.trans(), tl.dot(h, high.trans()))
    else:
        y = tl.dot(h, x.to(KIND).trans())
    if TWO:
        if WHOLE:
            y = tl.dot(y, h2, input_precision="ieee")
        else:
            high, low = _split(y)
            y = tl.dot(low, h2, tl.dot(high, h2))
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
def _load(
    x_ptr, w_ptr, sign_ptr, y_ptr, at, inside, inv, shift, MODE: tl.constexpr, ONCE: tl.constexpr, ACT: tl.constexpr,
    KEEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the linear layer reads at columns `at`, times the signs: fp32, rounded to the input's dtype; KEEP stores it
    before the signs."""
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == 1:
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) + shift
        x = x * inv
        if not ONCE:
            x = _cut(x, kind, WHOLE)
        x = (x * w).to(kind).to(tl.float32)
    if MODE == 2:
        if ACT == 0:
            x = x * _sigmoid(x, WHOLE)
        else:  # x·(1 + tanh u)/2, u = √(2/π)·(x + 0.044715·x³)
            x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), WHOLE)
        up = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(kind).to(tl.float32) * up).to(kind).to(tl.float32)
    if KEEP:
        tl.store(y_ptr + at, x.to(kind), mask=inside)
    return x * tl.load(sign_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row(
    row, x_ptr, w_ptr, sign_ptr, y_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, h, h2,
    K: tl.constexpr, B: tl.constexpr, A: tl.constexpr, N: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr,
    MODE: tl.constexpr, ONCE: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
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
    x_ptr += tl.cast(row, tl.int64) * x_stride
    if MODE == 2:
        w_ptr += tl.cast(row, tl.int64) * w_stride
    if KEEP:
        y_ptr += tl.cast(row, tl.int64) * K
    codes_ptr += tl.cast(row, tl.int64) * K
    inv = 1.0
    if MODE == 1:
        square = 0.0
        for start in tl.static_range(0, K, part):
            v = tl.load(x_ptr + start + get, mask=(start + column < K)[:, None], other=0.0).to(tl.float32)
            square += tl.sum(v * v)
        inv = 1.0 / tl.sqrt(square / K + eps)
    top = 0.0
    for start in tl.static_range(0, K, part):
        inside = (start + column < K)[:, None]
        x = _load(x_ptr, w_ptr, sign_ptr, y_ptr, start + get, inside, inv, shift, MODE, ONCE, ACT, KEEP, WHOLE)
        y = _transform(x, h, h2, A, FOUR, TWO, WHOLE, kind)
        top = tl.maximum(top, tl.max(tl.abs(y)))
    unit = tl.maximum(top * norm / 127.0, 1e-30)
    tl.store(unit_ptr + row, unit)
    factor = norm / unit
    for start in tl.static_range(0, K, part):
        if part < K:
            inside = (start + column < K)[:, None]
            x = _load(x_ptr, w_ptr, sign_ptr, y_ptr, start + get, inside, inv, shift, MODE, ONCE, ACT, False, WHOLE)
            y = _transform(x, h, h2, A, FOUR, TWO, WHOLE, kind)
        v = y * factor + 12582912.0  # 1.5·2²³: the sum's low bits are the rounded number; |v| <= 127 by the unit
        tl.store(codes_ptr + start + put, v.to(tl.int32, bitcast=True).to(tl.int8), mask=(start + column < K)[None, :])


@triton.jit
def _kernel(
    x_ptr, w_ptr, sign_ptr, y_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, rows,
    K: tl.constexpr, B: tl.constexpr, A: tl.constexpr, N: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr,
    MODE: tl.constexpr, ONCE: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
    SWEEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = x_ptr.dtype.element_ty
    if EARLY:  # see Launch
        gdc_launch_dependents()
    if kind == tl.float16:
        h = _hadamard(B, 0x3C00).to(tl.float16, bitcast=True)
    else:
        h = _hadamard(B, 0x3F80).to(tl.bfloat16, bitcast=True)
    h2 = _hadamard(A, 0x3F80).to(tl.bfloat16, bitcast=True) if TWO else h
    if WHOLE:
        h, h2 = h.to(tl.float32), h2.to(tl.float32)
    if EARLY:
        gdc_wait()
    if SWEEP:
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
            _row(
                row, x_ptr, w_ptr, sign_ptr, y_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm, h, h2,
                K, B, A, N, FOUR, TWO, MODE, ONCE, ACT, KEEP, WHOLE,
            )  # fmt: skip
    else:
        _row(
            tl.program_id(0), x_ptr, w_ptr, sign_ptr, y_ptr, codes_ptr, unit_ptr, x_stride, w_stride, eps, shift, norm,
            h, h2, K, B, A, N, FOUR, TWO, MODE, ONCE, ACT, KEEP, WHOLE,
        )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        sweep_from: rows from which a program takes several, one after another, with one H; never behind a norm.
        programs: of those; four for each multiprocessor of an H100.
        warps: of a program, times what `warps_of` says.
        early_to: rows up to which the kernel and the one after it may be set up before the ones before them have ended
            (sm_90; both wait for what they read, and a kernel that was not made for it starts when all is done). Few:
            then the product behind, `cuda`'s own, fetches its weight meanwhile; humming's gains nothing.
    """

    sweep_from: int = 1024
    programs: int = 528
    warps: float = 1.0
    early_to: int = FEW


LAUNCH = Launch()
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


def warps_of(numbers: int, times: float = 1.0) -> int:
    """Warps of a program that holds so many numbers: 32 a thread, at 16384 or more 64."""
    usual = max(1, min(8, numbers // 1024)) if numbers <= 16384 else 16
    return max(1, min(32, int(usual * times)))


@lru_cache(maxsize=64)
def _signs(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return signs(width).to(torch.bfloat16).to(device)


@lru_cache(maxsize=16)
def _early(device: torch.device) -> bool:
    return torch.version.hip is None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fused_quantize(
    x: Tensor, *, norm: Tensor | None = None, eps: float = 1e-6, shift: float = 0.0, once: bool = False,
    gate: Tensor | None = None, activation: str = "silu", keep: Tensor | None = None, launch: Launch = LAUNCH,
) -> Int8Rows:  # fmt: skip
    """Rotated int8 rows of x, of RMSNorm(x)·(norm + shift), or of activation(gate)·x.

    Args:
        x: (..., K) fp32, bf16 or fp16, K a multiple of 16 whose power-of-two part is at most 16384.
        norm: (K,) weight of the norm; eps, shift, once as of `fused.NormRule`.
        gate: like x; activation: "silu" or "gelu_tanh".
        keep: like x, dense: takes what is quantized, unrotated.

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
    if keep is not None and not (keep.shape == x.shape and keep.dtype == x.dtype and keep.is_contiguous()):
        raise ValueError(f"keep is {tuple(keep.shape)} {keep.dtype}, expected dense {tuple(x.shape)} {x.dtype}")
    b, a, n = tile_of(k)
    first = x if gate is None else gate  # the one that goes through the activation
    flat, second = _rows(first), _rows(x) if gate is not None else norm
    m = flat.shape[0]
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    unit = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if m:
        mode = NORM if norm is not None else GATE if gate is not None else NOTHING
        other: Any = flat if second is None else second
        sweep = norm is None and m >= launch.sweep_from and b * n <= LARGEST_SWEPT
        early = m <= launch.early_to and _early(x.device) and not torch.compiler.is_compiling()
        _kernel[(min(m, launch.programs) if sweep else m,)](
            flat, other, _signs(k, x.device), flat if keep is None else keep, codes, unit, flat.stride(0),
            other.stride(0), eps, shift, hadamard_block(k) ** -0.5, m, K=k, B=b, A=a, N=n,
            FOUR=a > 1 and n // a >= 4, TWO=n == a and a <= 128, MODE=mode, ONCE=once, ACT=NUMBERS[activation],
            KEEP=keep is not None, WHOLE=triton.knobs.runtime.interpret, SWEEP=sweep, EARLY=early,
            num_warps=warps_of(b * n, launch.warps), **({"launch_pdl": True} if early else {}),
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


def norm_quantize(x: Tensor, weight: Tensor, rule: NormRule, recipe: ActivationRecipe) -> tuple[Tensor, Int8Rows]:
    """Contract in `kernels.fused.norm_quantize`; sums run in another order."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = fused_quantize(
        x.detach(), norm=weight.detach(), eps=rule.eps, shift=rule.shift, once=rule.once, keep=y
    )  # fmt: skip
    return y, rows


def gate_quantize(gate: Tensor, up: Tensor, activation: str, recipe: ActivationRecipe) -> Int8Rows:
    """Contract in `kernels.fused.gate_quantize`."""
    return fused_quantize(up.detach(), gate=gate.detach(), activation=activation)
