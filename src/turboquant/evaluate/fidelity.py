"""What a quantized cache costs: the same windows of text, teacher-forced, with and without it.

Perplexity alone can improve by luck; the KL divergence, the top-1 agreement and the overlap of the next-token
distributions decide. Recipes run through the real TurboQuantCache, every row reading exactly what it would read in
decode (`row_exact`); whole windows are fed at once, since the cache splits them itself where that matters. Base and
changed hidden states are kept, never logits.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboquant import __version__
from turboquant.evaluate.attention import implementation
from turboquant.evaluate.baselines import BASELINES, Baseline
from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.heads import Head
from turboquant.evaluate.linear import LINEAR_BASELINES, LinearBaseline, linear_bits, linear_scheme
from turboquant.evaluate.results import Rows, finite
from turboquant.evaluate.texts import digest, read_texts, windows
from turboquant.kernels.ops import choose, explain, use_backend
from turboquant.layers.linear import QuantExperts, QuantLinear
from turboquant.recipe import Recipe, RecipeError, parse_recipe

BASE = "base"
PIECE = 8192  # columns fed in one forward pass
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}

Progress = Callable[[str, int, int], None]  # (what, done, of)


@dataclass
class _Run:
    """What one pass over all windows gave: final hidden states (windows, ctx, hidden), and facts for the row."""

    hidden: Tensor
    facts: dict[str, Any]
    head: Head


Scheme = str | Baseline | LinearBaseline | Recipe


def scheme(name: str | Recipe) -> Scheme:
    """ "base", a baseline or a Recipe by its name.

    Raises:
        RecipeError: none of them.
    """
    if name == BASE:
        return BASE
    if isinstance(name, str) and name in BASELINES:
        return BASELINES[name]
    if isinstance(name, str) and name in LINEAR_BASELINES:
        return LINEAR_BASELINES[name]
    try:
        recipe = parse_recipe(name)
    except RecipeError as e:
        if "unknown recipe" not in str(e):
            raise
        others = ", ".join((BASE, *BASELINES, *LINEAR_BASELINES))
        raise RecipeError(f"{str(e).rstrip('.')}. To compare with: {others}.") from None
    if recipe == Recipe():
        raise RecipeError("recipe 'none' quantizes nothing: name one with weights, activations or cache")
    return recipe


def schemes(recipes: str | Recipe | Sequence[str | Recipe]) -> list[Scheme]:
    """`scheme` of one or of several."""
    return [scheme(r) for r in ([recipes] if isinstance(recipes, str | Recipe) else recipes)]


def check_recipe(name: str) -> None:
    """Raises:
    EvaluateError: a scheme to compare with, which a model cannot run. RecipeError: neither that nor a recipe.
    """
    try:
        parse_recipe(name)
    except RecipeError as e:
        if name in (BASE, *BASELINES, *LINEAR_BASELINES):
            raise EvaluateError(f"recipe {name!r} is a scheme that eval compares with, and cannot generate") from e
        raise


def _has_kv(s: Scheme) -> bool:
    return isinstance(s, Recipe) and s.kv is not None


@torch.no_grad()
def fidelity(
    model: Any,
    tokenizer: Any,
    recipes: str | Recipe | Sequence[str | Recipe],
    texts: str | Path | Sequence[str | Path],
    ctx: int = 2048,
    tokens: int = 24_576,
    *,
    batch: int | None = None,
    stride: int = 1,
    name: str | None = None,
    json: str | Path | None = None,
    progress: Progress | None = None,
    moments: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> list[dict[str, Any]]:
    """Perplexity change, KL, top-1 and match of each recipe against the unquantized model.

    Args:
        model, tokenizer: a causal language model of transformers, in eval mode, and its tokenizer.
        recipes: one or several names of recipes ("kv4"), of baselines ("kivi-g32+ring", see baselines.py) or "base".
        texts: files (Path) or texts themselves (str).
        ctx: tokens of a window.
        tokens: at least so many tokens in all: ceil(tokens/ctx) windows, spread evenly over the texts.
        batch: windows at a time; by default what fits 8192 tokens on a CPU and 65536 on a GPU.
        stride: KL, top-1 and match are taken at every stride-th position.
        name: of the model, for the rows.
        json: file for the rows, written after every recipe. A rerun with the same settings keeps what is in it.
        progress: called with (recipe, windows done, windows of it).
        moments: second moments of the inputs of linear layers (`evaluate.linear.collect_moments`): weights are
            rounded with error feedback then, and "+feedback" stands behind the recipe's name in the rows.
        chunk: tokens of a forward pass, for the base and recipes without a cache too; by default PIECE where there is
            a cache. What fits a GPU's decode kernel (8) is what
            it serves; longer chunks are prompts to the kernels, though every row reads what decode reads.
        backend: that every op runs on, see `kernels.ops.use_backend`.

    Returns:
        one row a recipe, in their order: recipe, model, dtype, device, kernel, ctx, tokens, stride, chunk, backend,
        text, version;
        ppl_base, ppl, dppl_percent, dppl_se; kl (nats), top1, match (percent) and kl_se, top1_se, match_se;
        weight_bits, activation_bits of the linear layers and key_bits, value_bits (everything stored counted);
        cache_bytes (of them ring_bytes and state_bytes) and
        base_cache_bytes for cache_tokens tokens; nonfinite; seconds. The standard errors take positions as
        independent.

    Raises:
        EvaluateError, RecipeError: before any work: unknown recipe, a text shorter than ctx, too little text.
    """
    plan = schemes(recipes)
    if not plan:
        raise EvaluateError("recipes is empty; name at least one, for example 'kv4'")
    if stride < 1 or (batch is not None and batch < 1) or (chunk is not None and chunk < 1):
        raise EvaluateError(f"stride={stride}, batch={batch}, chunk={chunk} is not allowed: all must be at least 1")
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and ctx > most:
        raise EvaluateError(f"ctx={ctx} is more than this model was made for: at most {most} tokens")
    for s in plan:
        if isinstance(s, Recipe) and s.kv is not None:
            _cache(model, s)  # refuses head_dim and layer types it cannot serve
            if ctx <= (newest := max(s.kv.ring, s.kv.page)):
                warnings.warn(
                    f"ctx={ctx}: {s.name} reads nothing packed in windows so short, for its newest {newest} tokens are "
                    "as they were",
                    stacklevel=1,
                )
    contents = read_texts(texts)
    ids = windows(tokenizer, contents, ctx, tokens).to(model.device)
    batch = batch or max(1, BATCH_TOKENS.get(model.device.type, 8192) // ctx)
    settings = {
        "model": name or getattr(model.config, "_name_or_path", "") or model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _device_name(model.device),
        "ctx": ctx,
        "tokens": ids.numel(),
        "stride": stride,
        "chunk": chunk,
        "backend": backend,
        "text": digest(contents),
        "version": __version__,
    }
    rows = Rows(json, settings)
    mark = "+feedback" if moments else ""
    todo = [s for s in plan if scheme_name(s) + mark not in rows]
    if todo:
        say = progress or (lambda *_: None)
        head = Head.of(model, ids[:1, :8])
        feed = partial(_run, model, head, ids=ids, batch=batch, progress=say, chunk=chunk)
        base = feed(BASE)
        states, target = base.hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        nll = head.nll(states, target)
        for s in todo:
            with use_backend(backend):
                run = base if s == BASE else feed(s, moments=moments)
            changed = run.hidden[:, :-1].flatten(0, 1)
            some = torch.arange(0, len(target), stride, device=target.device)
            scores = head.compare(states[some], changed[some], run.head)
            same = ("cache_bytes", "ring_bytes", "state_bytes", "key_bits", "value_bits")
            facts = {k: base.facts[k] for k in same} if not isinstance(s, Baseline) else {}
            facts |= {"base_cache_bytes": base.facts["cache_bytes"]} | run.facts
            if isinstance(s, Baseline):
                facts |= _baseline_bytes(s, base.facts)
            rows.add(scheme_name(s) + mark, _statistics(nll, run.head.nll(changed, target), scores) | facts)
    return [rows[scheme_name(s) + mark] for s in plan]


def scheme_name(s: Scheme) -> str:
    """As it was asked for; the cache's plain4 keeps an option in its name, for "plain4" alone is the baseline."""
    if isinstance(s, Recipe) and s.kv is not None and s.name in BASELINES:
        return f"{s.name}:ring={s.kv.ring}"
    return s if isinstance(s, str) else s.name


