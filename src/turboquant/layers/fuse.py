"""Puts the modules of `fused` around quantized layers with 8-bit inputs, says which kernels run them, and takes them
out again."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from turboquant.kernels import ops
from turboquant.kernels.fused import norm_refusal
from turboquant.layers.formulas import gate_rule, norm_rule
from turboquant.layers.fused import Decoder, DenseHead, FusedMLP, FusedNorm, changed, reads_int8
from turboquant.layers.linear import QuantLinear
from turboquant.layers.together import Together

NORM_BEFORE = {  # which norm of the block scales the input of which layer
    "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
    "qkv_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm",
    "gate_up_proj": "post_attention_layernorm",
}  # fmt: skip


def norm_before(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """(name, module) of the norm whose output the linear layer `name` reads, None if there is none known."""
    parent, _, last = name.rpartition(".")
    norm = NORM_BEFORE.get(last)
    block = parent.rpartition(".")[0]
    try:
        module = model.get_submodule(block)
    except AttributeError:
        return None
    if norm == "post_attention_layernorm":
        if hasattr(module, "pre_feedforward_layernorm"):
            norm = "pre_feedforward_layernorm"  # Gemma's block has a norm on either side of each part
        elif hasattr(module, "post_feedforward_layernorm"):
            return None  # OLMo 2's has them behind each part alone
    found = getattr(module, norm, None) if norm is not None else None
    return (f"{block}.{norm}" if block else str(norm), found) if isinstance(found, nn.Module) else None


def _readers(model: nn.Module) -> dict[str, tuple[Any, list[QuantLinear]]]:
    """Name of a norm -> the norm and the quantized layers that read it: q, k and v, gate and up."""
    norms: dict[str, tuple[Any, list[QuantLinear]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and reads_int8(layer) and (found := norm_before(model, name)):
            norms.setdefault(found[0], (found[1], []))[1].append(layer)
    return norms


def _put_together(model: nn.Module) -> None:
    for _, layers in _readers(model).values():
        some = [m for m in layers if m.recipe.weights is not None and m.in_features == layers[0].in_features]
        if len(some) > 1:
            together = Together(some)
            for m in some:
                m.together = together


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any, str, QuantLinear, Any]]:
    """(name, module, op, the layer that reads its output, rule or why it has none) of norms and MLPs as they were."""
    for name, (norm, (layer, *_)) in _readers(model).items():
        if not isinstance(norm, FusedNorm):
            narrow = None if norm.weight.shape == (layer.in_features,) else "its width is another"
            yield name, norm, "norm_quantize", layer, changed(norm) or narrow or norm_rule(norm)
    for name, mlp in list(model.named_modules()):
        down: Any = getattr(mlp, "down_proj", None)
        if not isinstance(mlp, FusedMLP) and reads_int8(down):
            yield name, mlp, "gate_quantize", down, changed(mlp) or gate_rule(mlp)


def fuse(model: nn.Module, head: nn.Module | None = None) -> list[dict[str, Any]]:
    """Put fused modules in place of norms and MLPs around quantized layers with 8-bit inputs, and let layers that read
    one input run together.

    Args:
        head: the output embeddings, which get a product of their own where they stay as they are.

    Returns:
        one row for each norm and MLP that was looked at: {"name", "op", "fused", "why"}.
    """
    rows = []
    for name, module in list(model.named_modules()):
        if module is head and type(module) is nn.Linear and not changed(module):
            _put(model, name, DenseHead(module))
    _put_together(model)
    for name, module, op, layer, rule in list(_candidates(model)):
        known = not isinstance(rule, str)
        if known:
            _put(model, name, FusedNorm(module, rule, layer) if op == "norm_quantize" else FusedMLP(module, rule))
        rows.append({"name": name, "op": op, "fused": known, "why": str(rule) if known else f"as it is: {rule}"})
    return rows


def explain_fused(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> list[dict[str, str]]:
    """Which norms and MLPs of a quantized model quantize what they return in one pass with inputs of a dtype.

    Returns:
        rows {"name", "op", "kernel" ("none" where two run one after another), "why"}.
    """
    rows = [{"name": name, "op": op, "kernel": "none", "why": f"{rule}"} for name, _, op, _, rule in _candidates(model)]
    for name, module in model.named_modules():
        if isinstance(module, DenseHead):
            kernel, why = ops.explain_dense(module.weight)
            rows.append({"name": name, "op": "dense", "kernel": kernel, "why": why})
            continue
        if isinstance(module, FusedNorm):
            op, slot = "norm_quantize", module.slot
        elif isinstance(module, FusedMLP) and reads_int8(module.down_proj):
            op, slot = "gate_quantize", module.down_proj.slot
        else:
            continue
        whole = module.kernel(dtype, torch.device(device)) if isinstance(module, FusedMLP) else None
        run = whole or ops.fused(op, slot.spec(dtype), torch.device(device))
        kernel = "none" if run is None else run.__module__.removeprefix("turboquant.kernels.").split(".")[0]
        why = next(r["why"] for r in ops.explain_linear(slot.spec(dtype), device) if r["op"] == op)
        if whole is not None:
            op, why = "mlp", "all of it in one call"
        elif op == "norm_quantize" and (refusal := norm_refusal(module.weight, dtype)) is not None:
            kernel, why = "none", refusal
        rows.append({"name": name, "op": op, "kernel": kernel, "why": why})
    return rows


def unfuse(model: nn.Module) -> None:
    """Put the model's own norms, MLPs and decoder layers back, with the parameters and children that their stand-ins
    have now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            module.together = None
        if isinstance(module, FusedNorm):
            module.own[0].weight = module.weight
        elif isinstance(module, FusedMLP):
            module.own[0]._modules.update(module._modules)
        elif isinstance(module, DenseHead):
            module.own[0]._parameters.update(module._parameters)
        elif not isinstance(module, Decoder):
            continue
        own = module.own[0]
        own.training = module.training
        _put(model, name, own)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
