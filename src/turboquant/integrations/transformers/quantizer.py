"""Carries out a TurboQuantConfig: weights are quantized tensor by tensor while they are read, or read as they were
saved; the cache becomes live."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from turboquant.integrations.transformers.attention import NAME
from turboquant.integrations.transformers.config import TurboQuantConfig, attach
from turboquant.integrations.transformers.decoder import fuse_decoders
from turboquant.kernels.linear import Shared
from turboquant.layers.convert import (
    Plan,
    Quantized,
    check_names,
    dequantize_model,
    quantize_model,
    shell,
    start_trackers,
    targets,
)
from turboquant.layers.embedding import QuantEmbedding
from turboquant.layers.fuse import fuse
from turboquant.layers.linear import QuantLinear
from turboquant.layers.moments import moments_without_data
from turboquant.packed.checkpoint import CheckpointError, check
from turboquant.recipe import RecipeError, parse_recipe


class Quantize(ConversionOps):
    """One tensor of a checkpoint, just read, into the buffers of the module that will hold it."""

    def __init__(self, quantizer: "TurboQuantizer") -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """{name of the float weight: tensor} -> {name of each buffer: tensor}."""
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            w = value[0] if isinstance(value, list) else value
            path, _, key = name.rpartition(".")
            slot = model.get_submodule(path).slots[key]
            w = w.mT if path in self.quantizer.turned else w
            prefix = f"{path}." if path else ""
            out |= {prefix + k: t for k, t in slot.encode(w).items()}
            if slot.recipe.weights is None:
                out[name] = w.contiguous()
        return out


@register_quantizer(NAME)
class TurboQuantizer(HfQuantizer):
    """The quantizer of the method "turboquant"."""

    quantization_config: TurboQuantConfig

    def __init__(self, quantization_config: TurboQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.turned: set[str] = set()  # experts that the checkpoint holds transposed
        self.shared = Shared()
        self.attached: Any = None  # handle of the cache, which `dequantize` takes away

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, dtype: Any = None, **kwargs: Any
    ) -> Any:
        plan = self.quantization_config.plan()
        head = _head(model)
        tied = _tied(model)
        fresh = not self.pre_quantized
        if fresh:
            check_names(model, plan, self.quantization_config.modules_to_not_convert, head)
            check_ends(model, plan, head)
            if self.quantization_config.feedback:
                list(targets(model, plan, head))  # refuses now what it cannot pack
                return model  # as it is, for it has to run first: see _process_model_after_weight_loading
        for name, module, recipe in list(targets(model, plan, head)):
            if tied and _is_end(module, head):
                continue  # one weight for both ends: see _process_model_after_weight_loading
            self._replace(model, name, module, recipe, fresh)
        if self.pre_quantized and checkpoint_files:
            self._check(model, checkpoint_files)
        return model

    def _replace(self, model: Any, name: str, module: Any, recipe: Any, fresh: bool) -> None:
        w = getattr(module, "weight", None)
        kind = w.dtype if w is not None else next(p.dtype for p in module.parameters())
        new = shell(module, recipe, self.shared, like=kind if fresh else None)
        if getattr(module, "is_transposed", False) and fresh:
            self.turned.add(name)
        model.set_submodule(name, new)

    def _check(self, model: Any, files: Any) -> None:
        """Every tensor of a saved model by name, shape and dtype, before the first one is loaded."""
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, Quantized)}
        buffers = {f"{n}.{k}" for n, m in quantized.items() for k in m._buffers}
        expected: dict[str, Any] = {}
        for name, t in model.state_dict().items():
            expected[name] = (tuple(t.shape), t.dtype if name in buffers else None)
        optional = set(getattr(model, "all_tied_weights_keys", None) or {})
        check(files, expected, optional)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint goes through `Quantize`."""
        path, _, key = param_name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return False
        return isinstance(module, Quantized) and (key in module.slots)

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        recipe = parse_recipe(self.quantization_config.recipe)
        if self.quantization_config.feedback and not self.pre_quantized:
            return self._with_feedback(model)
        empty = [
            f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, Quantized) for k, s in m.slots.items()
            if s.recipe.weights is not None and getattr(m, k).dtype != torch.uint8
        ]  # fmt: skip
        if empty:
            raise CheckpointError(f"the checkpoint has no tensor for {empty[0]!r}: it stays unquantized and empty")
        head = _head(model)
        plan = self.quantization_config.plan()
        todo = [n for n, m, _ in targets(model, plan, head) if _is_end(m, head)]
        if todo and not self.pre_quantized:
            untie(model)
            quantize_model(model, plan, head)
        for module in model.modules():
            if isinstance(module, Quantized):
                for slot in module.slots.values():
                    slot.forget()
        if not self.pre_quantized:
            start_trackers(model)
        fuse(model, head)
        fuse_decoders(model)
        _keep_size(model)
        if any(isinstance(m, Quantized) for m in model.modules()):
            # The saved names are the modules' own: nothing is to be turned back into a checkpoint's names.
            model._weight_conversions = []
        if recipe.kv is not None:
            self.attached = attach(model, recipe)
        return model

    def _with_feedback(self, model: Any) -> Any:
        from transformers.utils.logging import tqdm

        bars: dict[str, Any] = {}

        def show(what: str, done: int, of: int) -> None:
            bar = bars.get(what) or bars.setdefault(what, tqdm(total=of, desc=what))
            bar.update(done - bar.n)
            if done == of:
                bar.close()

        config = self.quantization_config
        assert config.feedback is not None
        moments = moments_without_data(model.eval(), config.feedback, show)
        self.attached = _quantize_loaded(model, config, moments, show)[1]
        return model

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """In the dtype that the model has now, which need not be the one that it was loaded in."""
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        # a saved model's configuration holds its dtype as a word
        dequantize_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.__dict__.pop("resize_token_embeddings", None)
        if self.attached is not None:
            self.attached.remove()
            self.attached = None
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the packed weights can be trained: gradients pass the layers. The weights themselves
        stand."""
        return True


def quantize(
    model: Any,
    config: TurboQuantConfig | str,
    moments: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Quantize a model that is loaded already (from a GGUF file, say), so that it can be used and saved.

    Args:
        moments, progress: as of `layers.convert.quantize_model`; moments take the place of the config's feedback, and
            what gives them is called when nothing can be refused any more.

    Returns:
        its rows, one a weight.

    Raises:
        RecipeError: before anything is changed.
    """
    config = config if isinstance(config, TurboQuantConfig) else TurboQuantConfig(config)
    if any(isinstance(m, Quantized) for m in model.modules()):
        raise RecipeError(
            f"recipe {config.recipe!r}: this model is quantized already, and is not quantized again: load the "
            "float model, or call dequantize() first"
        )
    check_names(model, config.plan(), config.modules_to_not_convert, _head(model))
    check_ends(model, config.plan(), _head(model))
    list(targets(model, config.plan(), _head(model)))  # refuses now what it cannot pack
    if callable(moments):
        moments = moments()
    elif config.feedback and moments is None:
        moments = moments_without_data(model, config.feedback, progress)
    rows, attached = _quantize_loaded(model, config, moments, progress)
    model.config.quantization_config = config
    model.hf_quantizer = TurboQuantizer(config, pre_quantized=True)
    model.hf_quantizer.attached = attached
    model.is_quantized, model.quantization_method = True, NAME
    return rows


