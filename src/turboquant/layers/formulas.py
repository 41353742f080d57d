"""Which formula a norm or an MLP computes, found by trying: a copy of it with random weights must return the formula's
output bit for bit, else the module stays as it is."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.kernels.fused import ACTIVATIONS, NormRule, rms_norm
from turboquant.layers.fused import FusedNorm, GateRule


def bare(module: nn.Module) -> Any:
    """A copy of a module without its hooks, to be tried: nobody's hook shall see what it is tried with."""
    new = copy.copy(module)
    for name, value in module.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            new.__dict__[name] = type(value)()
    return new


@torch.no_grad()
def norm_rule(module: nn.Module) -> NormRule | str:
    """The formula of an RMSNorm, or why it is none of those known."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or len(module._parameters) != 1 or module._buffers:
        return f"{type(module).__name__} is no norm with a weight alone"
    if isinstance(module, FusedNorm):
        return module.rule
    eps = next((e for n in ("variance_epsilon", "eps") if isinstance(e := getattr(module, n, None), float)), None)
    if eps is None:
        return f"{type(module).__name__} has no eps that is known"
    draw = torch.Generator().manual_seed(0)
    probe = bare(module)
    w = (torch.rand(len(weight), generator=draw) + 0.5).to(weight.dtype)
    probe._parameters = {"weight": nn.Parameter(w, requires_grad=False)}
    x = torch.randn(4, len(weight), generator=draw) * torch.tensor([1.0, 30.0, 1e-3, 1e-5])[:, None]
    x = x.to(weight.dtype)
    try:
        want = probe(x)
    except Exception as e:
        return f"{type(module).__name__} cannot be tried ({type(e).__name__})"
    for rule in (NormRule(eps), NormRule(eps, 1.0, True), NormRule(eps, 0.0, True)):
        got = rms_norm(x, w, rule)
        if isinstance(want, Tensor) and want.dtype == got.dtype and torch.equal(got, want):
            return rule
    return f"{type(module).__name__} computes none of the formulas known"


@torch.no_grad()
def gate_rule(module: nn.Module) -> GateRule | str:
    """The formula of an MLP, or why it is not known."""
    kind, have = type(module).__name__, set(module._modules)
    joint = "gate_up_proj" in have
    linear = {"gate_up_proj", "down_proj"} if joint else {"gate_proj", "up_proj", "down_proj"}
    act = next((a for n in ("act_fn", "activation_fn") if callable(a := getattr(module, n, None))), None)
    if not linear <= have or act is None or module._parameters or module._buffers:
        return f"{kind} is no MLP of {', '.join(sorted(linear))} and an activation alone"
    draw = torch.Generator().manual_seed(0)
    parts: dict[str, nn.Module] = {}
    for name in sorted(linear):
        n, k = (32, 16) if name == "gate_up_proj" else (16, 16)
        parts[name] = nn.Linear(k, n, bias=False)
        parts[name].weight.data = torch.randn(n, k, generator=draw)
    probe = bare(module)
    probe._modules = {n: parts.get(n) or (m and bare(m)) for n, m in module._modules.items()}
    x = torch.randn(9, 16, generator=draw)
    try:
        want = probe(x)
    except Exception as e:
        return f"{kind} cannot be tried ({type(e).__name__})"
    gate, up = parts["gate_up_proj"](x).chunk(2, -1) if joint else (parts["gate_proj"](x), parts["up_proj"](x))
    for name, activation in ACTIVATIONS.items():
        got = parts["down_proj"](activation(gate) * up)
        if isinstance(want, Tensor) and torch.equal(got, want):
            return GateRule(name, joint)
    return f"{kind} computes no formula known (activations: {', '.join(ACTIVATIONS)})"
