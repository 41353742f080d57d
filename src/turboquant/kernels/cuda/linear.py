"""Linear layers on CUDA: int8 rows times packed 4-bit weights by humming-kernels (`pip install 'turboquant[cuda]'`),
and by a kernel of our own where rows are few (`product`), on the same bytes.

A weight of two stages is two products, W = s·(c₁ - z) + s/16·(c₂ - 8): both are 4-bit weights to the kernel, and the
bytes read are those of one 8-bit weight. Scales become 16-bit floats of the model's dtype, as the kernel takes them.
Rows are quantized by the `quantize` op; an input that stays in 16 bit goes to the same kernel unquantized. Its kernels
are compiled when a shape first comes; it chooses among them by the number of rows.
"""

import importlib.util
import itertools
import warnings
import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turboquant.kernels import ops
from turboquant.kernels.cuda import product
from turboquant.kernels.linear import FEW, Coded, LinearSpec, LinearState, rows_of
from turboquant.maths.activations import Int4Rows, Int8Rows
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe

PACKAGE = "humming"


def supports(op: str, spec: Any, device: torch.device) -> str | None:
    """None if the op can run, else why not."""
    if op != "linear":
        return f"cuda has no {op}"
    if importlib.util.find_spec(PACKAGE) is None:
        return "cuda: humming-kernels is not installed (pip install 'turboquant[cuda]')"
    if torch.cuda.get_device_capability(device) < (7, 5):
        return "cuda: humming-kernels needs compute capability 7.5 or newer"
    if isinstance(spec, LinearSpec):
        if not spec.stages:
            return "cuda: the weight is not packed"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"cuda: the model computes in {str(spec.dtype).removeprefix('torch.')}, the kernel in 16 bit"
        if spec.inputs % 128 or spec.outputs % 128:
            return f"cuda: a weight of {spec.outputs}x{spec.inputs} is not made of tiles of 128"
        if spec.group != spec.inputs and spec.group not in (32, 64, 128):
            return f"cuda: groups of {spec.group}, the kernel has 32, 64, 128 and whole rows"
    return None


def _layer(codes: Tensor, scale: Tensor, zero: Tensor | None, group: int, bits: int, dtype: torch.dtype) -> Any:
    """humming's layer for one stage: codes (N, K) below 16, scale (N, G), whole zeros (N, G) or None for 8."""
    from humming import ops as humming
    from humming.layer import HummingLayer

    n, k = codes.shape
    word = "bfloat16" if dtype == torch.bfloat16 else "float16"
    weight = {"dtype": "uint4", "group_size": 0 if group == k else group, "has_zero_point": zero is not None}
    inputs = (
        {"dtype": "int8", "quant_mode": "dynamic_token", "scale_dtype": "float32"} if bits < 16 else {"dtype": word}
    )
    with torch.cuda.device(codes.device):
        layer = HummingLayer(n, k, weight | {"scale_dtype": word}, inputs, torch_dtype=dtype).to(codes.device)
        tensors = {"weight": humming.pack_weight(codes.int().contiguous(), 4), "weight_scale": scale.to(dtype)}
        if zero is not None:
            tensors["zero_point"] = humming.pack_weight(zero.int().T.contiguous(), 4).T.contiguous()
        layer.load_from_tensors(tensors)
        layer.transform()
    return layer


class Prepared(NamedTuple):
    """A weight for one dtype.

    Attributes:
        layers: one of humming a stage. few: rows up to which `product` runs on the first one's weight.
    """

    layers: list[Any]
    few: int


def prepare(weight: PackedTensor, bits: int, dtype: torch.dtype) -> Prepared:
    """For inputs of `bits` (8 for int8 rows, 16 for rows of `dtype`)."""
    coded, scale, few = weight.coded(), weight.scale.float(), 0
    (n, k), device = weight.shape, weight.scale.device
    own = bits == 8 and product.refusal(n, k, weight.group, weight.stages, device) is None
    zeros = [coded.zero, torch.full_like(coded.zero, 8) if own else None]  # without zeros humming orders otherwise
    layers = [_layer(coded.codes[i], scale / 16**i, zeros[i], weight.group, bits, dtype) for i in range(weight.stages)]
    if own:
        want = [product.fragments(c, weight.group) for c in coded.codes]
        if all(torch.equal(a.weight.view(torch.uint8).flatten(), b) for a, b in zip(layers, want, strict=True)):
            few = product.most_rows(n, k, weight.group, weight.stages, device, FEW)
            torch.cuda.current_stream(device).synchronize()  # `product` reads it before it waits
        else:
            warnings.warn("this humming-kernels orders weights otherwise: it runs few rows too", stacklevel=2)
    return Prepared(layers, few)


