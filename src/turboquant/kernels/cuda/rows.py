"""Rotation and int8 in one pass over 16-bit rows behind (RMSNorm | SiLU·mul | nothing) on compute capability 9.0: the
launch of csrc/quantize.cu. `triton.rows` does the same for other GPUs, widths and dtypes, but not within the share of a
product's time that quantizing may take (docs/measured/linear.md).
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cuda import nvrtc
from turboquant.kernels.fused import NUMBERS, NormRule
from turboquant.kernels.linear import FEW, LinearSpec
from turboquant.maths.activations import Int8Rows
from turboquant.maths.rotation import hadamard_block, signs
from turboquant.recipe import ActivationRecipe

OPS = ("quantize", "norm_quantize", "add_norm_quantize", "gate_quantize")
NOTHING, NORM, GATE, ADD_NORM = range(4)
EACH, MOST = 32, 1024  # numbers of a thread, threads of a block
REGISTERS = {NOTHING: 96, NORM: 96, GATE: 128, ADD_NORM: 128}  # of a thread
EARLY = {
    NOTHING: 2,
    NORM: 2,
    GATE: 1,
    ADD_NORM: 2,
}  # where few rows let the product behind them in: 1 behind their loads, 2 before
NO_RULE = NormRule(0.0)
BLOCKS = (128, 8192)  # the smallest and the largest block of the rotation


class _Call(ctypes.Structure):  # mirrors `Call` of csrc/quantize.cu
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("x", "other", "sign", "plus", "sum", "keep", "codes", "unit")],
        *[(n, ctypes.c_longlong) for n in ("x_stride", "other_stride", "plus_stride")],
        *[(n, ctypes.c_float) for n in ("eps", "shift", "scale")],
        ("rows", ctypes.c_int), ("early", ctypes.c_int),
    ]  # fmt: skip


def supports(op: str, spec: LinearSpec | None, device: torch.device) -> str | None:
    """None if an op of OPS can run for a layer, else why not."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "cuda: csrc/quantize.cu is made for compute capability 9.0"
    if spec is None or spec.activation_bits != 8:
        return "cuda: quantizes to 8 bit"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"cuda: quantizes 16-bit rows, not {str(spec.dtype).removeprefix('torch.')}"
    block = hadamard_block(spec.inputs)
    if not BLOCKS[0] <= block <= BLOCKS[1] or spec.inputs > EACH * MOST:
        return f"cuda: quantizes up to {EACH * MOST} inputs rotated in blocks of {BLOCKS[0]} to {BLOCKS[1]}"
    return nvrtc.missing()


@dataclass(frozen=True)
class Shape:
    """threads: of a block, which has a whole row. resident: blocks of a multiprocessor. shared: bytes of a block."""

    threads: int
    resident: int
    shared: int


