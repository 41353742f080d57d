"""QuantEmbedding: input embeddings whose rows are decoded when tokens ask for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.layers.slot import Slot, forget_slots, keep_dtypes
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import Recipe, RecipeError


def row_factor(module: nn.Embedding) -> float:
    """The factor of which a module multiplies the rows of its weight (Gemma's sqrt(K)), found by trying it.

    Raises:
        RecipeError: it does something else with them.
    """
    with torch.device("cpu"):  # while a model is loaded, new tensors are on meta
        return _row_factor(module)


def _row_factor(module: nn.Embedding) -> float:
    kind, probe = type(module).__name__, module.__new__(type(module))
    probe.__dict__.update(module.__dict__, padding_idx=None)
    probe._parameters = {"weight": nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 4.0]]), requires_grad=False)}
    probe._buffers = {n: None if b is None or b.is_meta else b.cpu() for n, b in module._buffers.items()}
    for name, value in vars(module).items():  # such a factor is a number beside its buffer, which may be on meta
        if isinstance(value, float) and probe._buffers.get(name.removeprefix("scalar_"), 0) is None:
            probe._buffers[name.removeprefix("scalar_")] = torch.tensor(value)
    ids = torch.tensor([[1, 0]])
    try:
        got = probe(ids)
    except Exception as e:
        raise RecipeError(f"embed=8: input embeddings of kind {kind} cannot be tried ({type(e).__name__})") from e
    factor = float(got[0, 1, 0]) if isinstance(got, Tensor) and got.shape == (1, 2, 2) else torch.nan
    if not torch.equal(got, probe.weight[ids] * torch.tensor(factor)):
        raise RecipeError(f"embed=8: input embeddings of kind {kind} do more than look up rows; leave embed=8 out")
    return factor


class QuantEmbedding(nn.Module):
    """Embeddings (V, K) with a packed weight, unrotated.

    Args:
        own: what stood here, whose weight may be on any device; kept without it, for `dequantized`.
        recipe: its weights count.
        like: see `Slot`.
    """

    def __init__(self, own: nn.Embedding, recipe: Recipe, device: Any = None, like: torch.dtype | None = None) -> None:
        super().__init__()
        self.recipe, self.dtype, self.factor = recipe, own.weight.dtype, row_factor(own)
        self.num_embeddings, self.embedding_dim = own.weight.shape
        bare = own.__new__(type(own))
        bare.__dict__.update(own.__dict__)
        bare._parameters = {}
        self.own = (bare,)  # in a tuple, so that it is none of this module's children
        shape = self.num_embeddings, self.embedding_dim
        self.slot = Slot(self, "weight", shape, recipe, device or own.weight.device, None, like)
        self.register_load_state_dict_post_hook(forget_slots)

    @property
    def slots(self) -> dict[str, Slot]:
        """By name."""
        return {"weight": self.slot}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., K) in the dtype that the embeddings had."""
        w, ids = self.slot.packed(), input_ids.reshape(-1)
        codes = torch.stack([nn.functional.embedding(ids, stage) for stage in w.codes])  # refuses ids below 0 too
        rows = PackedTensor(codes, w.scale[ids], w.zero[ids])
        x = rows.dequantize().to(self.dtype).reshape(*input_ids.shape, self.embedding_dim)
        return x if self.factor == 1 else x * torch.tensor(self.factor, dtype=self.dtype)

    def dequantized(self, dtype: torch.dtype) -> nn.Embedding:
        """What stood here, with the weight as it decodes."""
        own = self.own[0]
        out: nn.Embedding = own.__new__(type(own))
        out.__dict__.update(own.__dict__)
        out._parameters = {"weight": nn.Parameter(self.slot.dequantized().to(dtype), requires_grad=False)}
        where = out.weight.device  # what was on meta is the factor
        factor = torch.tensor(self.factor, device=where)
        out._buffers = {n: b if b is None else factor if b.is_meta else b.to(where) for n, b in own._buffers.items()}
        return out.eval()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantEmbedding":
        keep_dtypes(self, fn)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.slot.forget()
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, recipe={self.recipe.name}"
