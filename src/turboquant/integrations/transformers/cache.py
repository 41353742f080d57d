"""TurboQuantCache: what `generate(..., past_key_values=...)` takes.

cache = TurboQuantCache(model, "kv4")
model.generate(**inputs, past_key_values=cache)
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from turboquant.integrations.transformers import storage
from turboquant.integrations.transformers.attention import NAME, Pending
from turboquant.integrations.transformers.chain import Chain
from turboquant.layers.cache import CacheError, LayerCache
from turboquant.layers.convert import Quantized
from turboquant.packed.page import PageLayout
from turboquant.recipe import Recipe, RecipeError, parse_recipe

OURS = {"full_attention", "sliding_attention"}
NOT_OURS = {"linear_attention", "conv", "dummy"}  # kept as transformers has them


class TurboQuantLayer(CacheLayerMixin):
    """One layer of the cache, in transformers' terms; the work is LayerCache's."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    chain: Chain | None = None  # a layer pickled before there were chains has none

    def __init__(self, cache: LayerCache, configs: list[Any], chain: Chain) -> None:
        super().__init__()
        self.__dict__["cache"] = cache
        self.configs, self.chain, self.row_exact = configs, chain, False
        self.is_sliding = cache.window is not None
        self.is_initialized = True

    @property
    def cache(self) -> LayerCache:
        """The cache, from which that has been taken back what layers computed together and the model did not ask
        for."""
        if self.chain is not None and self.chain.ahead:
            self.chain.settle()
        own: LayerCache = self.__dict__["cache"]
        return own

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cache": self.cache}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TurboQuantLayer":
        """Of the same model: the copy of a prefix is continued by it."""
        memo |= {id(c): c for c in self.configs}
        out = memo[id(self)] = object.__new__(type(self))
        out.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first step allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys and values (B, H, n, d) -> a Pending for the attention function, twice."""
        pending = Pending(key_states, value_states, self.cache, self.configs, self.row_exact)
        return pending, pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the new tokens only: the cache knows which of the old ones are real and near enough."""
        return query_length, self.cache.columns

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.cache.columns

    def get_max_length(self) -> int:
        """The capacity in tokens; -1 for no maximum."""
        return -1 if self.cache.capacity is None else self.cache.capacity

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.take_rows(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.take_rows(torch.arange(len(self.cache.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """See TurboQuantCache.crop."""
        self.cache.crop(self._columns(tokens_to_remove))

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would raise."""
        if self.cache.buf is not None:
            self.cache.check_crop(self._columns(tokens_to_remove))

    def _columns(self, tokens_to_remove: int) -> int:
        n = tokens_to_remove
        return -n if n <= 0 else max(0, self.cache.columns - n)

    def offload(self) -> None:
        raise CacheError("the TurboQuant cache cannot be offloaded")

    prefetch = offload


class TurboQuantCache(Cache):
    """A live quantized KV cache for one model.

    Args:
        model: the transformers model that will use it. Its attention implementation is set to "turboquant", which
            computes ordinary attention whenever it is called without this cache.
        recipe: "kv4", "k4v3", "plain4", ...; see `turboquant.parse_recipe`.
        max_tokens: reserve memory for so many tokens a sequence at the first step and never more, which decoding under
            CUDA graphs needs (see `LayerCache`); None to grow as tokens come.

    Raises:
        RecipeError: an unknown recipe; one of linear layers too, by name, where the model's are not quantized; a
            head_dim or layer type that cannot be served.

    Attributes:
        row_exact: set True to make every row of a prefill read what a decode step would read, as fidelity
            measurements need; by default a prompt chunk reads itself in 16 bit.
        chain: the layers that run together; None in a cache pickled before there were chains.
    """

    chain: Chain | None = None

    def __init__(self, model: Any, recipe: str | Recipe = "kv4", max_tokens: int | None = None) -> None:
        if not hasattr(model, "config"):
            raise RecipeError(f"model={model!r} is not allowed: a model of transformers that is loaded is needed")
        self.recipe = parse_recipe(recipe)
        layers_too = isinstance(recipe, str) and self.recipe.linear is not None
        if layers_too and not any(isinstance(m, Quantized) for m in model.modules()):
            raise RecipeError(
                f"recipe {recipe!r} is of linear layers too, which a cache leaves alone: name the cache's part, or "
                f"load the model with TurboQuantConfig({recipe!r})"
            )
        if max_tokens is not None and max_tokens < 1:
            raise RecipeError(f"max_tokens={max_tokens} is not allowed: it must be at least 1, or None")
        if self.recipe.kv is None:
            raise RecipeError(f"recipe {self.recipe.name!r} leaves the cache alone: name one with kv bits")
        config = model.config.get_text_config(decoder=True)
        ours = config._attn_implementation == NAME  # which only a model takes that can
        if config.is_encoder_decoder or not (ours or _takes_attention(model)):
            raise RecipeError(
                f"{type(model).__name__} computes attention in its own way, or across an encoder: the cache serves "
                "decoders that transformers can give another attention (set_attn_implementation)"
            )
        types, options = get_layer_types_and_kwargs(config)
        if isinstance(options, dict):  # transformers before 5.18: one set of options for all layers
            options = [options] * len(types)
        chain = Chain()
        configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
        layers: list[Any] = []
        for i, (kind, kwargs) in enumerate(zip(types, options, strict=True)):
            if kind in OURS:
                PageLayout(self.recipe.kv, _head_dim(model, config, i))
                window = kwargs["sliding_window"] if kind == "sliding_attention" else None
                layers.append(TurboQuantLayer(LayerCache(self.recipe.kv, window, max_tokens), configs, chain))
            elif kind in NOT_OURS:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
            else:
                raise RecipeError(f"layer {i} has attention of type {kind!r}, which the cache cannot serve")
        super().__init__(layers=layers)
        self.chain = chain
        self.fingerprint = storage.fingerprint(model, types)
        if not ours:
            model.set_attn_implementation(NAME)

    @property
    def row_exact(self) -> bool:
        return any(layer.row_exact for layer in self.ours)

    @row_exact.setter
    def row_exact(self, value: bool) -> None:
        for layer in self.ours:
            layer.row_exact = value

    @property
    def ours(self) -> list[TurboQuantLayer]:
        """The layers that this library serves."""
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]

    @property
    def nonfinite_tokens(self) -> int:
        """Token and layer pairs that arrived with a NaN or an infinity in their key or value."""
        return sum(int(c.buf.nonfinite.sum()) for c in (layer.cache for layer in self.ours) if c.buf is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """-n takes back n columns; a positive number is the length to keep (transformers before 5.18).

        Raises:
            CacheError: a layer cannot take them back; no layer is changed then.
        """
        for layer in self.ours:
            layer.check_crop(tokens_to_remove)
        order: list[Any] = self.layers  # type: ignore[has-type]
        ours = self.ours
        self.layers = [*(layer for layer in order if layer not in ours), *ours]  # others may refuse, and come first
        try:
            super().crop(tokens_to_remove)
        finally:
            self.layers = order

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in every sequence and layer, for steps that a CUDA graph replayed; see `LayerCache`.

        Raises:
            CacheError: the cache was made without max_tokens, or has seen no step, or is full.
        """
        for layer in self.ours:
            layer.cache.advance(tokens)

    def nbytes(self) -> dict[str, int]:
        """Allocated bytes: {"pages", "ring", "state", "total"}."""
        parts = [layer.cache.nbytes() for layer in self.ours]
        out = {name: sum(p[name] for p in parts) for name in ("pages", "ring", "state")}
        return out | {"total": sum(out.values())}

    def bits(self) -> tuple[float, float]:
        """True bits per key and per value number of the packed pages, averaged over the layers' numbers."""
        used: list[Any] = [layer.cache for layer in self.ours if layer.cache.buf is not None]
        if not used:
            raise CacheError("the cache is empty: its bits are known once it has seen a token")
        numbers = [c.layout.head_dim * c.buf.ring_k.shape[1] for c in used]
        return (
            sum(c.layout.key_bits * n for c, n in zip(used, numbers, strict=True)) / sum(numbers),
            sum(c.layout.value_bits * n for c, n in zip(used, numbers, strict=True)) / sum(numbers),
        )

    def save(self, path: str | Path) -> None:
        """Write the whole cache to a safetensors file (to a temporary file first, then renamed)."""
        storage.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "TurboQuantCache":
        """Read a cache written by `save` for the same model and continue from it.

        Raises:
            CacheFileError: the file is corrupt, truncated, of a newer format, or belongs to another model; nothing is
                loaded then.
        """
        return storage.load(cls, Path(path), model)


def _takes_attention(model: Any) -> bool:
    """Whether a model asks transformers for its attention, which transformers finds out by reading its source."""
    try:
        return bool(model._can_set_attn_implementation())
    except (AttributeError, KeyError, OSError):  # of a class made in a shell, say, there is none: its first call tells
        return True


def _head_dim(model: Any, config: Any, layer: int) -> int:
    """head_dim of a layer: from its configuration, which may differ per layer."""
    per_layer = config.per_layer_config[layer] if hasattr(config, "per_layer_config") else config
    return getattr(per_layer, "head_dim", None) or per_layer.hidden_size // per_layer.num_attention_heads
