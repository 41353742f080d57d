"""Layers that read the same input (q, k, v): the first one that is called computes all of them in one call."""

from typing import Any

import torch
from torch import Tensor

from turboquant.kernels import ops
from turboquant.kernels.linear import Shared
from turboquant.packed.tensor import PackedTensor


class Together:
    """Outputs of layers for one input, kept until each layer asks for its own.

    Where no backend has "linears", where gradients are asked for, in a compiled model and while a weight is elsewhere
    (offloaded until its own layer is called) each layer runs by itself; both ways give the same bits.

    Args:
        layers: `QuantLinear`s with packed weights, inputs of 8 bit and one width.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.kept = Shared()  # by input and kernel: outputs not asked for yet, and what they were computed from

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output for x (..., K), (..., N) in x's dtype; None if it has to run by itself."""
        if torch.compiler.is_compiling() or x.is_inference() or not x.numel():
            return None
        if ops.wants_grad(x, layer.bias):
            return None
        run = ops.fused("linears", layer.slot.spec(x.dtype), x.device)
        if run is None:
            return None
        number, kept = id(layer), self.kept.made(x, run)
        if kept is not None:
            y, of = kept.pop(number, (None, []))
            if y is not None and _same(of, _versions(layer.slot.packed(), layer.bias)):
                return y
        pairs = [(one.slot.packed(), one.bias) for one in self.layers]
        if not all(t is None or t.device == x.device for w, b in pairs for t in (w.codes, w.scale, w.zero, b)):
            return None
        slot = layer.slot
        ys = run(x, pairs, slot.recipe.activations, slot.state())
        made = {id(one): (y, _versions(*of)) for one, y, of in zip(self.layers, ys, pairs, strict=True)}
        mine = made.pop(number)[0]
        self.kept.put(x, run, made)
        return mine


def _versions(weight: PackedTensor, bias: Tensor | None) -> list[tuple[Tensor, int]]:
    """What an output depends on beside the input, and how often it was written."""
    return [(t, t._version) for t in (weight.codes, weight.scale, weight.zero, bias) if t is not None]


def _same(a: list[tuple[Tensor, int]], b: list[tuple[Tensor, int]]) -> bool:
    return len(a) == len(b) and all(x is y and v == w for (x, v), (y, w) in zip(a, b, strict=True))
