"""Decoding with a Llama-3-8B-shaped model (random weights, bf16) under CUDA graphs: recipes against bf16, in one run.

    python benchmarks/bench_decode.py --recipe kv4 --shape 8x32768 --shape 64x4096 --json out.json
    python benchmarks/bench_decode.py --recipe w4a8kv4:group=0 --recipe w4a8kv4:group=0,head=8 --shape 1x1024 \
        --shape 8x32768 --json out.json
    python benchmarks/bench_decode.py --tiny          # a toy on the CPU: that the script runs; times mean nothing

All run the same layers (norms, projections, MLP, output head; no rotary embedding), a whole step in one graph. The
bf16 cache is attended by torch's flash attention with the heads of a group packed as query rows, the best torch has
here. Quantized layers are those of the library, their packed weights drawn at random. Caches are filled with random
tokens; every layer has memory of its own, so nothing stays in the L2 cache. Bytes are those of the tensors that the
device holds: `weight_bytes` with input and output embeddings, `moved_bytes` what a step reads: all but the input
embeddings.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench_cache
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from turboquant.kernels import ops
from turboquant.kernels.fused import NormRule
from turboquant.kernels.linear import Shared
from turboquant.layers.convert import eight_bit, head_recipe
from turboquant.layers.embedding import QuantEmbedding
from turboquant.layers.fused import FusedMLP, FusedNorm, GateRule
from turboquant.layers.linear import QuantLinear
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import Recipe, parse_recipe

SHAPES = ("8x32768", "64x4096")
BF16, EPS = torch.bfloat16, 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of the model."""

    width: int = 4096
    hq: int = 32
    h: int = 8
    dim: int = 128
    hidden: int = 14336
    layers: int = 32
    vocabulary: int = 128256
    device: str = "cuda"


class Norm(nn.Module):
    """RMSNorm by torch's kernel."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(s.width, device=s.device, dtype=BF16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> the same."""
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


