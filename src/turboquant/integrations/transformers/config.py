"""`quantization_config=TurboQuantConfig("kv4")` for `from_pretrained`, and `attach` for a model already loaded."""

import inspect
import warnings
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from turboquant.integrations.transformers.attention import NAME
from turboquant.integrations.transformers.cache import TurboQuantCache
from turboquant.recipe import Recipe, parse_recipe


def attach(model: Any, recipe: str | Recipe = "kv4") -> RemovableHandle:
    """Make every forward pass and `generate` of a loaded model use a TurboQuantCache of its own.

    Where a call brings no cache or an empty DynamicCache (as `generate` makes), a fresh TurboQuantCache takes its place
    and is returned as `past_key_values`. A cache that already holds tokens is used as it is.

    Returns:
        a handle; `handle.remove()` undoes it (the attention implementation stays "turboquant", which then computes
        ordinary attention).
    """
    recipe = parse_recipe(recipe)
    TurboQuantCache(model, recipe)  # refuses now, not at the first call, what it cannot serve

    config = model.config.get_text_config(decoder=True)
    position = list(inspect.signature(model.forward).parameters).index("past_key_values")

    def swap(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        positional = len(args) > position
        given = args[position] if positional else kwargs.get("past_key_values")
        use = kwargs.get("use_cache")
        cache = given
        if given is None:
            if (getattr(config, "use_cache", True) if use is None else use) and not module.training:
                cache = TurboQuantCache(module, recipe)
        elif (
            type(given) is DynamicCache
            and given.get_seq_length() == 0
            and not getattr(given, "_is_user_defined", False)
        ):
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

    return model.register_forward_pre_hook(swap, with_kwargs=True)


@register_quantization_config(NAME)
class TurboQuantConfig(QuantizationConfigMixin):
    """quantization_config for `from_pretrained`.

    Args:
        recipe: "kv4", "k4v3", ...; see `turboquant.parse_recipe`.

    Raises:
        RecipeError: an unknown recipe.
    """

    def __init__(self, recipe: str | Recipe = "kv4", **kwargs: Any) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ValueError(f"TurboQuantConfig takes recipe=..., got also {sorted(kwargs)}")
        self.quant_method = NAME
        self.recipe = parse_recipe(recipe).name


@register_quantizer(NAME)
class TurboQuantizer(HfQuantizer):
    """Carries out a TurboQuantConfig: weights stay as they are, the cache becomes live 4 bit."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        attach(model, self.quantization_config.recipe)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