def shape_of(k: int, mode: int) -> Shape:
    """For rows of k numbers."""
    threads = -(-k // 1024) * 32
    shared = -(-(threads * EACH // 64 * 72 + threads // 32 * 3) // 4) * 16 + threads * EACH  # mirrors csrc/quantize.cu
    return Shape(threads, max(1, MOST // REGISTERS[mode] * 64 // threads), shared)


def config(k: int, shape: Shape, mode: int, once: bool, activation: str, bf16: bool) -> str:
    """config.cuh."""
    numbers = {
        "K": k, "BLOCK": hadamard_block(k), "THREADS": shape.threads, "RESIDENT": shape.resident,
        "MODE": NORM if mode == ADD_NORM else mode, "ADD": int(mode == ADD_NORM), "ONCE": int(once),
        "ACT": NUMBERS[activation], "BF16": int(bf16), "BUFFERS": 1,
    }  # fmt: skip
    return "\n".join(["#pragma once", *(f"#define {k} {v}" for k, v in numbers.items()), ""])


@lru_cache(maxsize=4096)
def _kernel(
    k: int, mode: int, once: bool, activation: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Shape]:
    """(kernel, its shape)."""
    shape = shape_of(k, mode)
    source = config(k, shape, mode, once, activation, dtype == torch.bfloat16)
    return nvrtc.functions("quantize.cu", source, ("quantize",), device, shape.shared)[0], shape


@lru_cache(maxsize=64)
def _signs(width: int, device: torch.device) -> Tensor:
    """Of the 32 numbers of each thread a bit each: bit i of the low half is that of its pair i's first number."""
    with torch.inference_mode(False):
        minus = torch.zeros(-(-width // 1024) * 1024, dtype=torch.int64)
        minus[:width] = signs(width) < 0
        pairs = minus.view(-1, 4, 32, 4, 2).permute(0, 2, 1, 3, 4).reshape(-1, 16, 2)
        bits = (pairs << torch.arange(32).view(2, 16).T).sum((1, 2))
        return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().to(device)


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    fits = flat.stride(-1) == 1 and flat.stride(0) % 8 == 0 and flat.data_ptr() % 16 == 0
    return flat if fits else flat.clone(memory_format=torch.contiguous_format)


def _launch(
    mode: int, x: Tensor, other: Tensor | None, plus: Tensor | None = None, out: tuple[Tensor, ...] = (),
    rule: NormRule = NO_RULE, activation: str = "silu",
) -> Int8Rows:  # fmt: skip
    """x: (..., K), of the activation if there is one; other: the norm's weight (K,) or what the activation is
    multiplied with, like x; plus: like x, what is added to it; out: like x and dense, for what the norm returns, and
    for the sum.

    Raises:
        ValueError: another shape or dtype.
    """
    k = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"rows are {x.dtype}, expected bfloat16 or float16")
    for t, want in ((other, x.shape if mode == GATE else x.shape[-1:]), (plus, x.shape)):
        if t is not None and (t.shape != want or t.dtype != x.dtype or t.device != x.device):
            here, there = (f"{tuple(u.shape)} {u.dtype} on {u.device}" for u in (x, t))
            raise ValueError(f"beside rows of {here} stands {there}")
    flat = _rows(x)
    second, third = (flat if t is None else _rows(t) for t in (other, plus))
    m = len(flat)
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    unit = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if m:
        kernel, shape = _kernel(k, mode, rule.once, activation, x.dtype, x.device)
        kept, total = [*(t.data_ptr() for t in out), 0, 0][:2]
        call = _Call(
            flat.data_ptr(), second.data_ptr(), _signs(k, x.device).data_ptr(), third.data_ptr(), total, kept,
            codes.data_ptr(), unit.data_ptr(), flat.stride(0), second.stride(0), third.stride(0), rule.eps,
            rule.shift, hadamard_block(k) ** -0.5, m, EARLY[mode] if m <= FEW else 0,
        )  # fmt: skip
        blocks = min(m, nvrtc.processors(x.device) * shape.resident)
        nvrtc.launch(kernel, (blocks, 1, 1), shape.threads, shape.shared, x.device, call, after=m <= FEW)
    return Int8Rows(codes.view(x.shape), unit.view(*x.shape[:-1], 1))


def quantize(x: Tensor, recipe: ActivationRecipe, hot: Any = None) -> Int8Rows:
    """Contract in `kernels.linear.quantize`; sums run in another order, so codes may differ where a number lies on a
    rounding boundary."""
    return _launch(NOTHING, x.detach(), None)


def norm_quantize(x: Tensor, weight: Tensor, rule: NormRule, recipe: ActivationRecipe) -> tuple[Tensor, Int8Rows]:
    """Contract in `kernels.fused.norm_quantize`; the sum of squares runs in another order."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _launch(NORM, x.detach(), weight.detach(), None, (y,), rule)


def add_norm_quantize(
    x: Tensor, y: Tensor, weight: Tensor, rule: NormRule, recipe: ActivationRecipe
) -> tuple[Tensor, Tensor, Int8Rows]:
    """Contract in `kernels.fused.add_norm_quantize`; the sum of squares runs in another order."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return total, out, _launch(ADD_NORM, x.detach(), weight.detach(), y.detach(), (out, total), rule)


def gate_quantize(gate: Tensor, up: Tensor, activation: str, recipe: ActivationRecipe) -> Int8Rows:
    """Contract in `kernels.fused.gate_quantize`; the activation has about 22 bits before it is rounded."""
    return _launch(GATE, gate.detach(), up.detach(), activation=activation)