def _cache(model: Any, recipe: Recipe) -> Any:
    from turboquant.integrations.transformers import TurboQuantCache

    with implementation(model):  # making a cache switches the model; here only its checks are wanted
        cache = TurboQuantCache(model, recipe)
    cache.row_exact = True
    return cache


def _run(
    model: Any,
    head: Head,
    s: Scheme,
    ids: Tensor,
    batch: int,
    progress: Progress,
    chunk: int | None,
    moments: Any = None,
) -> _Run:
    """All windows through the model under one scheme."""
    from transformers import DynamicCache

    from turboquant.integrations.transformers.attention import NAME

    began, hidden, facts = time.perf_counter(), [], dict[str, Any]()
    attention = NAME if _has_kv(s) else s.attention if isinstance(s, Baseline) else None
    nonfinite = 0
    progress(scheme_name(s), 0, len(ids))
    with implementation(model, attention), linear_scheme(model, s, moments):
        head = replace(head, linear=model.get_output_embeddings())
        for i in range(0, len(ids), batch):
            part = ids[i : i + batch]
            cache: Any = None
            if isinstance(s, Recipe) and s.kv is not None:
                cache = _cache(model, s)
            elif s == BASE or (chunk is not None and not isinstance(s, Baseline)):
                cache = DynamicCache(config=model.config)
            hidden.append(_forward(head.decoder, part, cache, chunk or PIECE))
            if _has_kv(s):
                nonfinite += cache.nonfinite_tokens
            facts = facts or _facts(s, cache, part, chunk or PIECE) | _linear_facts(model, s, part.device)
            progress(scheme_name(s), min(i + batch, len(ids)), len(ids))
    facts |= {"nonfinite": nonfinite, "seconds": round(time.perf_counter() - began, 2)}
    return _Run(torch.cat(hidden), facts, head)


