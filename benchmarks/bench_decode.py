"""Decoding with a Llama-3-8B-shaped model (random weights, bf16) under CUDA graphs: a kv4 cache against a bf16 cache.

    python benchmarks/bench_decode.py --shape 8x32768 --shape 64x4096 --json out.json

Both run the same layers (norms, projections, MLP, output head; no rotary embedding), a whole step in one graph. The
bf16 cache is attended by torch's flash attention with the heads of a group packed as query rows, the best torch has
here. Caches are filled with random tokens; every layer has memory of its own, so nothing stays in the L2 cache.
`cache_bytes` is what is allocated.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import bench_cache
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turboquant.kernels import ops
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

WIDTH, HQ, H, DIM, HIDDEN, LAYERS, VOCABULARY = 4096, 32, 8, 128, 14336, 32, 128256
SHAPES = ("8x32768", "64x4096")
BF16 = torch.bfloat16


class Layer:
    """Weights of a decoder layer."""

    def __init__(self) -> None:
        draw = lambda *s: torch.randn(*s, device="cuda", dtype=BF16) * 0.02  # noqa: E731
        self.qkv, self.out = draw((HQ + 2 * H) * DIM, WIDTH), draw(WIDTH, HQ * DIM)
        self.up, self.down = draw(2 * HIDDEN, WIDTH), draw(WIDTH, HIDDEN)
        self.norm = torch.ones(WIDTH, device="cuda", dtype=BF16)

    def __call__(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        b = x.shape[0]
        y = F.linear(F.rms_norm(x, (WIDTH,), self.norm), self.qkv).view(b, HQ + 2 * H, 1, DIM)
        q, k, v = y[:, :HQ], y[:, HQ : HQ + H], y[:, HQ + H :]
        x = x + F.linear(attend(q, k, v).reshape(b, -1), self.out)
        gate, up = F.linear(F.rms_norm(x, (WIDTH,), self.norm), self.up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class PlainCache:
    """A bf16 cache of one layer with `tokens` of room, full but for the last."""

    def __init__(self, batch: int, tokens: int) -> None:
        self.kv = torch.randn(2, batch, H, tokens, DIM, device="cuda", dtype=BF16)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kv[0, :, :, -1:], self.kv[1, :, :, -1:] = k, v
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q.reshape(-1, H, HQ // H, DIM), self.kv[0], self.kv[1])

    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.kv.nbytes


class PackedCache:
    """Our cache of one layer; its length is put back after every step, so that each step is the same."""

    def __init__(self, like: CacheBuffers, layout: PageLayout) -> None:
        self.buf, self.layout = CacheBuffers(**{n: t.clone() for n, t in vars(like).items()}), layout
        self.length = like.length.clone()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.cache_attention(self.buf, self.layout, q, k, v)
        ops.cache_append(self.buf, self.layout, q, k, v, None)
        self.buf.length.copy_(self.length)
        return out

    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(self.buf.nbytes().values())


def main() -> None:
    """Print a line a shape, write JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", action="append", metavar="BxTOKENS", help=f"repeatable; default {' '.join(SHAPES)}")
    p.add_argument("--recipe", default="kv4")
    p.add_argument("--layers", type=int, default=LAYERS)
    p.add_argument("--replays", type=int, default=10)
    p.add_argument("--json", type=Path, metavar="OUT")
    args = p.parse_args()
    kv = parse_recipe(args.recipe).kv
    assert kv is not None
    layout, layers = PageLayout(kv, DIM), [Layer() for _ in range(args.layers)]
    head = torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=BF16) * 0.02
    rows = []
    for shape in args.shape or SHAPES:
        batch, tokens = map(int, shape.split("x"))
        x = torch.randn(batch, WIDTH, device="cuda", dtype=BF16)
        row: dict[str, object] = {"shape": shape, "recipe": args.recipe, "gpu": torch.cuda.get_device_name()}
        for name in ("bf16", args.recipe):
            if name == "bf16":
                caches: list[PlainCache | PackedCache] = [PlainCache(batch, tokens) for _ in layers]
            else:
                like = bench_cache.filled(layout, batch, tokens, H, BF16)
                caches = [PackedCache(like, layout) for _ in layers]
                del like

            def step(caches: list[PlainCache | PackedCache] = caches, x: Tensor = x) -> Tensor:
                for layer, cache in zip(layers, caches, strict=True):
                    x = layer(x, cache)
                return F.linear(x, head).argmax(-1)

            ms = bench_cache.median_ms([step], args.replays)
            row |= {f"{name}_ms": ms, f"{name}_tokens_s": 1e3 * batch / ms}
            row[f"{name}_cache_bytes"] = sum(c.nbytes() for c in caches)
            del caches, step
            torch.cuda.empty_cache()
        row["speedup"] = row["bf16_ms"] / row[f"{args.recipe}_ms"]  # type: ignore[operator]
        row["cache_smaller"] = row["bf16_cache_bytes"] / row[f"{args.recipe}_cache_bytes"]  # type: ignore[operator]
        rows.append(row)
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
