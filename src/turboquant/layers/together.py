"""Layers that read the same input (q, k, v): the first one that is called computes all of them in one call."""

import weakref
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels import ops


class Together:
    """Outputs of layers for one input, kept until each layer asks for its own.

    Where no backend has "linears", where gradients are asked for, in a compiled model and while a weight is elsewhere
    (offloaded until its own layer is called) each layer runs by itself; both ways give the same bits.

    Args:
        layers: `QuantLinear`s with packed weights, inputs of 8 bit and one width.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self._made: tuple[Any, ...] | None = None  # of what, its version, kernel, outputs: one value, for threads

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_made": None}

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output for x (..., K), (..., N) in x's dtype; None if it has to run by itself."""
        if torch.compiler.is_compiling() or x.is_inference() or not x.numel():
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        run = ops.fused("linears", layer.slot.spec(x.dtype), x.device)
        if run is None:
            return None
        made, number, packed = self._made, id(layer), layer.slot.packed()
        if made is not None and made[0]() is x and made[1] == x._version and made[2] is run:
            y, of, version = made[3].pop(number, (None, None, 0))
            if y is not None and of is packed.codes and version == of._version:
                return y
        pairs = [(one.slot.packed(), one.bias) for one in self.layers]
        if not all(t is None or t.device == x.device for w, b in pairs for t in (w.codes, w.scale, w.zero, b)):
            return None
        slot = layer.slot
        ys = run(x, pairs, slot.recipe.activations, slot.state())
        kept = {
            id(one): (y, w.codes, w.codes._version)
            for one, y, (w, _) in zip(self.layers, ys, pairs, strict=True)
        }  # fmt: skip
        mine = kept.pop(number)[0]
        self._made = weakref.ref(x, self._forget), x._version, run, kept
        return mine

    def _forget(self, ref: Any) -> None:
        made = self._made
        if made is not None and made[0] is ref:
            self._made = None
