"""Attention over packed pages and encoding on the CPU, against torch's SDPA on an unquantized cache of the same tokens.

    python benchmarks/bench_cache_cpu.py --json out.json

All contestants of a row run interleaved in one process, and medians are compared. On a machine that others use too,
wall time tells little: `--threads 1 --clock thread` compares the processor time of one thread instead. A row whose
output does not agree with the reference is refused. `percent_of_memcpy` is the pages' bytes per second as a share of a
measured copy (bytes read plus bytes written).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from turboquant.kernels import reference
from turboquant.kernels.cpu import cache as cpu
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

SHAPES = ((14, 2, 64), (32, 8, 128))  # query heads, KV heads, head_dim


clock = time.perf_counter


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """{name: median ms} of calls that take turns."""
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            t = clock()
            call()
            if i:  # the first round warms up
                ms[name].append(1e3 * (clock() - t))
    return {name: statistics.median(ms[name]) for name in calls}


def memcpy_gbs() -> float:
    """Bytes read and written per second by a copy larger than the caches."""
    a = torch.ones(1 << 28, dtype=torch.uint8)
    b = torch.empty_like(a)
    ms = medians({"copy": lambda: b.copy_(a)}, 7)["copy"]
    return 2 * a.nbytes / ms / 1e6


def filled(recipe: str, tokens: int, kv_heads: int, d: int, dtype: torch.dtype) -> tuple[CacheBuffers, PageLayout]:
    """A cache of `tokens`; the pages of the first 4096 are repeated."""
    kv = parse_recipe(recipe).kv
    assert kv is not None
    layout = PageLayout(kv, d)
    count, some = tokens // kv.page, min(tokens, 4096)
    specs = CacheBuffers.specs(layout, 1, kv_heads, dtype, pages=count, columns=count)
    buf = CacheBuffers(**{n: torch.zeros(shape, dtype=t) for n, (shape, t) in specs.items()})
    buf.table = torch.arange(count, dtype=torch.int32).view(1, -1)
    k = torch.randn(1, kv_heads, some, d) * (0.2 + torch.rand(d)) + torch.randn(d)
    q, v = torch.randn(1, kv_heads, some, d), torch.randn(1, kv_heads, some, d)
    cpu.cache_append(buf, layout, q.to(dtype), k.to(dtype), v.to(dtype), None)
    done = some // kv.page
    for i in range(done, count, done):
        buf.pages[i : i + done] = buf.pages[: min(done, count - i)]
    buf.length[:] = tokens
    return buf, layout


def agrees(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Relative L2 within what the dtype's rounding of one number explains, and 2e-5 for float32 sums."""
    limit = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return ((got - want).norm() / want.norm()).item() <= limit


def decode_row(
    recipe: str, tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, copy_gbs: float, n: int
) -> dict:
    """Attention of one decode step (n = 1) or of a verify step of n tokens."""
    hq, hk, d = shape
    buf, layout = filled(recipe, tokens, hk, d, dtype)
    q, k, v = torch.randn(1, hq, n, d), torch.randn(1, hk, n, d), torch.randn(1, hk, n, d)
    args = tuple(x.to(dtype) for x in (q, k, v))
    ours = lambda: cpu.cache_attention(buf, layout, *args)  # noqa: E731
    if tokens <= 32768 and not agrees(ours().float(), reference.cache_attention(buf, layout, *args).float(), dtype):
        raise SystemExit(f"refused: output differs from the reference at {recipe}, {tokens} tokens, {shape}, {dtype}")
    calls: dict[str, Callable[[], object]] = {"ours": ours}
    for name, t in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        (keys, values), query = torch.randn(2, 1, hk, tokens, d, dtype=t), q.to(t)
        calls[name] = lambda k=keys, v=values, query=query: sdpa(query, k, v, enable_gqa=True)
    # the best torch can do for one step: a group's heads as the rows of one matrix
    rows = q.to(dtype).view(1, hk, -1, d)
    keys, values = torch.randn(2, 1, hk, tokens, d, dtype=dtype)
    calls["grouped"] = lambda k=keys, v=values: sdpa(rows, k, v)
    got = medians(calls, 9 if tokens > 40000 else 15)
    ms = got["ours"]
    return {
        "op": "decode" if n == 1 else f"verify{n}",
        "tokens": tokens,
        "q_heads": hq,
        "kv_heads": hk,
        "head_dim": d,
        "recipe": recipe,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": ms,
        "clock": clock.__name__,
        "bytes": buf.pages.nbytes,
        "base_bytes": 2 * hk * tokens * d * 2,
        "gb_per_s": buf.pages.nbytes / ms / 1e6,
        "speedup_vs_bf16": got["bf16"] / ms,
        "speedup_vs_fp32": got["fp32"] / ms,
        "speedup_vs_grouped": got["grouped"] / ms,
        "percent_of_memcpy": 100 * buf.pages.nbytes / ms / 1e6 / copy_gbs,
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
    }


