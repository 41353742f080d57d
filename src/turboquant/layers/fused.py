"""Norms and MLPs whose output a quantized layer reads: modules that let one kernel do norm or activation, rotation and
rounding. And output embeddings that stay as they are, whose product torch computes slowly for one row.

They stand where the model's own modules stood (`fuse` puts them there), with the same parameters and children under the
same names. A norm still returns its output in the model's dtype, for adapters, routers and other readers; the rows go
along, to be found by the layers that read that very tensor. Where no kernel can fuse (another device, gradients, a
compiled or a forced backend) the formula runs, that is, what ran before.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.kernels import ops
from turboquant.kernels.fused import ACTIVATIONS, NormRule, norm_refusal, rms_norm
from turboquant.kernels.linear import Coded
from turboquant.layers.linear import QuantLinear


@dataclass(frozen=True)
class GateRule:
    """down(activation(gate(x))·up(x)); joint: gate and up are the halves of one product."""

    activation: str
    joint: bool


def changed(module: nn.Module) -> str | None:
    """What somebody has hung on a module that a module in its place would not do."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__:
        return "it has hooks"
    return None


def reads_int8(layer: Any) -> bool:
    """Whether a module is a quantized layer, and nothing else, that takes rows made for it."""
    if not isinstance(layer, QuantLinear) or changed(layer):
        return False
    a = layer.recipe.activations
    return a is not None and a.bits == 8


class NormedSum:
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
        self.rule, self.own, self.slot, self.ahead = rule, (norm,), reader.slot, NormedSum()
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
        return self._add(run, x, y)

    def add_ahead(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y; its norm is kept for when this module is called with that very tensor."""
        run = None if changed(self) else self.kernel("add_norm_quantize", x, y)
        if run is None:
            return x + y
        x, y = self._add(run, x, y)
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

    def _add(self, run: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, *made = run(x, y, self.weight, self.rule, self.slot.recipe.activations)
        return x, self._put(*made)

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
        plain = torch.compiler.is_compiling() or not gate.numel() or not reads_int8(down)
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
        if not all(map(reads_int8, layers)):
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
