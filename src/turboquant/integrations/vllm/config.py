"""`--quantization turboquant` of vLLM: which layer gets which method.

The recipe comes from a checkpoint that `turboquant quantize` wrote, or from
`hf_overrides={"quantization_config": {"quant_method": "turboquant", "recipe": "w8a8kv4"}}`; without either it is
DEFAULT. A configuration with a `format` describes packed weights; without one, weights are quantized as they are read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from turboquant.integrations.vllm import metrics
from turboquant.layers.convert import Plan, check_overrides
from turboquant.packed.checkpoint import check_format, headers
from turboquant.recipe import KVRecipe, Recipe, RecipeError, parse_recipe

NAME = "turboquant"
DEFAULT = "kv4"  # as of TurboQuantConfig for transformers
FIELDS = ("recipe", "modules_to_not_convert", "overrides", "kv_overrides", "format")
ROUTERS = ("gate", "router")  # choose experts; they keep their dtype, as in transformers
WHERE = 'recipes go to --hf-overrides \'{"quantization_config": {"quant_method": "turboquant", "recipe": ...}}\''
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class TurboQuantVllmConfig(QuantizationConfig):
    """quantization_config for vLLM.

    Args:
        recipe, modules_to_not_convert, overrides: as of TurboQuantConfig. Names are a checkpoint's (q_proj, not
            qkv_proj); the parts of a layer that vLLM fuses must agree.
        kv_overrides: regular expression -> recipe of the cache of the layers whose name it finds, "none" for vLLM's.
        format: of packed weights in the checkpoint; None quantizes a float checkpoint while it is read.

    Raises:
        RecipeError: an unknown recipe, field or pattern, or one for output embeddings, which stay as they are.
        CheckpointError: a format of a newer version.
    """

    def __init__(
        self,
        recipe: str | Recipe = DEFAULT,
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None,
        kv_overrides: Mapping[str, str] | None = None,
        format: int | None = None,
    ) -> None:
        super().__init__()
        if format is not None:
            check_format(format, "quantization_config")
        self.recipe = parse_recipe(recipe)
        self.packed = format is not None and self.recipe.weights is not None
        if isinstance(modules_to_not_convert, str):
            raise RecipeError(f"modules_to_not_convert={modules_to_not_convert!r} must be a list of names")
        self.plan = Plan(self.recipe, list(modules_to_not_convert or []), dict(overrides or {}))
        self.kv_overrides = dict(kv_overrides or {})
        check_overrides("kv_overrides", self.kv_overrides, "kv", "cache")
        for r in (self.recipe, *(parse_recipe(r) for r in self.plan.overrides.values() if r != "none")):
            if r.weights is not None and (r.weights.head or r.weights.embed):
                end = "head=8 (output embeddings)" if r.weights.head else "embed=8 (input embeddings)"
                raise RecipeError(f"{r.name!r} is not served by vLLM: {end}; leave it out")
        metrics.prepare()

    @staticmethod
    def get_name() -> Any:
        return NAME

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # nothing to read: a float checkpoint gets DEFAULT

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TurboQuantVllmConfig":
        config = {k: v for k, v in config.items() if k != "quant_method"}
        unknown = sorted(set(config) - set(FIELDS))
        if unknown:
            raise RecipeError(f"quantization_config: {unknown} not known; allowed are {list(FIELDS)}")
        return cls(**config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        """None: no checkpoint of another method becomes ours. vLLM shows every configuration here first.

        Raises:
            RecipeError: one with our fields that does not say whose it is, which vLLM would not use.
        """
        if isinstance(hf_quant_cfg, dict) and not hf_quant_cfg.get("quant_method") and "recipe" in hf_quant_cfg:
            raise RecipeError(f'quantization_config {hf_quant_cfg} needs "quant_method": "{NAME}" to be used')
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse a folder of packed weights that cannot be read, before anything is made.

        Raises:
            CheckpointError: a file is truncated or no safetensors file.
        """
        if self.packed and (folder := Path(model_name)).is_dir():
            headers(sorted(folder.glob("*.safetensors")))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; None leaves it to vLLM."""
        self._sweep()
        if isinstance(layer, AttentionLayerBase):
            kv = self.kv_of(prefix)
            if kv is not None:
                from turboquant.integrations.vllm import attention

                if isinstance(layer, attention.LAYERS):
                    attention.install(layer, prefix, kv)
            return None
        if isinstance(layer, LinearBase):
            recipe = self.linear_of(prefix)
            if recipe is None:
                return UnquantizedLinearMethod()
            from turboquant.integrations.vllm.linear import TurboQuantLinearMethod

            return TurboQuantLinearMethod(prefix, recipe, self.packed)
        if isinstance(layer, RoutedExperts):
            recipe = self.linear_of(prefix)
            if recipe is None:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            from turboquant.integrations.vllm.moe import TurboQuantMoEMethod

            return TurboQuantMoEMethod(prefix, recipe, self.packed, layer.moe_config)
        return None

    def _sweep(self) -> None:
        """Some models keep their quantization from their attention layers; those are found as others are asked for."""
        config = get_current_vllm_config_or_none()
        if config is not None:
            self._misplaced(config)
        if config is not None and (self.recipe.kv or self.kv_overrides):
            from turboquant.integrations.vllm import attention

            attention.sweep(config, self.kv_of)

    def _misplaced(self, config: Any) -> None:
        """Raises:
        RecipeError: settings in places that nothing reads.
        """
        places = {
            "--additional-config": getattr(config, "additional_config", None),
            "--hf-overrides": getattr(config.model_config, "hf_overrides", None),
        }
        for place, given in places.items():
            found = sorted({NAME, "recipe", "kv_overrides"} & set(given)) if isinstance(given, dict) else []
            if found:
                raise RecipeError(f"{place}: {found} is not read there; {WHERE}")
        if getattr(self, "online_quantization_config", None) is not None:
            raise RecipeError(f"--quantization-config is vLLM's own quantization while loading; {WHERE}")

    def kv_of(self, prefix: str) -> KVRecipe | None:
        """The recipe of an attention layer's cache, None if it stays vLLM's."""
        for pattern, text in self.kv_overrides.items():
            if re.search(pattern, prefix):
                return None if text == "none" else parse_recipe(text).kv
        return self.recipe.kv

    def linear_of(self, prefix: str) -> Recipe | None:
        """The linear recipe of a layer, None if it stays as it is.

        Raises:
            RecipeError: vLLM fuses what the configuration treats differently.
        """
        prefix = prefix.removesuffix(".routed_experts")  # a part of vLLM's own
        parent, _, last = prefix.rpartition(".")
        if last in ROUTERS:
            return None
        parts = self.packed_modules_mapping.get(last) or FUSED.get(last) or (last,)
        names = [f"{parent}.{p}" if parent else p for p in parts]
        found = {name: self.plan.of(name) for name in (prefix, *names)}
        if found[prefix] != self.recipe.linear:  # named by its fused name
            return found[prefix]
        if len({found[n] for n in names}) > 1:
            say = ", ".join(f"{n}: {r.name if (r := found[n]) else 'none'}" for n in names)
            raise RecipeError(f"{prefix} is one layer in vLLM, its parts need one recipe ({say})")
        return found[names[0]]


def register() -> None:
    """Make "turboquant" a quantization method of vLLM; idempotent.

    Raises:
        RuntimeError: this vLLM has a method of that name itself.
    """
    from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG as ours

    if ours.get(NAME) is TurboQuantVllmConfig:
        return
    if NAME in QUANTIZATION_METHODS:
        raise RuntimeError(f"this vLLM has a quantization method {NAME!r} itself; turboquant does not replace it")
    register_quantization_config(NAME)(TurboQuantVllmConfig)
