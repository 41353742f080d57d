"""What choices of the linear recipes buy on one model: each variant against the model unquantized.

python benchmarks/linear_ablation.py --model model.gguf --text prose.txt --text tech.txt --text code.txt

4,096 tokens in windows of 1024 rank variants and measure nothing finely. Variants of `a4` and `w8` change constants of
the tracker, of the rounding or of the grid; variants of `w4a8` are error feedback along second moments that need no
text: of the norms' weights alone, of random tokens, and of what the model says itself, starting from random tokens at
temperature 1.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from turboquant.evaluate import fidelity
from turboquant.evaluate.models import load
from turboquant.layers.convert import norm_prior
from turboquant.layers.moments import moments_without_data
from turboquant.maths import activations, weights
from turboquant.maths.activations import HotTracker


def from_norms(model: Any) -> dict[str, Tensor]:
    """Second moments that the weights of the norms alone imply: diag(γ²)."""
    out = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and (prior := norm_prior(model, name)) is not None:
            out[name] = torch.diag(prior.square())
    return out


CONSTANTS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # variant -> recipe, what holds the constants, these
    "a4": ("a4", HotTracker, {}),
    "without the peak": ("a4", HotTracker, {"PEAK": 1e30}),
    "peak/4": ("a4", HotTracker, {"PEAK": 4.0}),
    "renewed at any drift": ("a4", HotTracker, {"KEEP": 1.0}),
    "one step tried": ("a4", activations, {"STEP_SHARES": (1.0,)}),
    "one in 8 channels hot": ("a4:ahot=8", HotTracker, {}),
    "groups of 32": ("a4:agroup=32", HotTracker, {}),
    "w8": ("w8", weights, {}),
    "one scale tried": ("w8", weights, {"FINE_SHARES": (1.0,)}),
}
WEIGHTS: dict[str, Callable[[Any], dict[str, Tensor]] | None] = {
    "w4a8": None, "feedback from the norms": from_norms,
    "feedback on random tokens": lambda m: moments_without_data(m, "random"),
    "feedback on its own words": lambda m: moments_without_data(m, "self"),
}  # fmt: skip


def main() -> None:
    """Print a row a variant."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="hub name, folder or .gguf file")
    p.add_argument("--text", type=Path, action="append", required=True)
    p.add_argument("--variant", action="append", choices=[*CONSTANTS, *WEIGHTS], help="instead of all; repeatable")
    p.add_argument("--recipe", default="w4a8", help="of the variants of feedback")
    p.add_argument("--ctx", type=int, default=1024)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model, args.dtype, args.device)
    print("| variant | dPPL % | KL | top-1 | seconds for the moments |\n|---|---|---|---|---|", flush=True)
    for name in args.variant or (*CONSTANTS, *WEIGHTS):
        began, moments, recipe = time.time(), None, args.recipe
        changed: Any = nullcontext()
        if name in CONSTANTS:
            recipe, where, constants = CONSTANTS[name]
            changed = patch.multiple(where, **constants) if constants else changed
        elif (make := WEIGHTS[name]) is not None:
            moments = make(model)
        spent = time.time() - began
        with changed:
            rows = fidelity(model, tokenizer, [recipe], args.text, args.ctx, args.tokens, stride=2, moments=moments)
        r = rows[-1]
        print(
            f"| {recipe}, {name} | {r['dppl_percent']:+.2f} ± {r['dppl_se']:.2f} | {r['kl']:.4f} | {r['top1']:.1f} | "
            f"{spent:.0f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