def _quantize_loaded(
    model: Any, config: TurboQuantConfig, moments: Mapping[str, Tensor] | None, progress: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Rows of `quantize_model`, and the handle of the cache."""
    plan, recipe, head = config.plan(), parse_recipe(config.recipe), _head(model)
    if _tied(model) and any(_is_end(m, head) for _, m, _ in list(targets(model, plan, head))):
        untie(model)
    rows = quantize_model(model, plan, head, moments, progress)
    fuse_decoders(model)
    _keep_size(model)
    model._weight_conversions = []  # the saved names are the modules' own
    return rows, attach(model, recipe) if recipe.kv is not None else None


def _keep_size(model: Any) -> None:
    """Let a model with packed embeddings refuse another number of tokens, over which transformers would trip."""
    head = _head(model)
    ends = [
        name for name, m in model.named_modules()
        if isinstance(m, QuantEmbedding) or (m is head and isinstance(m, QuantLinear) and m.recipe.weights)
    ]  # fmt: skip
    if ends:
        have = model.config.get_text_config(decoder=True).vocab_size  # not the model, which would then hold itself
        model.resize_token_embeddings = partial(_refuse_size, model.get_input_embeddings(), ends[0], have)


def _refuse_size(
    inputs: torch.nn.Module, name: str, have: int, new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    if new_num_tokens in (None, have) and have % (pad_to_multiple_of or 1) == 0:
        return inputs
    raise RecipeError(
        f"resize_token_embeddings: {name} is packed and keeps its {have} tokens; resize the model first and then "
        "quantize it, or load it without head=8 and embed=8"
    )


def _tied(model: Any) -> bool:
    """Whether input and output embeddings, or other parts, share a weight."""
    return bool(getattr(model, "all_tied_weights_keys", None))


def _is_end(module: Any, head: Any) -> bool:
    return module is head or isinstance(module, torch.nn.Embedding)


def check_ends(model: Any, plan: Plan, head: Any) -> None:
    """Raises:
    RecipeError: embed=8 would leave a 16-bit copy of the same weight as output embeddings, or as other input ones.
    """
    ends = [m for _, m, _ in targets(model, plan, head) if _is_end(m, head)]
    inputs = next((m for m in ends if m is not head), None)
    for name in {n for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items() for n in pair}:
        other = model.get_submodule(name.rpartition(".")[0])
        if inputs is not None and isinstance(other, torch.nn.Embedding) and other is not inputs:
            raise RecipeError(
                f"{plan.recipe.name!r}: {name} is the input embeddings' too, of which embed=8 would make a copy"
            )
    if ends and head not in ends and _tied(model):
        name = next((n for n, m in model.named_modules() if m is head), "the output embeddings")
        asked = plan.recipe.weights is not None and plan.recipe.weights.head
        mend = f"{name} is left as it is, so leave embed=8 out too" if asked else "add head=8, or leave embed=8 out"
        raise RecipeError(
            f"{plan.recipe.name!r}: this model's input and output embeddings are one weight, of which embed=8 "
            f"alone would make a second copy; {mend}"
        )


def _head(model: Any) -> Any:
    """The output embeddings, None if there are none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def untie(model: Any) -> None:
    """Give the output embeddings a weight of their own, in this model and in its configuration."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = False
    for m in model.modules():
        if hasattr(m, "all_tied_weights_keys"):
            m.all_tied_weights_keys = {}
