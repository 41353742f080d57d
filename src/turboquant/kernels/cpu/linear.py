"""Linear layers on the CPU: rotation and rounding of rows and their product with packed weights in C++ (`rows`,
`product`); rows that stay as they are by auto-round-lib (`pip install auto-round-lib`).

That library multiplies float rows with 4- or 8-bit weights. It takes fp32 rows only (others corrupt its memory), and
holds a copy of the weight in a layout of its own.
"""

import importlib.util
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels import linear as reference
from turboquant.kernels.cpu import cache, head, product, rows
from turboquant.kernels.linear import Coded, Hot, LinearSpec, LinearState
from turboquant.maths.activations import Int4Rows, Int8Rows
from turboquant.maths.rotation import hadamard_block
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe

PACKAGE = "auto_round_kernel"


def supports(op: str, spec: Any, device: torch.device) -> str | None:
    """None if the op can run, else why not."""
    if device.type != "cpu":
        return f"cpu: tensors are on {device.type}"
    if op == "dense":
        return cache.supports(op, None, device) or head.refusal(spec)
    if op in ("quantize", "norm_quantize", "gate_quantize", "rotate"):
        inputs, bits = getattr(spec, "inputs", 16), getattr(spec, "activation_bits", 8)
        if inputs % 16 or bits != 8:
            return f"cpu: quantizes to 8 bit and in sixteens, not {inputs} inputs to {bits} bit"
        return cache.supports(op, None, device)
    if op in ("mlp", "decoder_step") and spec is not None and spec.inputs % 16:
        return f"cpu: the rows of such a call are rounded in sixteens, not {spec.inputs} inputs"
    if isinstance(spec, LinearSpec) and not spec.stages:
        return "cpu: the weight is not packed"
    if isinstance(spec, LinearSpec) and spec.activation_bits != 16:
        return cache.supports(op, None, device) or product.refusal(spec.inputs, spec.group, spec.dtype)
    return _float_rows_refusal(spec)


def _float_rows_refusal(spec: Any) -> str | None:
    if importlib.util.find_spec(PACKAGE) is None:
        return "cpu: auto-round-lib is not installed (pip install 'turboquant[cpu]'), which serves rows of 16 bit"
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13):
        return f"cpu: auto-round-lib needs torch 2.13 or newer, this is {torch.__version__}"
    if isinstance(spec, LinearSpec) and (spec.group % 16 or spec.inputs % 16 or spec.outputs % 16):
        return f"cpu: a weight of {spec.outputs}x{spec.inputs} in groups of {spec.group} is not made of sixteens"
    return None


def quantize(x: Tensor, recipe: ActivationRecipe, hot: Hot | None = None) -> Int8Rows | Int4Rows:
    """Contract in `kernels.linear.quantize`."""
    k = x.shape[-1]
    if recipe.bits == 8 and cache._native is not None and k % 16 == 0 and x.dtype in reference.FLOATS:
        codes, unit = rows.quantize_rows(x.reshape(-1, k), hadamard_block(k))
        return Int8Rows(codes.view(x.shape), unit.view(*x.shape[:-1], 1))
    return reference.quantize(x, recipe, hot)


def _prepare(weight: PackedTensor) -> tuple[Tensor, str]:
    """The library's own layout of a weight."""
    ark: Any = import_module(PACKAGE)
    coded = weight.coded()
    codes, zero, scale = coded.codes.to(torch.int16), coded.zero.to(torch.int16), coded.scale.float()
    kind, codes, zero = "int4", codes[0] - 8 if weight.stages == 1 else 16 * codes[0] + codes[1] - 128, zero - 8
    if weight.stages == 2:
        kind, zero, scale = "int8", 16 * (zero + 8) + 8 - 128, scale / 16
    turn = lambda t: t.T.contiguous()  # noqa: E731 - the library wants (K, N)
    blob = ark.repack_quantized_weight(
        turn(codes.to(torch.int8)), turn(scale), turn(zero.to(torch.int8)), weight.group, "int8", kind, "fp32", True
    )
    return blob, kind


