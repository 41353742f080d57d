"""`quantization_config=TurboQuantConfig("kv4")` for `from_pretrained`, and `attach` for a model already loaded."""

import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from turboquant.integrations.transformers.attention import NAME
from turboquant.integrations.transformers.cache import TurboQuantCache
from turboquant.layers.cache import CacheError
from turboquant.layers.convert import Plan
from turboquant.layers.moments import FeedbackError, check_feedback
from turboquant.packed.checkpoint import FORMAT, CheckpointError, check_format
from turboquant.recipe import Recipe, RecipeError, parse_recipe


def attach(model: Any, recipe: str | Recipe = "kv4") -> RemovableHandle:
    """Make every forward pass and `generate` of a loaded model use a TurboQuantCache of its own.

    Where a call brings no cache or an empty DynamicCache (as `generate` makes), a fresh TurboQuantCache takes its place
    and is returned as `past_key_values`. A cache that already holds tokens is used as it is.

    Returns:
        a handle; `handle.remove()` undoes it (the attention implementation stays "turboquant", which then computes
        ordinary attention).
    """
    if any(isinstance(hook, _Swap) for hook in model._forward_pre_hooks.values()):
        raise RecipeError(f"attach {recipe!r}: this model has a cache attached already; remove() its handle first")
    TurboQuantCache(model, recipe)  # refuses now, not at the first call, what it cannot serve
    position = list(inspect.signature(model.forward).parameters).index("past_key_values")
    swap = _Swap(parse_recipe(recipe), model.config.get_text_config(decoder=True), position)
    return model.register_forward_pre_hook(swap, with_kwargs=True)


class _Swap:
    """The hook of `attach`.

    Args:
        position: of past_key_values among the arguments.
    """

    def __init__(self, recipe: Recipe, config: Any, position: int) -> None:
        self.recipe, self.config, self.position = recipe, config, position
        self.replaced: Any = None  # weakly, the empty cache last replaced: who went on with it would lose its history

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"replaced": None}

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        position, recipe = self.position, self.recipe
        positional = len(args) > position
        given = args[position] if positional else kwargs.get("past_key_values")
        use = kwargs.get("use_cache")
        cache = given
        if given is None:
            if (getattr(self.config, "use_cache", True) if use is None else use) and not module.training:
                cache = TurboQuantCache(module, recipe)
        elif _fresh(given):
            if self.replaced is not None and self.replaced() is given:
                raise CacheError(
                    f"the {recipe.name!r} cache took this DynamicCache's place, which stays empty: go on with "
                    "outputs.past_key_values"
                )
            self.replaced = weakref.ref(given)
            cache = TurboQuantCache(module, recipe)
        elif not isinstance(given, TurboQuantCache):
            warnings.warn(
                f"the model was set up for {recipe.name!r} but was given a {type(given).__name__} of its own: that "
                "cache is used, unquantized",
                stacklevel=2,
            )
        if positional:
            args = (*args[:position], cache, *args[position + 1 :])
        elif cache is not given:
            kwargs["past_key_values"] = cache
        return args, kwargs


def _fresh(cache: Any) -> bool:
    """Whether a cache is what `generate` makes where it is not told which."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return cache.get_seq_length() == 0 and not getattr(cache, "_is_user_defined", False)


@register_quantization_config(NAME)
class TurboQuantConfig(QuantizationConfigMixin):
    """quantization_config for `from_pretrained`.

    Args:
        recipe: "kv4", "w4a8kv4", "w8a8", ...; see `turboquant.parse_recipe`.
        modules_to_not_convert: names of modules whose weights stay as they are, whole or the last parts of a name.
        overrides: regular expression -> recipe for the modules whose name it finds, "none" for none; the first decides.
        feedback: error feedback while weights are quantized: "self" along tokens that the model says itself, 4,096 or
            two for each input of its widest layer if that is more, "self:FILE" keeps them and goes on with what the
            file holds, "random" along as many random ones. The whole
            unquantized model is loaded for it, and K² fp32 numbers for each linear layer of K inputs stand beside it at
            once (39 GB for Llama-3-8B, 26 of them for down_proj). Stacks of experts and output embeddings get none, and
            a warning says so. Not saved with the model.
        format: of the saved weights; set by `save_pretrained`.

    Raises:
        RecipeError: an unknown recipe, or a pattern that is no regular expression.
        FeedbackError: feedback that needs a text or is not known, or no weights to round.
        CheckpointError: a format of a newer version, or 1 with output embeddings that are read otherwise now.
    """

    def __init__(
        self,
        recipe: str | Recipe = "kv4",
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None,
        format: int = FORMAT,
        feedback: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ValueError(
                f"TurboQuantConfig takes recipe=..., modules_to_not_convert=..., overrides=... and feedback=..., "
                f"got also {sorted(kwargs)}"
            )
        check_format(format, "quantization_config")
        self.quant_method = NAME
        self.recipe = parse_recipe(recipe).name
        if isinstance(modules_to_not_convert, str):
            raise RecipeError(f"modules_to_not_convert={modules_to_not_convert!r} must be a list of names")
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.overrides = dict(overrides or {})
        self.format = format
        self.feedback = feedback
        self.plan()
        asked_for = (self.recipe, *(r for r in self.overrides.values() if r != "none"))
        if feedback is not None:
            check_feedback(feedback)
            if not any(parse_recipe(r).weights for r in asked_for):
                raise FeedbackError(f"feedback={feedback!r} is for weights, which {self.recipe!r} leaves as they are")
        for asked in asked_for:
            r = parse_recipe(asked)
            if format == 1 and r.weights and r.weights.head and r.activations and r.activations.bits == 8:
                raise CheckpointError(f"quantization_config: format 1 with {asked}: its output embeddings are not "
                                      "rotated as this version reads them; quantize the model anew")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        out: dict[str, Any] = super().to_dict()
        out.pop("feedback", None)
        return out

    def plan(self) -> Plan:
        """What to quantize how."""
        return Plan(parse_recipe(self.recipe), self.modules_to_not_convert, self.overrides)
