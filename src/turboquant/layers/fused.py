"""Norms and MLPs whose output a quantized layer reads: modules that let one kernel do norm or activation, rotation and
rounding. And output embeddings that stay as they are, whose product torch computes slowly for one row.

They stand where the model's own modules stood, with the same parameters and children under the same names. A norm
still returns its output in the model's dtype, for adapters, routers and other readers; the rows go along, to be found
by the layers that read that very tensor. Which formula a module computes is found by trying: a copy of it with random
weights must return the formula's output bit for bit, else the module stays as it is. Where no kernel can fuse (another
device, gradients, a compiled or a forced backend) the formula runs, that is, what ran before.
"""

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.kernels import ops
from turboquant.kernels.fused import ACTIVATIONS, NormRule, norm_refusal, rms_norm
from turboquant.kernels.linear import Coded
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


def _changed(module: nn.Module) -> str | None:
    """What somebody has hung on a module that a module in its place would not do."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__:
        return "it has hooks"
    return None


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


@dataclass(frozen=True)
class GateRule:
    """down(activation(gate(x))·up(x)); joint: gate and up are the halves of one product."""

    activation: str
    joint: bool


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


def _reads_int8(layer: Any) -> bool:
    """Whether a module is a quantized layer, and nothing else, that takes rows made for it."""
    if not isinstance(layer, QuantLinear) or _changed(layer):
        return False
    a = layer.recipe.activations
    return a is not None and a.bits == 8


class Ahead:
    """The norm of a sum that was made together with it: for one call with that very tensor, if neither was written to
    since, nor the weight, and what runs would run the same."""

    def __init__(self) -> None:
        self._held: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": None}  # a copy starts empty

    def put(self, x: Tensor, weight: Tensor, y: Tensor) -> None:
        """Hold y for a call with x."""
        self._held = weakref.ref(x), weight, y, self._stamp(x, weight, y)

    def take(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """What is held for x; nothing is held then."""
        held, self._held = self._held, None
        if held is None or held[0]() is not x or held[1] is not weight or ops.wants_grad(x, weight):
            return None
        y: Tensor = held[2]
        return y if held[3] == self._stamp(x, weight, y) else None

    @staticmethod
    def _stamp(x: Tensor, weight: Tensor, y: Tensor) -> tuple[Any, ...]:
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return weight.data_ptr(), *(t._version for t in (x, weight, y)), ops.forced(), captured


class FusedNorm(nn.Module):
    """An RMSNorm before quantized layers; has the parameter of the module that stood here.

    Args:
        reader: one of the layers that read its output; they share what they quantize.
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, rule: NormRule, reader: QuantLinear) -> None:
        super().__init__()
        self.register_parameter("weight", norm._parameters["weight"])
        self.rule, self.own, self.slot, self.ahead = rule, (norm,), reader.slot, Ahead()
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K) in x's dtype."""
        if not torch.compiler.is_compiling() and (held := self.ahead.take(x, self.weight)) is not None:
            return held
        run = self.kernel("norm_quantize", x)
        if run is None:
            return rms_norm(x, self.weight, self.rule)
        return self._put(*run(x, self.weight, self.rule, self.slot.recipe.activations))

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, both (..., K), and the norm of it: in one pass where a backend has a kernel for it, in two else."""
        run = self.kernel("add_norm_quantize", x, y)
        if run is None:
            x = x + y
            return x, self(x)
        x, *made = run(x, y, self.weight, self.rule, self.slot.recipe.activations)
        return x, self._put(*made)

    def add_ahead(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y; its norm is kept for when this module is called with that very tensor."""
        if _changed(self) or self.kernel("add_norm_quantize", x, y) is None:
            return x + y
        x, y = self.add(x, y)
        self.ahead.put(x, self.weight, y)
        return x

    def kernel(self, op: str, *inputs: Tensor) -> Any:
        """An op of `kernels.fused` for these inputs; None where torch's operations run."""
        x = inputs[0]
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.numel():
            return None
        if any(t.is_inference() or t.device != x.device for t in (*inputs, self.weight)):
            return None
        if any(t.shape != x.shape or t.dtype != x.dtype for t in inputs):
            return None
        if ops.wants_grad(*inputs, self.weight) or norm_refusal(self.weight, x.dtype) is not None:
            return None
        if self.slot.recipe.activations is None or self.slot.shared is None:
            return None
        return ops.fused(op, self.slot.spec(x.dtype), x.device)

    def _put(self, y: Tensor, rows: Any) -> Tensor:
        """Let the layers that read y find its rows."""
        shared = self.slot.shared
        assert shared is not None  # see `kernel`
        shared.put(y, self.slot.recipe.activations, rows)
        return y

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.rule}"