def linear(
    x: Tensor | Coded,
    weight: PackedTensor,
    bias: Tensor | None,
    recipe: ActivationRecipe | None,
    state: LinearState,
) -> Tensor:
    """Contract in `kernels.linear.linear`; the weight must be packed."""
    if recipe is None:
        assert isinstance(x, Tensor)
        return _float_rows(x, weight, bias, state)
    if recipe.bits == 8:
        return linears(x, [(weight, bias)], recipe, state)[0]
    assert isinstance(x, Tensor)
    q = reference.rows_of(x, recipe, state, quantize)
    assert isinstance(q, Int4Rows)
    packed = _packed(state, "cpu", [(weight, None)])
    y = product.multiply(packed, Int8Rows(q.int8(), q.unit), torch.float32)[0]
    if state.hot is not None and state.hot.weight is not None:
        y += (q.hot.float() * q.hot_unit) @ state.hot.weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linears(
    x: Tensor | Coded, pairs: Sequence[product.Pair], recipe: ActivationRecipe, state: LinearState
) -> list[Tensor]:
    """`linear` of one input for several packed weights and their biases, all of K inputs of 8 bit, in one call.

    Args:
        x: (..., K) float32, bfloat16 or float16, or int8 rows that stand for such.
        pairs: weights (N, K), N their own, and their biases (N,) of any of these dtypes.
        recipe: of 8 bit. state: that of one of the layers; keeps what is prepared for all.

    Returns:
        (..., N) of each in x's dtype, with the bits of `linear` of that weight alone.

    Raises:
        ValueError: as of `product.Packed`; the weights differ in K.
    """
    packed = _packed(state, "cpu" if len(pairs) == 1 else "cpu together", pairs)
    return product.multiply(packed, _rows(x, packed, recipe, state), x.dtype)


def mlp(
    x: Tensor,
    wide: Sequence[product.Pair],
    down: product.Pair,
    activation: str,
    recipe: ActivationRecipe,
    state: LinearState,
) -> Tensor:
    """down(activation(gate)·up) of one input in one call; every layer packed, with inputs of 8 bit.

    Args:
        x: (..., K) float32, bfloat16 or float16.
        wide: gate and up (J, K), or both in one weight (2·J, K); down: (N, J), J a multiple of 16. Each with its bias.
        activation: one of `fused.ACTIVATIONS`.
        recipe: of 8 bit. state: of the layer down.

    Returns:
        (..., N) in x's dtype; each step is rounded to it, as modules round that run one after another.

    Raises:
        ValueError: as of `product.Packed`; gate and up differ in K, or have not the width of down.
        KeyError: an activation that is not known.
    """
    packed = _packed(state, "cpu wide", wide)
    return product.mlp(packed, _packed(state, "cpu", [down]), _rows(x, packed, recipe, state), activation, x.dtype)


def _packed(state: LinearState, name: str, pairs: Sequence[product.Pair]) -> product.Packed:
    packed = state.prepared.get(name)
    if packed is None or packed.key != product.key_of(pairs):
        packed = state.prepared[name] = product.Packed(*pairs)
    return packed


def _rows(x: Tensor | Coded, packed: product.Packed, recipe: ActivationRecipe, state: LinearState) -> Tensor | Int8Rows:
    """int8 rows of x: those there are already; x itself where rounding it within the product costs less than sharing
    its rows, that is, few rows."""
    if isinstance(x, Tensor):
        made = state.shared.made(x, recipe) if state.shared is not None else None
        if made is not None:
            return made
        if x.numel() <= product.AT_ONCE * x.shape[-1] and product.fits(x, packed):
            return x
    rows = reference.rows_of(x, recipe, state, quantize)
    assert isinstance(rows, Int8Rows)
    return rows


def _float_rows(x: Tensor, weight: PackedTensor, bias: Tensor | None, state: LinearState) -> Tensor:
    ark: Any = import_module(PACKAGE)
    if "auto-round" not in state.prepared:
        state.prepared["auto-round"] = _prepare(weight)
    blob, kind = state.prepared["auto-round"]
    n, k = weight.shape
    flat = x.float().reshape(-1, k).contiguous()
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], n)
    y = ark.woqgemm(flat, blob, torch.empty(0), n, k, weight.group, "int8", kind, "fp32", True).view(*x.shape[:-1], n)
    return (y if bias is None else y + bias.float()).to(x.dtype)
