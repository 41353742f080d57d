"""Linear layers on the CPU: products with packed weights by auto-round-lib (`pip install auto-round-lib`).

The library multiplies float rows with 4- or 8-bit weights, in int8 where the processor and its own choice allow and in
fp32 otherwise. It is handed what the quantized rows stand for, so results are the reference's up to the order of sums
(and up to the library's own int8 rounding of groups of rows, where it uses it). It takes fp32 rows only: others corrupt
its memory. The rotation and rounding of rows is done by
`quantize_rows` of the native module where it is built.
"""

import importlib.util
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels import linear as reference
from turboquant.kernels.cpu import cache
from turboquant.kernels.linear import Hot, LinearSpec, LinearState
from turboquant.maths.activations import Int4Rows, Int8Rows
from turboquant.maths.rotation import hadamard_block
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe

PACKAGE = "auto_round_kernel"


@lru_cache(maxsize=1)
def _quantize_rows() -> Any:
    """The native module's fused rotation and rounding, (x (M, K), block) -> (int8 codes (M, K), fp32 units (M,));
    None without it."""
    try:
        module: Any = import_module("turboquant.kernels.cpu.rows")
    except ImportError:
        return None
    return module.quantize_rows if cache._native is not None else None


def supports(op: str, spec: Any, device: torch.device) -> str | None:
    """None if the op can run, else why not."""
    if device.type != "cpu":
        return f"cpu: tensors are on {device.type}"
    if op != "linear":
        if not _quantize_rows():
            return "cpu: the native module has no quantize_rows"
        inputs, bits = getattr(spec, "inputs", 16), getattr(spec, "activation_bits", 8)
        if inputs % 16 or bits != 8:
            return f"cpu: quantizes to 8 bit and in sixteens, not {inputs} inputs to {bits} bit"
        return cache.supports(op, None, device)
    if importlib.util.find_spec(PACKAGE) is None:
        return "cpu: auto-round-lib is not installed (pip install 'turboquant[cpu]')"
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13):
        return f"cpu: auto-round-lib needs torch 2.13 or newer, this is {torch.__version__}"
    if not isinstance(spec, LinearSpec):
        return None
    if not spec.stages:
        return "cpu: the weight is not packed"
    if spec.group % 16 or spec.inputs % 16 or spec.outputs % 16:
        return f"cpu: a weight of {spec.outputs}x{spec.inputs} in groups of {spec.group} is not made of sixteens"
    return None


def quantize(x: Tensor, recipe: ActivationRecipe, hot: Hot | None = None) -> Int8Rows | Int4Rows:
    """Contract in `kernels.linear.quantize`."""
    native, k = _quantize_rows(), x.shape[-1]
    if recipe.bits == 8 and native is not None and k % 16 == 0 and x.dtype in reference.FLOATS:
        codes, unit = native(x.reshape(-1, k), hadamard_block(k))
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
    x: Tensor, weight: PackedTensor, bias: Tensor | None, recipe: ActivationRecipe | None, state: LinearState
) -> Tensor:
    """Contract in `kernels.linear.linear`; the weight must be packed."""
    ark: Any = import_module(PACKAGE)
    if "cpu" not in state.prepared:
        state.prepared["cpu"] = _prepare(weight)
    blob, kind = state.prepared["cpu"]
    n, k = weight.shape
    extra = None
    if recipe is None:
        rows = x.float()
    else:
        make = lambda: quantize(x, recipe, state.hot)  # noqa: E731
        q = state.shared.take(x, recipe, make) if state.shared and recipe.bits == 8 else make()
        rows = (q.codes if isinstance(q, Int8Rows) else q.int8()).float() * q.unit
        if isinstance(q, Int4Rows) and state.hot is not None and state.hot.weight is not None:
            extra = (q.hot.float() * q.hot_unit) @ state.hot.weight.T
    flat = rows.reshape(-1, k).contiguous()
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], n)
    y = ark.woqgemm(flat, blob, torch.empty(0), n, k, weight.group, "int8", kind, "fp32", True).view(*x.shape[:-1], n)
    y = y if extra is None else y + extra
    return (y if bias is None else y + bias.float()).to(x.dtype)
