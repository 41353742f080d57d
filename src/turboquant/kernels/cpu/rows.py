"""Inputs of linear layers to int8 on the CPU: rotation, a scale per row and rounding in one pass over the row, also
behind a norm or a gate."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cpu import cache
from turboquant.kernels.fused import NUMBERS, NormRule, norm_refusal
from turboquant.maths.activations import Int8Rows
from turboquant.maths.rotation import hadamard_block, signs
from turboquant.recipe import ActivationRecipe

LEAST_BLOCK = 16


@lru_cache(maxsize=64)
def _signs(width: int) -> Tensor:
    return signs(width)


@cache.untraced
def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rotate each row (the signs of its width, Walsh-Hadamard over aligned blocks) and round it to int8.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        block: a power of two from 16 that divides K; `maths.rotation.hadamard_block(K)` for `maths.rotation.rotate`.

    Returns:
        codes (M, K) int8 from -127 to 127 and scale (M,) fp32: R·x ≈ scale·codes, where scale is max|R·x|/127 and at
        least 1e-30, bit for bit as in maths/. A row with a NaN or an infinity has the scale NaN and codes 0.

    Raises:
        ValueError: another shape, dtype or block.
        RuntimeError: the native module is not built.
    """
    if cache._native is None:
        raise RuntimeError(f"the native module is not built ({cache._missing})")
    if x.dim() != 2 or x.device.type != "cpu" or x.dtype not in cache.DTYPES:
        raise ValueError(f"x must be (M, K) float32, bfloat16 or float16 on the CPU, got {tuple(x.shape)} {x.dtype}")
    rows, width = x.shape
    if block < LEAST_BLOCK or block & (block - 1) or width % block:
        raise ValueError(f"block must be a power of two from {LEAST_BLOCK} that divides {width}, got {block}")
    filled, arguments, _alive = _arguments(_dense(x), x.shape, block)
    cache._native.quantize_rows(cache.isa(), torch.get_num_threads(), *arguments)
    return filled.codes, filled.unit.view(rows)


@cache.untraced
def norm_quantize(x: Tensor, weight: Tensor, rule: NormRule, recipe: ActivationRecipe) -> tuple[Tensor, Int8Rows]:
    """Contract in `kernels.fused.norm_quantize`.

    Raises:
        ValueError: x is not float32, bfloat16 or float16, or see `kernels.fused.norm_refusal`.
    """
    if (why := norm_refusal(weight, _known(x).dtype)) is not None:
        raise ValueError(f"a norm that also quantizes: {why}")
    flat, weight, y = _dense(x), weight.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    rows, args, _alive = _arguments(flat, x.shape, hadamard_block(x.shape[-1]))
    more = weight.data_ptr(), y.data_ptr(), rule.eps, rule.shift, rule.once
    cache._native.norm_quantize(cache.isa(), torch.get_num_threads(), *args, *more)
    return y, rows


@cache.untraced
def gate_quantize(gate: Tensor, up: Tensor, activation: str, recipe: ActivationRecipe) -> Int8Rows:
    """Contract in `kernels.fused.gate_quantize`.

    Raises:
        ValueError: gate and up are not both float32, both bfloat16 or both float16.
    """
    if _known(gate).dtype != up.dtype:
        raise ValueError(f"gate and up must have one dtype, got {gate.dtype} and {up.dtype}")
    a, b = _dense(gate), _dense(up)
    if a.stride(0) != b.stride(0):
        a, b = a.contiguous(), b.contiguous()
    rows, args, _alive = _arguments(a, gate.shape, hadamard_block(gate.shape[-1]))
    cache._native.gate_quantize(cache.isa(), torch.get_num_threads(), *args, b.data_ptr(), NUMBERS[activation])
    return rows


def _known(x: Tensor) -> Tensor:
    if x.dtype not in cache.DTYPES:
        raise ValueError(f"rows must be float32, bfloat16 or float16, got {x.dtype}")
    return x


def _dense(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _arguments(x: Tensor, shape: torch.Size, block: int) -> tuple[Int8Rows, tuple[Any, ...], Any]:
    """Rows to be filled from x (M, K), the native call's addresses, sizes and norm, and what has to live through it."""
    m, k = x.shape
    sign = _signs(k)
    rows = Int8Rows(torch.empty(shape, dtype=torch.int8), torch.empty(*shape[:-1], 1))
    at = (x.data_ptr(), sign.data_ptr(), rows.codes.data_ptr(), rows.unit.data_ptr())
    return rows, (at, (m, k, x.stride(0), block, cache.DTYPES[x.dtype]), block**-0.5), (x, sign)
