"""Linear layers under a scheme: recipes through the real quantized modules, and fake quantizers to compare with.

w4-rtn, w4-rtn-g32  weights rounded to nearest, asymmetric int4 in groups of 128 or 32, minimum to maximum
nf4                 weights in the NF4 levels of QLoRA (arXiv:2305.14314), blocks of 64 with one fp32 absmax, not doubly
                    quantized: bitsandbytes' 4-bit linear layer
int8-chan           weights absmax int8, one scale an output channel
a8-token, a4-token  activations absmax per token, unrotated: what most engines do
a4-g32              activations asymmetric int4 in groups of 32, unrotated
w8a8-token          int8-chan and a8-token together
llm-int8            the same, but input channels with an entry beyond 6 in 16 bit (arXiv:2208.07339): bitsandbytes' int8
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.texts import encode, read_texts, windows
from turboquant.layers.convert import Plan, Quantized, experts_products, quantized
from turboquant.layers.embedding import QuantEmbedding
from turboquant.layers.moments import Progress, moments_of, tokens_for
from turboquant.recipe import Recipe, parse_recipe

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _asymmetric(x: Tensor, group: int) -> Tensor:
    g = x.unflatten(-1, (-1, gcd(x.shape[-1], group)))
    low = g.amin(-1, keepdim=True)
    step = ((g.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-12)
    return (((g - low) / step).round() * step + low).flatten(-2)


def _absmax(x: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    step = (x.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
    return (x / step).round().clamp(-top, top) * step


def _nf4(w: Tensor) -> Tensor:
    levels = torch.tensor(NF4, device=w.device)
    g = w.unflatten(-1, (-1, gcd(w.shape[-1], 64)))
    top = g.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    codes = torch.bucketize((g / top).contiguous(), (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * top).flatten(-2)


def _llm_int8(x: Tensor) -> Tensor:
    large = (x.abs() > 6.0).flatten(0, -2).any(0)
    return torch.where(large, x, _absmax(torch.where(large, 0.0, x), 8))


@dataclass(frozen=True)
class LinearBaseline:
    """One scheme; weight, activation: fp32 -> the same, as decoded, or None; bits by the width of a row."""

    name: str
    weight: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    weight_bits: Callable[[int], float] = lambda k: 16.0
    activation_bits: Callable[[int], float] = lambda k: 16.0


def _schemes() -> dict[str, LinearBaseline]:
    chan, token = (lambda w: _absmax(w, 8)), (lambda x: _absmax(x, 8))
    eight = lambda k: 8 + 32 / k  # noqa: E731
    out = [
        LinearBaseline("w4-rtn", lambda w: _asymmetric(w, 128), None, lambda k: 4 + 24 / gcd(k, 128)),
        LinearBaseline("w4-rtn-g32", lambda w: _asymmetric(w, 32), None, lambda k: 4 + 24 / gcd(k, 32)),
        LinearBaseline("nf4", _nf4, None, lambda k: 4 + 32 / gcd(k, 64)),
        LinearBaseline("int8-chan", chan, None, eight),
        LinearBaseline("a8-token", None, token, activation_bits=eight),
        LinearBaseline("a4-token", None, lambda x: _absmax(x, 4), activation_bits=lambda k: 4 + 32 / k),
        LinearBaseline("a4-g32", None, lambda x: _asymmetric(x, 32), activation_bits=lambda k: 4 + 32 / gcd(k, 32)),
        LinearBaseline("w8a8-token", chan, token, eight, eight),
        LinearBaseline("llm-int8", chan, _llm_int8, eight, eight),
    ]
    return {b.name: b for b in out}


LINEAR_BASELINES = _schemes()


@contextmanager
def linear_scheme(model: Any, s: Any, moments: Any = None) -> Iterator[None]:
    """Within the context the model's linear layers are those of a recipe or of a baseline; afterwards its own again."""
    wanted = _wanted(s)
    stored = _stored(model)
    _check_stored(stored, s)
    if wanted is None or stored is not None:
        yield  # the model as it is
    elif isinstance(s, Recipe) and s.linear is not None:
        from turboquant.integrations.transformers.quantizer import check_ends

        check_ends(model, Plan(s), model.get_output_embeddings())
        with quantized(model, Plan(s), model.get_output_embeddings(), moments):
            yield
    else:
        with _faked(model, s):
            yield


def _wanted(s: Any) -> Any:
    """What a scheme makes of linear layers, None if it leaves them alone."""
    return s.linear if isinstance(s, Recipe) else s if isinstance(s, LinearBaseline) else None


def _check_stored(stored: Recipe | None, s: Any) -> None:
    wanted = _wanted(s)
    if stored is not None and wanted is not None and wanted != stored.linear:
        raise EvaluateError(
            f"the model's linear layers are stored as {stored.name!r} and cannot be quantized again: name a recipe for "
            "the cache alone, or the model that it was made from"
        )


