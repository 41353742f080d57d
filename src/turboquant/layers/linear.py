"""QuantLinear and QuantExperts: the modules that stand where linear layers and stacks of experts stood."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.kernels.linear import Shared
from turboquant.layers.slot import Slot, forget_slots, keep_dtypes
from turboquant.recipe import Recipe


class QuantLinear(nn.Linear):
    """A linear layer with a packed weight, quantized inputs, or both. Adapters (PEFT) read its unquantized input.

    Args:
        recipe: its linear part counts. Without weights the weight stays a float parameter.
        shared: to quantize an input once for several layers that read it.
        like: see `Slot`.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, recipe: Recipe, device: Any = None, dtype: Any = None,
        shared: Shared | None = None, like: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features, self.recipe = inputs, outputs, recipe
        self.together: Any = None  # `together.Together` of the layers that read the same input
        if recipe.weights is None:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype), requires_grad=False)
        self.slot = Slot(self, "weight", (outputs, inputs), recipe, device, shared, like)
        self.register_load_state_dict_post_hook(forget_slots)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype), requires_grad=False)

    @property
    def slots(self) -> dict[str, Slot]:
        """By name."""
        return {"weight": self.slot}

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        if self.together is not None and (y := self.together.take(self, x)) is not None:
            return y
        if self.slot.tracked:
            self.slot.follow(x)
        return self.slot(x, self._parameters["bias"])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantLinear":
        return _apply(self, fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, recipe={self.recipe.name}"


class QuantExperts(nn.Module):
    """A stack of E experts, each an up (or gate and up) and a down product, in transformers' calling convention.

    Args:
        shapes: name -> (E, N, K) of the two products, the first one's name ending in "up_proj".
        gate: what happens between them, (tokens, N of the first) -> (tokens, K of the second).
        biases: name of a product -> (E, N) bias.

    Attributes:
        turned: the stacks of the module that stood here are (E, K, N), and so are floats of these that are saved.
    """

    turned = False

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], gate: Callable[[Tensor], Tensor], biases: dict[str, nn.Parameter],
        recipe: Recipe, device: Any = None, dtype: Any = None, like: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.recipe, self.gate = recipe, gate
        self.num_experts = next(iter(shapes.values()))[0]
        if recipe.weights is None:
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False))
        self.slots = {name: Slot(self, name, shape, recipe, device, Shared(), like) for name, shape in shapes.items()}
        self.register_load_state_dict_post_hook(forget_slots)
        for name in shapes:
            self.register_parameter(f"{name}_bias", biases.get(name))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, K), (tokens, k) experts of each token and their weights -> (tokens, K)."""
        first, second = self.slots.values()
        if first.tracked:
            first.follow(hidden_states)
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for e in top_k_index.unique().tolist():
            if e >= self.num_experts:  # a place that expert parallelism leaves empty
                continue
            token, place = torch.where(top_k_index == e)
            up = first(hidden_states[token], self._bias(first, e), e)
            inner = self.gate(up)
            if second.tracked:
                second.follow(inner)
            y = second(inner, self._bias(second, e), e)
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).float())
        return out.to(hidden_states.dtype)

    def dequantized(self, dtype: torch.dtype) -> "QuantExperts":
        """The same with float stacks (E, N, K) and nothing quantized."""
        biases = {n: b for n in self.slots if (b := getattr(self, f"{n}_bias")) is not None}
        shapes = {n: s.shape for n, s in self.slots.items()}
        stacks = {n: s.dequantized().to(dtype) for n, s in self.slots.items()}
        out = QuantExperts(shapes, self.gate, biases, Recipe(), next(iter(stacks.values())).device, dtype)
        for n, w in stacks.items():
            getattr(out, n).data = w
        if self.turned:
            out.register_state_dict_post_hook(_turn)
            out.register_load_state_dict_pre_hook(_turn)
        return out.eval()

    def _bias(self, slot: Slot, expert: int) -> Tensor | None:
        bias = getattr(self, f"{slot.name}_bias")
        return None if bias is None else bias[expert]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantExperts":
        return _apply(self, fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, recipe={self.recipe.name}"


def _turn(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Stacks in a state dict, from this module's order to that of the one which was quantized, or back."""
    for key in (prefix + name for name in module.slots):  # type: ignore[union-attr]
        if key in state:
            state[key] = state[key].mT.contiguous()


def _apply(module: Any, fn: Callable[..., Any], recurse: bool) -> Any:
    buffers = dict(module._buffers)
    module._buffers.clear()
    try:
        nn.Module._apply(module, fn, recurse)
    finally:
        module._buffers.update(buffers)
    keep_dtypes(module, fn)
    forget_slots(module)
    return module
