"""Prefill and decode speed, memory and bytes moved of recipes against the model as it was loaded, in one run."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from turboquant.evaluate.attention import implementation
from turboquant.evaluate.baselines import Baseline
from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import BASE, linear_kernels, scheme, scheme_name
from turboquant.evaluate.linear import LinearBaseline, linear_scheme
from turboquant.kernels.ops import explain
from turboquant.layers.convert import Quantized
from turboquant.layers.embedding import QuantEmbedding
from turboquant.recipe import Recipe


@torch.no_grad()
def bench(
    model: Any,
    recipes: Sequence[str | Recipe] = ("w4a8kv4",),
    prompt: int = 512,
    new: int = 32,
    batch: int = 1,
    repeats: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Medians over `repeats` of reading a prompt of random tokens and of decoding after it, one token at a time.

    Returns:
        rows, the model as it was loaded first: {"recipe", "dtype", "device", "prompt", "new", "batch",
        "prefill_tokens_per_second", "decode_tokens_per_second", "prefill_speedup", "decode_speedup", "weight_bytes",
        "cache_bytes", "moved_bytes" (read for one decode step: every weight but the input embeddings, and the cache),
        "moved_share" (of the base's), "linear_kernel", "cache_kernel"}. Bytes are those of the tensors
        that the device holds, with what its kernels prepared of packed weights.

    Raises:
        EvaluateError, RecipeError: before any work.
    """
    for name, value in (("prompt", prompt), ("new", new), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise EvaluateError(f"{name}={value} is not allowed: at least 1")
    plan = [s for s in map(scheme, recipes) if s != BASE]
    if any(isinstance(s, Baseline | LinearBaseline) for s in plan):
        raise EvaluateError("only recipes can be timed; baselines are computed, not stored")
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    rows: list[dict[str, Any]] = []
    for s in [BASE, *plan]:
        with implementation(model), linear_scheme(model, s), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the model was set up for")  # with its own cache: base has another
            rows.append(_time(model, s, ids, new, repeats, progress) | {"recipe": scheme_name(s)})
        base = rows[0]
        rows[-1] |= {f"{k}_speedup": rows[-1][f"{k}_tokens_per_second"] / base[f"{k}_tokens_per_second"]
                     for k in ("prefill", "decode")}  # fmt: skip
        rows[-1]["moved_share"] = rows[-1]["moved_bytes"] / base["moved_bytes"]
    return rows


def _cache(model: Any, s: Any) -> Any:
    from transformers import DynamicCache

    from turboquant.integrations.transformers import TurboQuantCache

    if isinstance(s, Recipe) and s.kv is not None:
        return TurboQuantCache(model, s)
    cache = DynamicCache(config=model.config)
    cache._is_user_defined = True  # a folder that was written with a cache recipe would put its own in the place
    return cache


def _time(model: Any, s: Any, ids: torch.Tensor, new: int, repeats: int, progress: Any) -> dict[str, Any]:
    prefill, decode, name = [], [], scheme_name(s)
    cache: Any = None
    for i in range(repeats + 1):  # the first one warms up
        cache = _cache(model, s)
        began = _now(model)
        out = model(ids, past_key_values=cache, logits_to_keep=1)
        read = _now(model)
        cache = out.past_key_values  # of a model set up for kv4 it is another one than was given
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(new):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        done = _now(model)
        if i:
            prefill.append(read - began)
            decode.append((done - read) / new)
        if progress:
            progress(name, i + 1, repeats + 1)
    b, n = ids.shape
    slots = [slot for m in model.modules() if isinstance(m, Quantized) for slot in m.slots.values()]
    own = {id(t) for slot in slots for t in (*slot.module.buffers(), getattr(slot.module, slot.name))}
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    untied = head is None or getattr(head, "weight", None) is not inputs.weight
    looked_up = inputs.slot.packed().nbytes if isinstance(inputs, QuantEmbedding) else inputs.weight.nbytes
    held, moved = (
        sum(weights.values()) + sum(slot.nbytes(ids.device, read) for slot in slots) for read in (False, True)
    )
    kept = cache.nbytes()["total"] if hasattr(cache, "nbytes") else sum(
        x.keys.nbytes + x.values.nbytes for x in cache.layers if getattr(x, "keys", None) is not None
    )  # fmt: skip
    layout = next((c.cache.layout for c in getattr(cache, "ours", [])), None)
    kernels = {r["kernel"] for r in explain(layout, ids.device, model.dtype)} if layout else {"transformers"}
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(ids.device) if ids.device.type == "cuda" else str(ids.device),
        "prompt": n,
        "new": new,
        "batch": b,
        "prefill_tokens_per_second": b * n / statistics.median(prefill),
        "decode_tokens_per_second": b / statistics.median(decode),
        "weight_bytes": held,
        "cache_bytes": kept,
        "moved_bytes": moved - (looked_up if untied else 0) + kept,
        "linear_kernel": linear_kernels(model, ids.device) or "torch",
        "cache_kernel": ", ".join(sorted(kernels)),
    }


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