def _forward(decoder: Any, ids: Tensor, cache: Any, chunk: int = PIECE) -> Tensor:
    """(windows, ctx) ids -> (windows, ctx, hidden); with a cache in pieces, since masks grow with their square."""
    if cache is None:
        return decoder(input_ids=ids, use_cache=False).last_hidden_state
    parts = [
        decoder(input_ids=ids[:, i : i + chunk], past_key_values=cache, use_cache=True).last_hidden_state
        for i in range(0, ids.shape[1], chunk)
    ]
    return torch.cat(parts, 1)


def _facts(s: Scheme, cache: Any, ids: Tensor, chunk: int) -> dict[str, Any]:
    """Bits, bytes and kernel of the first batch."""
    out: dict[str, Any] = {"cache_tokens": ids.numel()}
    if _has_kv(s):
        size = cache.nbytes()
        key_bits, value_bits = cache.bits()
        layout, dtype = cache.ours[0].cache.layout, cache.ours[0].cache.buf.ring_k.dtype
        kernels = {row["op"]: row["kernel"] for row in explain(layout, ids.device, dtype, min(chunk, layout.kv.chunk))}
        same = set(kernels.values())
        kernel = same.pop() if len(same) == 1 else ", ".join(f"{op}: {k}" for op, k in kernels.items())
        out |= {"key_bits": key_bits, "value_bits": value_bits, "kernel": kernel}
        out |= {"cache_bytes": size["total"], "ring_bytes": size["ring"], "state_bytes": size["state"]}
    elif s == BASE:
        layers = [x for x in cache.layers if getattr(x, "keys", None) is not None]
        bits = layers[0].keys.dtype.itemsize * 8.0
        out |= {"key_bits": bits, "value_bits": bits, "kernel": "transformers"}
        out |= {"cache_bytes": sum(x.keys.nbytes + x.values.nbytes for x in layers), "ring_bytes": 0, "state_bytes": 0}
        out["shapes"] = [tuple(x.keys.shape) for x in layers]
    return out


def _linear_facts(model: Any, s: Scheme, device: torch.device) -> dict[str, Any]:
    """Bits and kernel of the linear layers, and the unquantized cache's figures where the scheme leaves it alone."""
    out: dict[str, Any] = linear_bits(model, s)
    if isinstance(s, LinearBaseline):
        return out | {"kernel": "fake-quant"}
    if isinstance(s, Recipe) and s.linear is not None:
        out["linear_kernel"] = linear_kernels(model, device)
        if s.kv is None:
            out["kernel"] = out["linear_kernel"]
    return out


def linear_kernels(model: Any, device: torch.device) -> str:
    """Kernels of the quantized layers that a model has now, "" if it has none."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear | QuantExperts)]
    specs = {slot.spec(model.dtype) for m in layers for slot in m.slots.values()}
    return ", ".join(sorted({choose("linear", spec, device)[0] for spec in specs}))


def _baseline_bytes(s: Baseline, base: dict[str, Any]) -> dict[str, Any]:
    """What a cache of this scheme would take for the numbers in the base's cache; nothing is allocated for it."""
    total = ring = key = value = weight = 0.0
    for b, h, n, d in base["shapes"]:
        key, value, weight = key + s.key_bits(d) * d, value + s.value_bits(d) * d, weight + d
        exact = min(n, s.ring + s.sinks)
        ring += 2 * b * h * exact * d * base["key_bits"] / 8
        total += b * h * n * d * (s.key_bits(d) + s.value_bits(d)) / 8
    return {
        "key_bits": key / weight,
        "value_bits": value / weight,
        "cache_bytes": round(total + ring),
        "ring_bytes": round(ring),
        "state_bytes": 0,
        "kernel": "fake-quant",
    }


def _statistics(base: Tensor, nll: Tensor, scores: Tensor) -> dict[str, float]:
    """The measures of a row from per-token NLL (n,) of both runs and (3, m) KL, top-1 and match."""
    difference, per_cent = (nll - base).double(), torch.tensor([[1.0], [100.0], [100.0]], dtype=torch.float64)
    scores = scores.double().cpu() * per_cent
    out = {
        "ppl_base": base.double().mean().exp().item(),
        "ppl": nll.double().mean().exp().item(),
        "dppl_percent": 100 * difference.mean().expm1().item(),
        "dppl_se": 100 * difference.mean().exp().item() * standard_error(difference),
    }
    for key, x in zip(("kl", "top1", "match"), scores, strict=True):
        out |= {key: x.mean().item(), f"{key}_se": standard_error(x)}
    return {key: finite(x) for key, x in out.items()}


def standard_error(x: Tensor) -> float:
    """Standard error of the mean of independent samples (n,)."""
    return (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
