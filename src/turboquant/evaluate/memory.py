"""Bytes of caches by what is really allocated."""

from collections.abc import Sequence
from typing import Any

import torch

from turboquant.evaluate.attention import implementation
from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import BASE, scheme, scheme_name
from turboquant.recipe import Recipe


@torch.no_grad()
def memory(
    model: Any, recipes: Sequence[str | Recipe] = ("kv4",), tokens: int = 2048, batch: int = 1, chunk: int = 1024
) -> list[dict[str, Any]]:
    """Fill each cache with `tokens` tokens of `batch` sequences and add up the tensors that it holds.

    Args:
        model: a causal language model of transformers.
        recipes: recipes; the unquantized cache always comes first.
        chunk: tokens of a forward pass.

    Returns:
        rows {"recipe", "tokens" (batch·tokens), "sequences", "pages_bytes", "ring_bytes", "state_bytes", "total_bytes",
        "bytes_per_token", "pages_per_token" (what one token more costs), "ratio"}; the base's
        numbers stand in pages_bytes; ratio says how many times smaller than a 16-bit cache of the same tokens.

    Raises:
        EvaluateError, RecipeError: before any work.
    """
    from transformers import DynamicCache

    from turboquant.integrations.transformers import TurboQuantCache

    if tokens < 1 or batch < 1:
        raise EvaluateError(f"tokens={tokens}, batch={batch} is not allowed: both must be at least 1")
    plan = [scheme(r) for r in recipes]
    if any(not (s == BASE or (isinstance(s, Recipe) and s.kv)) for s in plan):
        raise EvaluateError("only recipes have a cache that can be measured; baselines are computed, not stored")
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    rows: list[dict[str, Any]] = []
    sixteen = 0.0
    for s in [BASE, *(s for s in plan if s != BASE)]:
        with implementation(model):
            cache: Any = TurboQuantCache(model, s) if isinstance(s, Recipe) else DynamicCache(config=model.config)
            for i in range(0, tokens, chunk):
                model.get_decoder()(input_ids=ids[:, i : i + chunk], past_key_values=cache, use_cache=True)
        if isinstance(s, Recipe):
            parts = cache.nbytes()
        else:
            held = [x for x in cache.layers if getattr(x, "keys", None) is not None]
            parts = {"pages": sum(x.keys.nbytes + x.values.nbytes for x in held), "ring": 0, "state": 0}
        if s == BASE:
            sixteen = sum(parts.values()) * 2 / model.dtype.itemsize
        rows.append(_row(scheme_name(s), batch * tokens, batch, parts, sixteen))
    return rows


def _row(name: str, tokens: int, sequences: int, parts: dict[str, int], sixteen: float) -> dict[str, Any]:
    total = parts["pages"] + parts["ring"] + parts["state"]
    return {
        "recipe": name,
        "tokens": tokens,
        "sequences": sequences,
        "pages_bytes": parts["pages"],
        "ring_bytes": parts["ring"],
        "state_bytes": parts["state"],
        "total_bytes": total,
        "bytes_per_token": total / tokens,
        "pages_per_token": parts["pages"] / tokens,
        "ratio": sixteen / total,
    }


def from_fidelity(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows from what `fidelity` saw allocated (for baselines: computed from their bits)."""
    if not rows:
        return []
    first = rows[0]
    n, sequences, base = first["cache_tokens"], first["cache_tokens"] // first["ctx"], first["base_cache_bytes"]
    sixteen = base * 2 / getattr(torch, first["dtype"]).itemsize
    out = [_row(BASE, n, sequences, {"pages": base, "ring": 0, "state": 0}, sixteen)]
    for r in rows:
        if r["recipe"] != BASE:
            rest = r["cache_bytes"] - r["ring_bytes"] - r["state_bytes"]
            parts = {"pages": rest, "ring": r["ring_bytes"], "state": r["state_bytes"]}
            out.append(_row(r["recipe"], n, sequences, parts, sixteen))
    return out


def sixteen_bit_bytes(cache: Any) -> int:
    """What a 16-bit cache would hold for the tokens in a TurboQuantCache: keys and values, windows respected."""
    total = 0
    for layer in cache.ours:
        c = layer.cache
        if c.buf is not None:
            heads, dim = c.buf.ring_k.shape[1], c.buf.ring_k.shape[3]
            held = sum(n if c.window is None else min(n, c.window - 1) for n in c.lengths)
            total += 2 * 2 * heads * dim * held
    return total
