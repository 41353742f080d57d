"""What each part of the codec buys: attention output error on real keys, values and queries with that part changed.

python benchmarks/ablation.py            # a Markdown table, about a minute on two cores

Data: one KV head of four layers (tests/data/qkv.safetensors; two of them Qwen2.5 layers with violent key outliers).
Error: ‖out - exact‖/‖exact‖ over all positions, kv4 without a ring (sinks kept), so that all old tokens are read from
their pages. It ranks codecs cheaply; the figures that decide are those of benchmarks/fidelity.py.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from turboquant.kernels import reference
from turboquant.kernels.ops import use_backend
from turboquant.layers.cache import LayerCache
from turboquant.maths import codec
from turboquant.maths.codec import search_levels
from turboquant.maths.quantizer import least_squares_scale, rms, safe_divide
from turboquant.maths.tracker import ChannelStats, ChannelTracker
from turboquant.packed import buffers
from turboquant.recipe import parse_recipe

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "qkv.safetensors"
Change = Callable[[ExitStack], None]


def change(target: object, name: str, value: object) -> Change:
    """A change of the library that lasts as long as the stack."""
    return lambda stack: stack.enter_context(patch.object(target, name, value))


def both(*changes: Change) -> Change:
    """Several changes at once."""
    return lambda stack: [c(stack) for c in changes] and None


def _least_squares(y: torch.Tensor, bits: int) -> torch.Tensor:
    levels = codec.codebook(bits)
    c = levels[codec.nearest(safe_divide(y, rms(y)), levels).long()]
    return least_squares_scale(y, c).squeeze(-1)


def _rms_alone(bits: int) -> tuple[tuple[int, ...], ...]:
    return search_levels(bits)[:1]


def _no_mean(self: ChannelTracker, page: ChannelStats, blend: float) -> ChannelStats:
    raw = ChannelStats(page.mean, page.var + page.mean.square(), page.power)
    mixed = raw if self.state is None else self.state.blend(raw, blend)
    return ChannelStats(torch.zeros_like(page.mean), mixed.var, mixed.power)


def _by_sigma_key(self: ChannelStats, count: int) -> torch.Tensor:
    return torch.argsort(self.sigma_key(), dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


NOTHING: Change = lambda stack: None  # noqa: E731
ROWS: list[tuple[str, str, Change]] = [
    ("kv4 as shipped", "kv4", NOTHING),
    ("one trial scale (the RMS)", "kv4", change(codec, "search_levels", _rms_alone)),
    ("one trial, least-squares scale", "kv4", change(codec, "_row_scale", _least_squares)),
    ("no channel scale s", "kv4", change(ChannelStats, "scales", lambda self: torch.ones_like(self.var))),
    ("no mean", "kv4", change(ChannelTracker, "frozen", _no_mean)),
    ("hot channels by σ_K alone", "kv4", change(ChannelStats, "hot", _by_sigma_key)),
    (
        "reader power from every token instead of every 8th",
        "kv4",
        both(change(buffers, "READER_STRIDE", 1), change(reference, "READER_STRIDE", 1)),
    ),
    ("no hot channels", "kv4:hot=0", NOTHING),
    ("2 hot channels", "kv4:hot=2", NOTHING),
    ("8 hot channels", "kv4:hot=8", NOTHING),
    ("page of 32", "kv4:page=32", NOTHING),
    ("page of 128", "kv4:page=128", NOTHING),
    ("the page's own statistics only (blend 1)", "kv4:blend=1", NOTHING),
    ("decay 0.5", "kv4:decay=0.5", NOTHING),
    ("plain TurboQuant-4", "plain4", NOTHING),
]


def error(recipe: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Relative error of the attention outputs; q (Hq, n, d), k, v (1, n, d) fp32."""
    text = recipe + (":" if ":" not in recipe else ",") + "ring=0"
    with use_backend("reference"):  # what is changed is Python
        out = LayerCache(parse_recipe(text).kv).step(q[None], k[None], v[None], row_exact=True)[0]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return float((out - exact).norm() / exact.norm())


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data = {n: t.float() for n, t in load_file(DATA).items()}
    names = sorted({n.split(".")[0] for n in data})
    print("| variant | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for label, recipe, apply in ROWS:
        print(f"{label} ...", file=sys.stderr, end="\r")
        with ExitStack() as stack:
            apply(stack)
            cells = [error(recipe, data[f"{n}.q"], data[f"{n}.k"], data[f"{n}.v"]) for n in names]
        print(f"| {label} | " + " | ".join(f"{c:.4f}" for c in cells) + " |")


if __name__ == "__main__":
    main()
