"""Ops that quantize what a norm or an activation returns in the same pass, and their reference in plain torch.

A backend that has them saves a launch and a reading of the rows; where none has, layers call norm, activation and
`quantize` one after another. Both compute the same numbers up to the order of sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant.kernels.linear import quantize
from turboquant.maths.activations import Int8Rows
from turboquant.recipe import ActivationRecipe

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


NUMBERS = {name: i for i, name in enumerate(ACTIVATIONS)}  # as the sources of the kernels number them


@dataclass(frozen=True)
class NormRule:
    """How a norm computes x / sqrt(mean(x²) + eps) · (weight + shift).

    Attributes:
        once: rounded to x's dtype once, at the end (Gemma); else before the product with the weight too (Llama).
    """

    eps: float
    shift: float = 0.0
    once: bool = False


def norm_refusal(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why no kernel computes a norm of x in a dtype together with its rows; None if one may.

    Of two dtypes torch's promotion makes the output's, and of x's rows nothing would fit it. The model's own operations
    run then, and the layers that read their output quantize it.
    """
    return None if weight.dtype == dtype else f"its weight is {weight.dtype}, not {dtype}"


def rms_norm(x: Tensor, weight: Tensor, rule: NormRule) -> Tensor:
    """(..., K) of any float dtype, weight (K,) -> (..., K) in x's dtype, operation by operation as transformers' norms
    compute it."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + rule.eps)
    if rule.once:
        return (y * (rule.shift + weight.float())).to(x.dtype)
    return (weight if rule.shift == 0 else weight + rule.shift) * y.to(x.dtype)


def norm_quantize(x: Tensor, weight: Tensor, rule: NormRule, recipe: ActivationRecipe) -> tuple[Tensor, Int8Rows]:
    """The norm's output (..., K) in x's dtype, and its rotated int8 rows; recipe is one of 8 bit."""
    y = rms_norm(x, weight, rule)
    rows = quantize(y, recipe)
    assert isinstance(rows, Int8Rows)
    return y, rows


def add_norm_quantize(
    x: Tensor, y: Tensor, weight: Tensor, rule: NormRule, recipe: ActivationRecipe
) -> tuple[Tensor, Tensor, Int8Rows]:
    """x + y, both (..., K) of one float dtype; and of this `norm_quantize`."""
    total = x + y
    return total, *norm_quantize(total, weight, rule, recipe)


def gate_quantize(gate: Tensor, up: Tensor, activation: str, recipe: ActivationRecipe) -> Int8Rows:
    """Rotated int8 rows of activation(gate)·up; both (..., K) of one float dtype, activation one of ACTIVATIONS."""
    rows = quantize(ACTIVATIONS[activation](gate) * up, recipe)
    assert isinstance(rows, Int8Rows)
    return rows