def note(spec: LinearSpec, device: torch.device) -> str:
    """Which kernel runs, by the number of rows, for `explain`; how humming orders bytes, only `prepare` sees."""
    why, shape = "for int8 rows", (spec.outputs, spec.inputs, spec.group, spec.stages)
    if spec.activation_bits < 16:
        why = product.refusal(*shape, device) or ""
    if why:
        return f"humming-kernels; csrc/product.cu is {why}"
    few = product.most_rows(*shape, device, FEW)
    return (
        f"csrc/product.cu up to {few} rows, if humming-kernels orders weights as it reads them (else preparing one "
        "warns, and humming-kernels runs these too); humming-kernels beyond"
    )


def multiply(
    ready: Prepared, weight: PackedTensor, rows: Tensor, unit: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """(M, K) int8 with (M, 1) units, or 16-bit rows with None -> (M, N) in the dtype that was prepared for."""
    first, dtype = ready.layers[0], ready.layers[0].torch_dtype
    if unit is not None and len(rows) <= ready.few:
        bias = None if bias is None else bias.to(dtype)
        second = ready.layers[1].weight if len(ready.layers) > 1 else None
        return product.multiply(first.weight, second, weight.scale, weight.zero, rows, unit, bias, dtype)
    # Rows that arrive with their scale are taken as quantized.
    given: dict[str, Tensor] = {} if unit is None else {"input_scale": unit}
    y = first(rows, **given)
    for layer in ready.layers[1:]:
        y = y + layer(rows, **given)
    return y if bias is None else (y + bias).to(dtype)


def linear(
    x: Tensor | Coded, weight: PackedTensor, bias: Tensor | None, recipe: ActivationRecipe | None, state: LinearState
) -> Tensor:
    """Contract in `kernels.linear.linear`; sums run in another order and outputs are rounded to 16 bit.

    Compiled it is one operator, into which torch.compile does not look.
    """
    if torch.compiler.is_compiling():
        n = weight.shape[0]
        out: Tensor = torch.ops.turboquant.cuda_linear(x, weight.scale, weight.zero, bias, state.number, n)
        return out
    if _called.get(state.number) is not state:  # its first call, or a copy's
        state.number = next(_numbers)
        _called[state.number] = state
    state.recipe, key = recipe, f"cuda {x.dtype}"
    if key not in state.prepared:
        state.prepared[key] = prepare(weight, 16 if recipe is None else 8, x.dtype)
    return _linear(x, state.prepared[key], weight, weight.shape[0], bias, state)


def _linear(
    x: Tensor | Coded, ready: Prepared, weight: PackedTensor, n: int, bias: Tensor | None, state: LinearState
) -> Tensor:
    k = x.shape[-1]
    if 0 in x.shape:
        return torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if state.recipe is None:
        assert isinstance(x, Tensor)
        return multiply(ready, weight, x.reshape(-1, k).contiguous(), None, bias).view(*x.shape[:-1], n)
    spec = LinearSpec(k, n, len(ready.layers), k, state.recipe.bits, x.dtype)
    with ops.use_backend("auto"):  # `cuda` quantizes not all that it multiplies
        rows = rows_of(x, state.recipe, state, partial(ops.quantize, spec=spec))
    codes = rows.codes if isinstance(rows, Int8Rows) else rows.int8()
    y = multiply(ready, weight, codes.reshape(-1, k).contiguous(), rows.unit.reshape(-1, 1).contiguous(), bias)
    if isinstance(rows, Int4Rows) and state.hot is not None and state.hot.weight is not None:
        hot = (rows.hot.float() * rows.hot_unit).reshape(len(y), -1)
        y = y + (hot @ state.hot.weight.T).to(y.dtype)
    return y.view(*x.shape[:-1], n)


# States by the number that a compiled graph holds: operators of torch take tensors and numbers.
_called: "weakref.WeakValueDictionary[int, LinearState]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("turboquant::cuda_linear", mutates_args=())
def _operator(x: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, number: int, outputs: int) -> Tensor:
    state = _called.get(number)
    ready = None if state is None else state.prepared.get(f"cuda {x.dtype}")
    if state is None or ready is None:
        raise ops.BackendError(f"call the model once with inputs in {x.dtype} before it is compiled")
    weight = PackedTensor(scale.new_empty(0, dtype=torch.uint8), scale, zero)  # codes are prepared
    return _linear(x, ready, weight, outputs, bias, state)


@_operator.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, number: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
