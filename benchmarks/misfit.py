"""How far pages drift from the statistics before them (`ChannelTracker.misfit`), which drift alarms of the vLLM plugin
count from DRIFT on: quantiles over pages, layers and heads of texts, and of a text that ends in one word without end.

`python benchmarks/misfit.py MODEL TEXT [TEXT...] [--tokens 2048]`
"""

import argparse
from pathlib import Path

import torch

from turboquant import TurboQuantCache
from turboquant.evaluate.models import load
from turboquant.maths.tracker import DRIFT, ChannelStats, ChannelTracker
from turboquant.packed.buffers import STATES


@torch.no_grad()
def misfits(model: object, ids: torch.Tensor) -> torch.Tensor:
    """(pages - 1, layers, heads) of a text (1, tokens), read page by page."""
    cache = TurboQuantCache(model, "kv4")
    kv, rows = cache.recipe.kv, []
    for page in range(ids.shape[1] // kv.page):
        model(ids[:, page * kv.page : (page + 1) * kv.page], past_key_values=cache, use_cache=True)
        for layer in cache.ours if page else ():
            states = layer.cache.buf.tracker[0].cpu()
            before, after = (ChannelStats.unstack(states[p % STATES]) for p in (page - 1, page))
            rows.append(ChannelTracker.misfit(before, after, kv.decay, kv.hot_channels(states.shape[-1])))
    return torch.stack(rows).unflatten(0, (-1, len(cache.ours)))


def main() -> None:
    """Print one row a text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    model, tokenizer = load(given.model, "float32")
    rows = {t.stem: tokenizer(t.read_text()[: 12 * given.tokens])["input_ids"][: given.tokens] for t in given.texts}
    first = next(iter(rows.values()))[: given.tokens // 2]
    rows["one word"] = first + tokenizer(" the" * given.tokens)["input_ids"][: given.tokens - len(first)]
    for name, ids in rows.items():
        x = misfits(model, torch.tensor([ids])).flatten()
        at = torch.quantile(x, torch.tensor([0.5, 0.99, 1.0])).tolist()
        alarms = (x >= DRIFT).float().mean()
        print(f"{name}: median {at[0]:.2f}, 99 % {at[1]:.2f}, most {at[2]:.2f}; alarms {alarms:.2%}")


if __name__ == "__main__":
    main()