class MLP(nn.Module):
    """Gate and up in one product."""

    def __init__(self, s: Sizes, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = linear(2 * s.hidden, s.width), linear(s.width, s.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """A decoder layer, quantized with a recipe that has weights."""

    def __init__(self, s: Sizes, recipe: Recipe, shared: Shared) -> None:
        super().__init__()
        self.s, self.recipe, self.shared = s, recipe, shared
        self.qkv, self.out = self.linear((s.hq + 2 * s.h) * s.dim, s.width), self.linear(s.width, s.hq * s.dim)
        self.mlp: nn.Module = MLP(s, self.linear)
        self.before: Any = Norm(s)
        self.between: Any = Norm(s)
        self.follower: tuple[Any, ...] = ()  # `before` of the layer behind this one
        if recipe.activations is not None and recipe.activations.bits == 8:
            rule = NormRule(EPS, once=True)
            self.before = FusedNorm(self.before, rule, self.qkv)
            self.between = FusedNorm(self.between, rule, self.mlp.gate_up_proj)
            self.mlp = FusedMLP(self.mlp, GateRule("silu", True))

    def linear(self, n: int, k: int) -> Any:
        """A layer with random weights, or with random bytes for weights."""
        return packed(n, k, self.recipe, self.shared, self.s) if self.recipe.weights else dense(n, k, self.s)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(B, K) -> (B, K)."""
        b, s = x.shape[0], self.s
        y = self.qkv(self.before(x)).view(b, s.hq + 2 * s.h, 1, s.dim)
        q, k, v = y[:, : s.hq], y[:, s.hq : s.hq + s.h], y[:, s.hq + s.h :]
        y = self.out(attend(q, k, v).reshape(b, -1))
        if not isinstance(self.between, FusedNorm):
            x = x + y
            return x + self.mlp(self.between(x))
        x, y = self.between.add(x, y)  # as the stand-ins of transformers' layers do
        y = self.mlp(y)
        return self.follower[0].add_ahead(x, y) if self.follower else x + y


def dense(n: int, k: int, s: Sizes) -> nn.Linear:
    """Random bf16 weights."""
    out = nn.Linear(k, n, bias=False, device=s.device, dtype=BF16)
    out.weight.requires_grad_(False).normal_(std=0.02)
    return out


def packed(n: int, k: int, recipe: Recipe, shared: Shared | None, s: Sizes) -> QuantLinear:
    """Random codes around zero, scales that give weights of 0.02."""
    out = QuantLinear(k, n, False, recipe, s.device, BF16, shared)
    for name, b in out._buffers.items():
        if name == "weight":
            b.random_(0, 256)
        elif b is not None:
            b.fill_(0.02 / 4.6 if b.is_floating_point() else 8)
    return out


def nbytes(model: nn.Module, device: torch.device, read: bool = False) -> int:
    """Bytes of weights that the device holds, in whatever layouts, or that a step reads."""
    out = sum(m.slot.nbytes(device, read) for m in model.modules() if isinstance(m, QuantLinear))
    return out + sum(t.nbytes for t in model.parameters())


class PlainCache:
    """A bf16 cache of one layer with `tokens` of room, full but for the last."""

    def __init__(self, batch: int, tokens: int, s: Sizes) -> None:
        self.s, self.kv = s, torch.randn(2, batch, s.h, tokens, s.dim, device=s.device, dtype=BF16)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kv[0, :, :, -1:], self.kv[1, :, :, -1:] = k, v
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            q = q.reshape(-1, self.s.h, self.s.hq // self.s.h, self.s.dim)
            return F.scaled_dot_product_attention(q, self.kv[0], self.kv[1])

    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.kv.nbytes


class PackedCache:
    """Our cache of one layer.

    Args:
        length: memory for its length, which whoever calls it puts back after every step, so that each step is the same.
    """

    def __init__(self, like: CacheBuffers, layout: PageLayout, length: Tensor) -> None:
        own = {n: t.clone() for n, t in vars(like).items()}
        self.buf, self.layout = CacheBuffers(**own | {"length": length}), layout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.cache_attention(self.buf, self.layout, q, k, v)
        ops.cache_append(self.buf, self.layout, q, k, v, None)
        return out

    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(self.buf.nbytes().values())


class Model:
    """Layers and output embeddings of one recipe, and its caches of one shape."""

    def __init__(self, recipe: Recipe, s: Sizes) -> None:
        shared, self.s, self.recipe = Shared(), s, recipe
        linear = recipe.linear or Recipe()
        self.layers = nn.ModuleList([Layer(s, linear, shared) for _ in range(s.layers)])
        for layer, behind in pairwise(self.layers):
            layer.follower = (behind.before,) if isinstance(behind.before, FusedNorm) else ()
        eight = recipe.weights is not None and recipe.weights.head
        self.head = packed(s.vocabulary, s.width, head_recipe(recipe), None, s) if eight else dense(
            s.vocabulary, s.width, s)  # fmt: skip
        self.all = nn.ModuleList([self.layers, self.head])

    def caches(self, batch: int, tokens: int) -> list[Any]:
        """One a layer, full."""
        if self.recipe.kv is None:
            return [PlainCache(batch, tokens, self.s) for _ in self.layers]
        layout = PageLayout(self.recipe.kv, self.s.dim)
        like = bench_cache.filled(layout, batch, tokens, self.s.h, BF16, self.s.device)
        self.lengths = like.length.repeat(len(self.layers), 1)
        return [PackedCache(like, layout, length) for length in self.lengths]

    def embedding_bytes(self) -> int:
        """Of the input embeddings: in 16 bit, or packed."""
        s, w = self.s, self.recipe.weights
        if w is None or not w.embed:
            return s.vocabulary * s.width * 2
        recipe = eight_bit(self.recipe)
        return QuantEmbedding(nn.Embedding(s.vocabulary, s.width, device="meta"), recipe).slot.packed().nbytes

    def time(self, batch: int, tokens: int, replays: int) -> dict[str, Any]:
        """Milliseconds and tokens/s of a step, and bytes."""
        s, x = self.s, torch.randn(batch, self.s.width, device=self.s.device, dtype=BF16)
        caches = self.caches(batch, tokens)
        lengths = None if self.recipe.kv is None else self.lengths.clone()

        def step() -> Tensor:
            y = x
            for layer, cache in zip(self.layers, caches, strict=True):
                y = layer(y, cache)
            if lengths is not None:  # in one copy: a model has none
                self.lengths.copy_(lengths)
            return self.head(y).argmax(-1)

        ms = bench_cache.median_ms([step], replays) if s.device == "cuda" else _once_ms(step)
        cache, embedding = sum(c.nbytes() for c in caches), self.embedding_bytes()
        kernels = {ops.choose("linear", m.slot.spec(BF16), x.device)[0] for m in self.all.modules()
                   if isinstance(m, QuantLinear)}  # fmt: skip
        return {
            "ms": ms, "tokens_s": 1e3 * batch / ms, "weight_bytes": nbytes(self.all, x.device) + embedding,
            "cache_bytes": cache, "moved_bytes": nbytes(self.all, x.device, True) + cache,
            "linear_kernel": ", ".join(sorted(kernels)) or "torch",
        }  # fmt: skip


def _once_ms(step: Callable[[], Tensor]) -> float:
    step()
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


@torch.no_grad()
def main() -> None:
    """Print a line a shape and recipe, write JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", action="append", metavar="BxTOKENS", help=f"repeatable; default {' '.join(SHAPES)}")
    p.add_argument("--recipe", action="append", help="repeatable; default kv4")
    p.add_argument("--layers", type=int)
    p.add_argument("--replays", type=int, default=10)
    p.add_argument("--tiny", action="store_true", help="a toy on the CPU")
    p.add_argument("--json", type=Path, metavar="OUT")
    args = p.parse_args()
    s = Sizes(256, 4, 2, 64, 512, 2, 384, "cpu") if args.tiny else Sizes()
    if args.layers:
        s = Sizes(layers=args.layers)
    shapes = [tuple(map(int, x.split("x"))) for x in args.shape or (("2x128",) if args.tiny else SHAPES)]
    gpu = "none" if args.tiny else torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    base: dict[tuple[int, ...], dict[str, Any]] = {}
    for name in ("bf16", *(args.recipe or ["kv4"])):
        recipe = Recipe() if name == "bf16" else parse_recipe(name)
        model = Model(recipe, s)
        for batch, tokens in shapes:
            got = model.time(batch, tokens, args.replays)
            b = base.setdefault((batch, tokens), got)
            row = {"shape": f"{batch}x{tokens}", "recipe": name, "gpu": gpu} | got
            row |= {
                "speedup": b["ms"] / got["ms"],
                "smaller": (b["weight_bytes"] + b["cache_bytes"]) / (got["weight_bytes"] + got["cache_bytes"]),
                "cache_smaller": b["cache_bytes"] / got["cache_bytes"],
                "moved_percent": 100 * got["moved_bytes"] / b["moved_bytes"],
            }
            rows.append(row)
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
        del model
        if not args.tiny:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