def encode_row(recipe: str, tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, copy_gbs: float) -> dict:
    """Encoding a prompt: ring, tracker, pages. Compared with the prompt's attention in SDPA."""
    hq, hk, d = shape
    buf, layout = filled(recipe, tokens, hk, d, dtype)
    q = torch.randn(1, hq, tokens, d).to(dtype)
    k, v = torch.randn(1, hk, tokens, d).to(dtype), torch.randn(1, hk, tokens, d).to(dtype)

    def ours() -> None:
        buf.length.zero_()
        cpu.cache_append(buf, layout, q, k, v, None)

    calls: dict[str, Callable[[], object]] = {"ours": ours}
    for name, t in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        qt, kt, vt = q.to(t), k.to(t), v.to(t)
        calls[name] = lambda qt=qt, kt=kt, vt=vt: sdpa(qt, kt, vt, is_causal=True, enable_gqa=True)
    got = medians(calls, 5)
    ms = got["ours"]
    return {
        "op": "append",
        "tokens": tokens,
        "q_heads": hq,
        "kv_heads": hk,
        "head_dim": d,
        "recipe": recipe,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": ms,
        "clock": clock.__name__,
        "bytes": buf.pages.nbytes,
        "base_bytes": 2 * hk * tokens * d * 2,
        "gb_per_s": (k.nbytes + v.nbytes) / ms / 1e6,
        "speedup_vs_bf16": got["bf16"] / ms,
        "speedup_vs_fp32": got["fp32"] / ms,
        "percent_of_memcpy": 100 * (k.nbytes + v.nbytes) / ms / 1e6 / copy_gbs,
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    p.add_argument("--recipe", nargs="+", default=["kv4"])
    p.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    p.add_argument("--verify", type=int, default=1, help="tokens of a step")
    p.add_argument("--no-append", action="store_true", help="leave out encoding")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--clock", choices=["wall", "thread"], default="wall")
    p.add_argument("--json", type=Path, metavar="OUT")
    a = p.parse_args()
    why = cpu.supports("cache_attention", None, torch.device("cpu"))
    if why:
        raise SystemExit(why)
    if a.clock == "thread" and a.threads != 1:
        raise SystemExit("--clock thread sees one thread only: it needs --threads 1")
    global clock
    clock = time.thread_time if a.clock == "thread" else time.perf_counter
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    copy_gbs = memcpy_gbs()
    print(f"memcpy {copy_gbs:.1f} GB/s read+write, {torch.get_num_threads()} threads, {cpu.isa()}")
    rows: list[dict] = []
    head = "op tokens q_heads kv_heads head_dim recipe dtype ms bytes gb_per_s speedup_vs_bf16 speedup_vs_fp32 "
    columns = (head + "percent_of_memcpy").split()
    print("  ".join(columns))
    for shape, recipe, name in product(SHAPES, a.recipe, a.dtype):
        dtype = getattr(torch, name)
        for tokens in a.tokens if a.no_append else [0, *a.tokens]:
            if tokens:
                rows.append(decode_row(recipe, tokens, shape, dtype, copy_gbs, a.verify))
            else:
                rows.append(encode_row(recipe, 2048, shape, dtype, copy_gbs))
            shown = (rows[-1][c] for c in columns)
            print("  ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in shown), flush=True)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