class FusedMLP(nn.Module):
    """A gated MLP with a quantized down product; has the children of the module that stood here."""

    gate_proj: Any
    up_proj: Any
    gate_up_proj: Any
    down_proj: Any

    def __init__(self, mlp: nn.Module, rule: GateRule) -> None:
        super().__init__()
        self.rule, self.own = rule, (mlp,)
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K) in x's dtype."""
        run = None
        if not torch.compiler.is_compiling() and x.numel() and not ops.wants_grad(x):
            run = self.kernel(x.dtype, x.device)
        if run is not None and not ops.wants_grad(*(m.bias for m in (*self._wide(), self.down_proj))):
            slot = self.down_proj.slot
            wide, down = [(m.slot.packed(), m.bias) for m in self._wide()], (slot.packed(), self.down_proj.bias)
            return run(x, wide, down, self.rule.activation, slot.recipe.activations, slot.state())
        if self.rule.joint:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        down, run = self.down_proj, None
        plain = torch.compiler.is_compiling() or not gate.numel() or not _reads_int8(down)
        if not plain and not ops.wants_grad(gate, up, down.bias):
            run = ops.fused("gate_quantize", down.slot.spec(gate.dtype), gate.device)
        if run is None:
            return down(ACTIVATIONS[self.rule.activation](gate) * up)
        rows = run(gate, up, self.rule.activation, down.recipe.activations)
        return down.slot(Coded(rows, gate.dtype), down.bias)

    def _wide(self) -> list[Any]:
        m = self._modules
        return [m["gate_up_proj"]] if self.rule.joint else [m["gate_proj"], m["up_proj"]]

    def kernel(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The op "mlp" that computes all of it in one call; None where no backend has one for these layers."""
        layers = [*self._wide(), self.down_proj]
        if not all(map(_reads_int8, layers)):
            return None
        runs = [ops.fused("mlp", m.slot.spec(dtype), device) for m in layers]
        return runs[-1] if all(runs) else None

    def extra_repr(self) -> str:
        return f"{self.rule}"


class DenseHead(nn.Linear):
    """Output embeddings that stay in 16 bit; has the parameters of the module that stood here."""

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features, self.own = head.in_features, head.out_features, (head,)
        self._parameters.update(head._parameters)
        self.train(head.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        if x.numel() and not ops.wants_grad(x, *self._parameters.values()):
            return ops.dense(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)


class Decoder:
    """Marks a module that stands in a decoder layer's place; `own` holds that layer, which has the same children."""

    own: tuple[nn.Module, ...]
    formula: Any  # its `layers.decoder.Formula`, or why it has none
    step: Any  # its `layers.decoder.Step`, None until it is asked for


def _readers(model: nn.Module) -> dict[str, tuple[Any, list[QuantLinear]]]:
    """Name of a norm -> the norm and the quantized layers that read it: q, k and v, gate and up."""
    norms: dict[str, tuple[Any, list[QuantLinear]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and _reads_int8(layer) and (found := norm_before(model, name)):
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
            yield name, norm, "norm_quantize", layer, _changed(norm) or narrow or norm_rule(norm)
    for name, mlp in list(model.named_modules()):
        down: Any = getattr(mlp, "down_proj", None)
        if not isinstance(mlp, FusedMLP) and _reads_int8(down):
            yield name, mlp, "gate_quantize", down, _changed(mlp) or gate_rule(mlp)


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
        if module is head and type(module) is nn.Linear and not _changed(module):
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
        elif isinstance(module, FusedMLP) and _reads_int8(module.down_proj):
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
