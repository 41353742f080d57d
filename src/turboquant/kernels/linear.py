"""What the linear ops exchange, and their reference in plain torch: the oracle that every other backend meets."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant.maths import rotation
from turboquant.maths.activations import Int4Rows, Int8Rows, decode_int4, decode_int8, encode_int4, encode_int8
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW = 16  # rows up to which `cuda` has a product of its own, which a quantizer before it lets in early


@dataclass(frozen=True)
class LinearSpec:
    """What a backend needs to know to say whether it can run a layer.

    Attributes:
        inputs, outputs: K and N.
        stages, group: of the packed weight; stages 0 where the weight is not packed.
        activation_bits: 4, 8, or 16 for inputs that stay as they are.
        dtype: of the input and the output.
    """

    inputs: int
    outputs: int
    stages: int
    group: int
    activation_bits: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Coded:
    """An input of a linear layer that exists as its quantized rows alone.

    Attributes:
        rows: the codes. dtype: that of the input they stand for, and of the output.
    """

    rows: Int8Rows
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(..., K)."""
        return self.rows.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.rows.codes.device


@dataclass
class Hot:
    """The hot channels of a layer's input at 4 bit.

    Attributes:
        index: (h,) int64; sigma: (h,) fp32.
        weight: (..., N, h) fp32, the weight's columns of these channels times sigma, in the basis of the input; None
            where the layer's weight is not packed.
    """

    index: Tensor
    sigma: Tensor
    weight: Tensor | None = None


class Shared:
    """Remembers the last quantized input, so that layers that read the same tensor (q, k, v) quantize it once."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None  # of what, its version, key, rows: one value, for threads share it

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}  # a copy starts empty

    def take(self, x: Tensor, key: Any, make: Callable[[], Any]) -> Any:
        """make(), or what it gave last time if x is that very tensor, unchanged, and key is equal."""
        if torch.compiler.is_compiling() or x.is_inference():
            return make()
        rows = self.made(x, key)
        if rows is None:
            rows = make()
            self.put(x, key, rows)
        return rows

    def made(self, x: Tensor, key: Any) -> Any:
        """What was put for x, if x is that very tensor, unchanged, and key is equal; else None."""
        last = self._last
        if last is None or torch.compiler.is_compiling() or x.is_inference():
            return None
        of, version, old, rows = last
        return rows if of() is x and version == x._version and old == key else None

    def put(self, x: Tensor, key: Any, rows: Any) -> None:
        """Let `take` find rows for x; not for tensors of inference mode, whose changes are not counted."""
        self._last = weakref.ref(x, self._forget), x._version, key, rows

    def _forget(self, ref: Any) -> None:
        last = self._last
        if last is not None and last[0] is ref:
            self._last = None


@dataclass
class LinearState:
    """What one layer keeps beside its weight: hot channels, sharing, what backends prepared for it."""

    hot: Hot | None = None
    shared: Shared | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Tensor] | None = None  # the op of the backend that ran last
    backend: str = ""  # its name
    number: int = -1  # and what `cuda` keeps for its operator
    recipe: ActivationRecipe | None = None


def rows_of(
    x: Tensor | Coded, recipe: ActivationRecipe, state: LinearState, make: Callable[..., Any]
) -> Int8Rows | Int4Rows:
    """The quantized rows of a layer's input: those that it is, those that were made of it before, or make(x, recipe,
    state.hot)."""
    if isinstance(x, Coded):
        return x.rows
    new = lambda: make(x, recipe, state.hot)  # noqa: E731
    return state.shared.take(x, recipe, new) if state.shared and recipe.bits == 8 else new()


def rotate(x: Tensor) -> Tensor:
    """signs ∘ block Walsh-Hadamard of the last dimension, in x's dtype."""
    return rotation.rotate(x)


def quantize(x: Tensor, recipe: ActivationRecipe, hot: Hot | None = None) -> Int8Rows | Int4Rows:
    """(..., K) of any float dtype -> its codes, each row by itself."""
    if recipe.bits == 8:
        return encode_int8(x)
    index = hot.index if hot else torch.empty(0, dtype=torch.int64, device=x.device)
    sigma = hot.sigma if hot else torch.empty(0, device=x.device)
    return encode_int4(x, recipe.group_of(x.shape[-1]), index, sigma)


def dequantize(rows: Int8Rows | Int4Rows, hot: Hot | None = None) -> Tensor:
    """(..., K) fp32 in the basis of the input."""
    if isinstance(rows, Int8Rows):
        return decode_int8(rows)
    none = torch.empty(0, dtype=torch.int64, device=rows.codes.device)
    return decode_int4(rows, hot.index if hot else none, hot.sigma if hot else none.float())


def linear(
    x: Tensor | Coded,
    weight: PackedTensor | Tensor,
    bias: Tensor | None,
    recipe: ActivationRecipe | None,
    state: LinearState,
) -> Tensor:
    """x·Wᵀ + bias with quantized operands.

    Args:
        x: (..., K) of any float dtype; `Coded` only with a recipe of 8 bit.
        weight: packed (N, K), in the rotated basis if there is a recipe; or a float tensor (N, K), as it was.
        bias: (N,) or None.
        recipe: of the activations; None leaves x as it is.

    Returns:
        (..., N) in x's dtype, computed in fp32 where the weight is packed.
    """
    if recipe is None:
        assert isinstance(x, Tensor)
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        y = F.linear(x.float(), weight.dequantize())
    else:
        rows = rows_of(x, recipe, state, quantize)
        if isinstance(weight, Tensor):
            return F.linear(dequantize(rows, state.hot).to(x.dtype), weight, bias)
        codes = rows.codes if isinstance(rows, Int8Rows) else rows.int8()
        y = F.linear(codes.float(), weight.dequantize()) * rows.unit
        if isinstance(rows, Int4Rows) and state.hot is not None and state.hot.weight is not None:
            y = y + F.linear(rows.hot.float() * rows.hot_unit, state.hot.weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)
