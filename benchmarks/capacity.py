"""Tokens of cache in a given memory inside vLLM: bf16, fp8, and recipes with everything a running request holds.

Ours counts whole blocks: a page for each 64 tokens begun, and the blocks of the 16-bit tail (docs/vllm.md).

    python benchmarks/capacity.py --gib 10 --length 8192 32768 --recipe kv4 --recipe k4v3
"""

import argparse

import torch

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.recipe import parse_recipe

SHAPES = {  # layers, KV heads, head_dim
    "Qwen3-8B": (36, 8, 128),
    "Llama-3.1-70B": (80, 8, 128),
    "Qwen2.5-Coder-0.5B": (24, 2, 64),
}


def tokens(gib: float, shape: tuple[int, int, int], recipe: str, length: int) -> int:
    """Tokens in gib GiB where every request has `length` of them; recipe "bf16", "fp8" or one of ours."""
    layers, heads, dim = shape
    room = gib * 2**30
    if recipe in ("bf16", "fp8"):
        per_token = layers * heads * dim * 2 * (2 if recipe == "bf16" else 1)
        return int(room / per_token)
    kv = parse_recipe(recipe).kv
    assert kv is not None
    layout = BlockLayout(kv, dim, torch.bfloat16)
    blocks = -(-length // kv.page) + layout.sink_blocks + layout.window // layout.tokens + 1
    return int(room / (blocks * layout.row * heads * layers) * length)


def main() -> None:
    """Print a table in Markdown."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gib", type=float, default=10.0, help="memory for the cache")
    p.add_argument("--length", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens of a request")
    p.add_argument("--recipe", action="append", help="of ours, several times for more; default kv4 and k4v3")
    args = p.parse_args()
    names = ["bf16", "fp8", *(args.recipe or ["kv4", "k4v3"])]
    print(f"| model | tokens of a request | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for model, shape in SHAPES.items():
        for length in args.length:
            row = [tokens(args.gib, shape, n, length) for n in names]
            cells = [f"{t:,}" + (f" (×{t / row[0]:.2f})" if i else "") for i, t in enumerate(row)]
            print(f"| {model} | {length:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
