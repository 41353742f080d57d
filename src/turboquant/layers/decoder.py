"""Decoder layers of Llama's kind around quantized layers: a step of a few rows in two calls of a kernel.

`Step` decides, call by call, whether a layer may run so. With hooks on one of its parts, another module in a part's
place (an adapter), a patched class, gradients, a compiled model, inference mode, angles of another shape, a weight
elsewhere, or a backend without such an op it may not, and its modules run as they stand. Both ways give the same bits.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from turboquant.kernels import ops
from turboquant.kernels.fused import NormRule, norm_refusal
from turboquant.layers.fused import FusedMLP, FusedNorm
from turboquant.layers.linear import QuantLinear

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def parts_refusal(layer: nn.Module) -> str | None:
    """Why the parts of a decoder layer cannot run in two calls, None if they can."""
    kind = type(layer).__name__
    if set(layer._modules) != set(PARTS) or layer._parameters or layer._buffers:
        return f"{kind} is not made of {', '.join(PARTS)} alone"
    norms, attention, mlp = [layer._modules[n] for n in (PARTS[0], PARTS[2])], layer.self_attn, layer.mlp
    if not all(type(n) is FusedNorm for n in norms) or type(mlp) is not FusedMLP:
        return f"a norm or the MLP of {kind} is not fused, or parametrized"
    assert isinstance(attention, nn.Module)
    if set(attention._modules) != set(PROJECTIONS) or attention._parameters or attention._buffers:
        return f"{type(attention).__name__} is not made of {', '.join(PROJECTIONS)} alone"
    mlp_layers = [m for n, m in mlp._modules.items() if n.endswith("_proj")]
    for linear in (*attention._modules.values(), *mlp_layers):
        if type(linear) is not QuantLinear or linear.recipe.weights is None or not _of_8_bit(linear):
            return f"a layer of {kind} has no packed weight with inputs of 8 bit"
    return None


def _of_8_bit(linear: QuantLinear) -> bool:
    a = linear.recipe.activations
    return a is not None and a.bits == 8


class Formula:
    """The functions by which a layer computed what the two calls compute when it was tried.

    Args:
        layer: the model's own layer, not its stand-in.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.attention = type(layer), type(layer.self_attn)
        self.forwards = self.layer.forward, self.attention.forward
        self.names = inspect.unwrap(self.attention.forward).__globals__
        self.rotary = self.names.get("apply_rotary_pos_emb")

    def refusal(self) -> str | None:
        """Which of them was patched since, None if none was."""
        own, attended = self.forwards
        if self.layer.forward is not own or self.attention.forward is not attended:
            return f"{self.layer.__name__} or {self.attention.__name__} has another forward than when it was tried"
        if self.names.get("apply_rotary_pos_emb") is not self.rotary:
            return "apply_rotary_pos_emb is another than when it was tried"
        return None


class Step:
    """The two calls of one decoder layer, whose parts `parts_refusal` has accepted.

    Args:
        formula: by which the layer was tried.
        idle: whether a forward hook of a part does nothing now.
    """

    def __init__(self, layer: Any, formula: Formula, idle: Callable[[Any], bool] = lambda hook: False) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        owners = ((layer, PARTS), (attention, PROJECTIONS), (mlp, tuple(mlp._modules)))
        found = [(o._modules, name, o._modules[name]) for o, names in owners for name in names]
        self.parts = [(owner, name, part, type(part)) for owner, name, part in found]
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.wide, self.down, self.attention, self.rule = mlp._wide(), mlp.down_proj, attention, mlp.rule
        self.linears = [*(attention._modules[n] for n in PROJECTIONS), *self.wide, self.down]
        self.head_dim, self.formula, self.idle = attention.head_dim, formula, idle
        self._key: list[Any] = []
        self._made: Any = None

    def __deepcopy__(self, memo: Any) -> None:
        return None  # it belongs to the modules it was made of; the copy's layer makes its own

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """The kernel's object for rows x (B, n, K) and their angles; None where the modules have to run."""
        if torch.compiler.is_compiling() or x.is_inference() or x.dim() != 3 or self.changed() is not None:
            return None
        tensors = self._tensors()
        if ops.wants_grad(x, *tensors):
            return None
        b, n, _ = x.shape
        if cos.shape != sin.shape or cos.shape not in ((b, n, self.head_dim), (1, n, self.head_dim)):
            return None  # angles that modules broadcast in another way
        if not (cos.dtype is sin.dtype is x.dtype and cos.stride() == sin.stride() and cos.stride(-1) == 1):
            return None
        if not (x.is_cpu and cos.is_cpu and sin.is_cpu):
            return None
        key: list[Any] = [t.data_ptr() for t in tensors]
        key += [t.dtype for t in tensors]
        key += x.dtype, ops.forced()
        if key != self._key:
            self._key, self._made = key, self._make(x, tensors)
        made = self._made
        return None if made is None or not 0 < x.numel() <= made.most * made.width else made

    def refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why no rows of a dtype on a device run in two calls, None if up to `most` do."""
        return self.changed() or self._unfit(dtype, device, self._tensors())

    def replaced(self) -> bool:
        """Whether another module stands in a part's place than when this was made."""
        return any(owner.get(name) is not part for owner, name, part, _ in self.parts)

    def _tensors(self) -> list[Tensor]:
        found = [n._parameters["weight"] for n in self.norms]
        for m in self.linears:
            b, bias = m._buffers, m._parameters["bias"]
            found += b["weight"], b["weight_scale"], b["weight_zero"]
            if bias is not None:
                found.append(bias)
        return found

    def _make(self, x: Tensor, tensors: list[Any]) -> Any:
        if self._unfit(x.dtype, x.device, tensors) is not None:
            return None
        q, k, v, o, *wide, down = [(m.slot.packed(), m.bias) for m in self.linears]
        norms: list[tuple[Tensor, NormRule]] = [(n.weight, n.rule) for n in self.norms]
        new = self.kernel(x.dtype, x.device)
        return new([q, k, v], o, wide, down, self.rule.activation, norms, x.dtype)

    def _unfit(self, dtype: torch.dtype, device: torch.device, tensors: list[Tensor]) -> str | None:
        if self.kernel(dtype, device) is None:
            return "no kernel serves its layers"
        if any(t.device != device for t in tensors):
            return "a weight is on another device"
        for norm in self.norms:
            why = norm_refusal(norm.weight, dtype) or (
                None if norm.weight.is_contiguous() else "its weight is not contiguous"
            )
            if why is not None:
                return f"a norm is not served: {why}"
        return None

    def kernel(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The op "decoder_step" that serves all layers; None where no backend has one."""
        runs = [ops.fused("decoder_step", m.slot.spec(dtype), device) for m in self.linears]
        return runs[0] if all(runs) else None

    def changed(self) -> str | None:
        """Why the modules may not compute what they did when the layer was tried."""
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks:
            return "there are hooks on all modules"
        for owner, name, part, kind in self.parts:
            if owner.get(name) is not part:
                return f"another module stands in place of {name}"
            if type(part) is not kind or "forward" in part.__dict__:
                return f"{name} was given another class or forward"
            if part._forward_pre_hooks or part._backward_hooks:
                return f"{name} has hooks"
            if part._forward_hooks and not all(map(self.idle, part._forward_hooks.values())):
                return f"{name} has hooks"
        return self.formula.refusal()
