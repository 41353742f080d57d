"""Decoder layers of Llama's kind around quantized layers: a step of a few rows in two calls of a kernel.

`Step` decides, call by call, whether a layer may run so. With hooks on one of its parts, another module in a part's
place (an adapter), gradients, a compiled model, inference mode, a weight elsewhere, or a backend without such an op it
may not, and its modules run as they stand. Both ways give the same bits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from turboquant.kernels import ops
from turboquant.kernels.fused import NormRule
from turboquant.layers.fused import FusedMLP, FusedNorm, _reads_int8

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def parts_refusal(layer: nn.Module) -> str | None:
    """Why the parts of a decoder layer cannot run in two calls, None if they can."""
    kind = type(layer).__name__
    if set(layer._modules) != set(PARTS) or layer._parameters or layer._buffers:
        return f"{kind} is not made of {', '.join(PARTS)} alone"
    norms, attention, mlp = [layer._modules[n] for n in (PARTS[0], PARTS[2])], layer.self_attn, layer.mlp
    if not all(isinstance(n, FusedNorm) for n in norms) or not isinstance(mlp, FusedMLP):
        return f"a norm or the MLP of {kind} is not fused"
    assert isinstance(attention, nn.Module)
    if set(attention._modules) != set(PROJECTIONS) or attention._parameters or attention._buffers:
        return f"{type(attention).__name__} is not made of {', '.join(PROJECTIONS)} alone"
    mlp_layers = [m for n, m in mlp._modules.items() if n.endswith("_proj")]
    for linear in (*attention._modules.values(), *mlp_layers):
        if not _reads_int8(linear) or linear.recipe.weights is None:  # type: ignore[union-attr]
            return f"a layer of {kind} has no packed weight with inputs of 8 bit"
    return None


class Step:
    """The two calls of one decoder layer, whose parts `parts_refusal` has accepted."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        owners = ((layer, PARTS), (attention, PROJECTIONS), (mlp, tuple(mlp._modules)))
        self.parts = [(o._modules, name, o._modules[name]) for o, names in owners for name in names]
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.wide, self.down, self.attention, self.rule = mlp._wide(), mlp.down_proj, attention, mlp.rule
        self.linears = [*(attention._modules[n] for n in PROJECTIONS), *self.wide, self.down]
        self.head_dim = attention.head_dim
        self._key: list[Any] = []
        self._made: Any = None

    def __deepcopy__(self, memo: Any) -> None:
        return None  # it belongs to the modules it was made of; the copy's layer makes its own

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """The kernel's object for rows x (B, n, K) and their angles; None where the modules have to run."""
        if torch.compiler.is_compiling() or x.is_inference() or x.dim() != 3 or not self._unchanged():
            return None
        tensors = self._tensors()
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
            return None
        if not (cos.dtype is sin.dtype is x.dtype and cos.stride() == sin.stride() and cos.stride(-1) == 1):
            return None
        if cos.shape[-1] != self.head_dim or x.device.type != "cpu":
            return None
        key: list[Any] = [t.data_ptr() for t in tensors]
        key += x.dtype, ops.forced()
        if key != self._key:
            self._key, self._made = key, self._make(x, tensors)
        made = self._made
        return None if made is None or not 0 < x.numel() <= made.most * made.width else made

    def _tensors(self) -> list[Tensor]:
        found = [n._parameters["weight"] for n in self.norms]
        for m in self.linears:
            b, bias = m._buffers, m._parameters["bias"]
            found += b["weight"], b["weight_scale"], b["weight_zero"]
            if bias is not None:
                found.append(bias)
        return found

    def _make(self, x: Tensor, tensors: list[Any]) -> Any:
        new = self.kernel(x.dtype, x.device)
        if new is None or any(t.device != x.device for t in tensors):
            return None
        if any(n.weight.dtype != x.dtype or not n.weight.is_contiguous() for n in self.norms):
            return None
        q, k, v, o, *wide, down = [(m.slot.packed(), m.bias) for m in self.linears]
        norms: list[tuple[Tensor, NormRule]] = [(n.weight, n.rule) for n in self.norms]
        return new([q, k, v], o, wide, down, self.rule.activation, norms, x.dtype)

    def kernel(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The op "decoder_step" that serves all layers; None where no backend has one."""
        runs = [ops.fused("decoder_step", m.slot.spec(dtype), device) for m in self.linears]
        return runs[0] if all(runs) else None

    def _unchanged(self) -> bool:
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks:
            return False
        for owner, name, part in self.parts:
            if owner.get(name) is not part or part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
                return False
            if "forward" in part.__dict__:
                return False
        return True