def check_folder(name: str | Path, schemes: Sequence[Any]) -> None:
    """Refuse, before it is loaded, what `linear_scheme` refuses of a folder that `quantize` wrote.

    Raises:
        EvaluateError: its linear layers are stored, and a scheme would have them otherwise.
    """
    from turboquant.integrations.transformers.attention import NAME

    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if config["quant_method"] != NAME:
            return
        stored, overrides = parse_recipe(config["recipe"]), config.get("overrides", {}).values()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # another model; loading says what is wrong with it, if anything is
    if stored.linear is not None or any(r != "none" for r in overrides):
        for s in schemes:
            _check_stored(stored, s)


def _stored(model: Any) -> Recipe | None:
    """The recipe of a model that holds quantized layers already, None of any other."""
    if not any(isinstance(m, Quantized) for m in model.modules()):
        return None
    return folder_recipe(model) or Recipe()


def folder_recipe(model: Any) -> Recipe | None:
    """What the folder that a model came from was written with, None if it says nothing of a recipe."""
    config = getattr(model.config, "quantization_config", None)
    recipe = parse_recipe(getattr(config, "recipe", Recipe()))
    return recipe if recipe != Recipe() else None


def stored_note(model: Any) -> str | None:
    """What a comparison with a folder of quantized layers cannot show, None for any other model."""
    recipe = _stored(model)
    if recipe is None or recipe.weights is None:
        return None
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Quantized) and m is not head]
    floats = sum(not isinstance(m, Quantized) for m in layers)
    some = f" ({len(layers) - floats} of them; {floats} are as they were)" if floats else ""
    return (
        f"The linear layers{some} are stored as {recipe.name!r}, and what rows are compared with has them too: only "
        "the cache differs. For what the weights cost and gain, name the model that the folder was made from."
    )


@contextmanager
def _faked(model: Any, s: LinearBaseline) -> Iterator[None]:
    if any(experts_products(m) for m in model.modules()):
        raise ValueError(f"baseline {s.name!r} knows linear layers only, and this model has stacks of experts")
    head, kept, handles = model.get_output_embeddings(), {}, []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]

    def hook(module: nn.Module, args: tuple) -> tuple:
        assert s.activation is not None
        return (s.activation(args[0].float()).to(args[0].dtype), *args[1:])

    try:
        for m in layers:
            if s.weight is not None:
                kept[m] = m.weight.data
                m.weight.data = s.weight(m.weight.data.float()).to(m.weight.dtype)
            if s.activation is not None:
                handles.append(m.register_forward_pre_hook(hook))
        yield
    finally:
        for m, w in kept.items():
            m.weight.data = w
        for handle in handles:
            handle.remove()


def linear_bits(model: Any, s: Any) -> dict[str, float]:
    """True bits per weight and per activation number of the linear layers, averaged over them, and per weight of
    embeddings that are packed; to call within `linear_scheme`."""
    weights = activations = inputs = count = 0.0
    head, whole = model.get_output_embeddings(), model.dtype.itemsize * 8.0
    for m in model.modules():
        if isinstance(m, Quantized):
            for slot in m.slots.values():
                *_, n, k = slot.shape
                numbers, r = n * k * (slot.shape[0] if len(slot.shape) == 3 else 1), slot.recipe
                weights += numbers * (r.weights.bits_per_weight(k) if r.weights else whole)
                count += numbers
                if not isinstance(m, QuantEmbedding):  # which looks rows up: no numbers enter it
                    activations += k * (r.activations.bits_per_activation(k) if r.activations else whole)
                    inputs += k
        elif isinstance(s, LinearBaseline) and isinstance(m, nn.Linear) and m is not head:
            n, k = m.weight.shape
            weights += n * k * (s.weight_bits(k) if s.weight else whole)
            activations += k * (s.activation_bits(k) if s.activation else whole)
            count, inputs = count + n * k, inputs + k
    return {
        "weight_bits": weights / count if count else whole,
        "activation_bits": activations / inputs if inputs else whole,
    }


def collect_moments(
    model: Any, tokenizer: Any, text: str | Path, tokens: int | None = None, ctx: int = 512,
    progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Second moments of the inputs of a model's linear layers on a text: name -> (K, K) fp32.

    Args:
        tokens: by default as many as the widest layer needs (`layers.moments.tokens_for`), or as the text holds.

    Raises:
        EvaluateError: the text is too short.
        FeedbackError: fewer tokens than a layer has inputs.
    """
    texts, wanted = read_texts(text), tokens_for(model) if tokens is None else tokens
    try:
        ids = windows(tokenizer, texts, ctx, wanted)
    except EvaluateError:  # too short for as many: what there is, of which moments_of says if it is too little
        held = min(len(encode(tokenizer, content)) for _, content in texts) // ctx * ctx
        if tokens is not None or held == 0:
            raise
        ids = windows(tokenizer, texts, ctx, held)
    return moments_of(model, ids, progress)
