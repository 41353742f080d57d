"""Decode attention on packed pages, and encoding, on an NVIDIA GPU, against torch's bf16 attention and a copy.

    python benchmarks/bench_cache.py --csv out.csv --json out.json
    python benchmarks/bench_cache.py --shape 64x4096 --shape 1x131072 --recipe kv4:ring=64,rewind=16 --backend cuda

Every contestant runs in a CUDA graph whose calls take turns over copies of the cache that together exceed the L2 cache
several times, so memory is always cold; a figure is the median over replays. `bf16_ms` is the best of torch's flash and
cuDNN attention, with and without the query heads of a group packed as query rows. `bytes` is all that our call has to
read: pages, ring, sinks. `floor_ms` is the time in which a copy kernel moves as many bytes (half read, half written).
A row whose output does not agree with the reference on the same buffers is refused. Rows of `append` are one token for
each of 64 sequences, when no page completes and when all do, and a prompt of 8192 tokens.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from turboquant.kernels import reference
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

SHAPES = ("8x32768", "32x8192", "64x4096", "1x131072", "1x32768", "1x1024")
L2 = 4 * 50 * 2**20  # bytes to walk through before a buffer is used again
CALLS = 8  # of a graph at least


def median_ms(calls: list[Callable[[], object]], replays: int) -> float:
    """Median time of one call; the graph makes all calls, several times over."""
    rounds = max(1, -(-CALLS // len(calls)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(replays + 2):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / (rounds * len(calls)))
    return sorted(times[2:])[replays // 2]


def copy_bytes_per_ms() -> float:
    """Bytes read and written per ms by a copy of 2 GiB."""
    a = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / median_ms([lambda: b.copy_(a)], 5)


def filled(
    layout: PageLayout, batch: int, tokens: int, kv_heads: int, dtype: torch.dtype, device: str = "cuda"
) -> CacheBuffers:
    """Caches of `tokens` each; the pages of one sequence's first 4096 tokens are repeated, each in its own memory."""
    kv, d, some = layout.kv, layout.head_dim, min(tokens, 4096)
    per, count = tokens // kv.page, batch * (tokens // kv.page)
    one = {n: torch.zeros(s, dtype=t, device=device) for n, (s, t) in CacheBuffers.specs(
        layout, 1, kv_heads, dtype, pages=some // kv.page, columns=some // kv.page).items()}  # fmt: skip
    small = CacheBuffers(**one)
    small.table = torch.arange(some // kv.page, dtype=torch.int32, device=device).view(1, -1)
    draw = lambda *s: torch.randn(*s, device=device)  # noqa: E731
    k = draw(1, kv_heads, some, d) * (0.2 + 3 * draw(1, kv_heads, 1, d).abs()) + 4 * draw(1, kv_heads, 1, d)
    q, v = draw(1, kv_heads, some, d) / 4, draw(1, kv_heads, some, d)
    reference.cache_append(small, layout, q.to(dtype), k.to(dtype), v.to(dtype), None)
    wide = {n: getattr(small, n).expand(batch, *getattr(small, n).shape[1:]).contiguous() for n in one
            if n not in ("pages", "table")}  # fmt: skip
    buf = CacheBuffers(pages=small.pages.repeat(-(-count // len(small.pages)), 1, 1)[:count].contiguous(),
                       table=torch.randperm(count, device=device).int().view(batch, per), **wide)  # fmt: skip
    buf.length.fill_(tokens)
    return buf


def agrees(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return ((got.float() - want).norm() / want.norm()).item()


def bf16_ms(batch: int, tokens: int, hq: int, h: int, d: int, replays: int) -> float:
    """The best that torch has, over an unquantized cache of as many tokens."""
    size = 4 * batch * tokens * h * d
    copies = max(1, -(-L2 // size))
    kvs = [torch.randn(2, batch, h, tokens, d, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    q = torch.randn(batch, hq, 1, d, device="cuda", dtype=torch.bfloat16)
    packed = q.view(batch, h, hq // h, d)
    best = float("inf")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for query, gqa in ((packed, False), (q, True)):
            with sdpa_kernel(backend):
                try:
                    calls = [lambda kv=kv: sdpa(query, kv[0], kv[1], enable_gqa=gqa) for kv in kvs]  # noqa: B023
                    best = min(best, median_ms(calls, replays))
                except RuntimeError as e:
                    print(f"  {backend.name} gqa={gqa}: {str(e).splitlines()[0]}", file=sys.stderr)
    return best


def row(op: Any, args: argparse.Namespace, batch: int, tokens: int, rate: float) -> dict[str, Any]:
    """Measure one shape."""
    hq, h, d = args.heads
    kv = parse_recipe(args.recipe).kv
    assert kv is not None
    layout = PageLayout(kv, d)
    buf = filled(layout, batch, tokens, h, torch.bfloat16)
    packed = max(0, (tokens - kv.ring) // kv.page + 1)
    size = batch * h * (packed * layout.page_bytes + 4 * d * (kv.ring + kv.sinks))
    copies = max(1, -(-L2 // size))
    bufs = [buf] + [CacheBuffers(**{n: t.clone() for n, t in vars(buf).items()}) for _ in range(copies - 1)]
    q, k, v = (torch.randn(batch, x, 1, d, device="cuda", dtype=torch.bfloat16) for x in (hq, h, h))
    distance = agrees(op(buf, layout, q, k, v), reference.cache_attention(buf, layout, q.float(), k, v))
    if not distance < 0.01:
        raise SystemExit(f"{batch}x{tokens}: relative distance to the reference {distance:.4f}, no figure")
    ms = median_ms([lambda b=b: op(b, layout, q, k, v) for b in bufs], args.replays)
    del bufs, buf
    torch.cuda.empty_cache()
    base = bf16_ms(batch, tokens, hq, h, d, args.replays)
    torch.cuda.empty_cache()
    return {
        "op": "decode", "backend": args.backend, "recipe": args.recipe, "batch": batch, "tokens": tokens, "q_heads": hq,
        "kv_heads": h, "head_dim": d, "ms": ms, "bytes": size, "floor_ms": size / rate,
        "percent_of_copy": 100 * size / rate / ms, "bf16_ms": base, "speedup_vs_bf16": base / ms,
        "relative_distance": distance,
    }  # fmt: skip


def append_rows(op: Any, args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """One token for each of 64 sequences, without and with a page that completes; a prompt."""
    hq, h, d = args.heads
    kv = parse_recipe(args.recipe).kv
    assert kv is not None
    layout, rows = PageLayout(kv, d), []
    for what, batch, tokens, n in (
        ("step", 64, 4096, 1),
        ("step, page completes", 64, 4159, 1),
        ("prompt", 1, 0, 8192),
    ):
        buf = filled(layout, batch, max(tokens, kv.page), h, torch.bfloat16)
        new = (tokens + n) // kv.page + 1
        buf.pages = torch.empty(batch * new, h, layout.page_bytes, dtype=torch.uint8, device="cuda")
        buf.table = torch.arange(batch * new, dtype=torch.int32, device="cuda").view(batch, new)
        length = torch.full_like(buf.length, tokens)
        q, k, v = (torch.randn(batch, x, n, d, device="cuda", dtype=torch.bfloat16) for x in (hq, h, h))

        def run(buf: CacheBuffers = buf, length: Tensor = length, qkv: tuple[Tensor, ...] = (q, k, v)) -> None:
            buf.length.copy_(length)
            op(buf, layout, *qkv, None)

        reset = median_ms([lambda buf=buf, length=length: buf.length.copy_(length)], args.replays)
        ms = median_ms([run], args.replays) - reset
        done = (tokens + n) // kv.page - tokens // kv.page
        size = 2 * k.nbytes + q.nbytes // 8 + done * batch * h * layout.page_bytes
        rows.append({"op": f"append, {what}", "backend": args.backend, "recipe": args.recipe, "batch": batch,
                     "tokens": tokens + n, "q_heads": hq, "kv_heads": h, "head_dim": d, "ms": ms, "bytes": size,
                     "floor_ms": size / rate, "percent_of_copy": 100 * size / rate / ms})  # fmt: skip
    return rows


def main() -> None:
    """Print a table, write files."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", action="append", metavar="BxTOKENS", help=f"repeatable; default {' '.join(SHAPES)}")
    p.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("Q", "KV", "DIM"))
    p.add_argument("--recipe", default="kv4")
    p.add_argument("--backend", default="cuda", help="cuda or triton")
    p.add_argument("--replays", type=int, default=20)
    p.add_argument("--json", type=Path, metavar="OUT")
    p.add_argument("--csv", type=Path, metavar="OUT")
    args = p.parse_args()
    backend = import_module(f"turboquant.kernels.{args.backend}")
    op = backend.cache_attention
    rate = copy_bytes_per_ms()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    common = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "copy_tb_s": rate / 1e9,
    }
    print(f"{common['gpu']}, torch {common['torch']}, copy {rate / 1e9:.2f} TB/s")
    rows = []
    for shape in args.shape or SHAPES:
        batch, tokens = map(int, shape.split("x"))
        rows.append(row(op, args, batch, tokens, rate) | common)
        print("{batch:3d} x {tokens:6d}  {ms:.4f} ms  {percent_of_copy:5.1f} % of copy  floor {floor_ms:.4f}  "
              "bf16 {bf16_ms:.4f}  speedup {speedup_vs_bf16:.2f}  distance {relative_distance:.5f}".format(**rows[-1]),
              flush=True)  # fmt: skip
    if not args.shape:
        for r in append_rows(backend.cache_append, args, rate):
            rows.append(r | common)
            print(
                "{op:28s} {batch:3d} x {tokens:6d}  {ms:.4f} ms  {percent_of_copy:5.1f} % of copy".format(**r),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as f:
            w = csv.DictWriter(f, rows[0], restval="")
            w.writeheader()
            w.writerows(rows)


if __name__ == "__main__":
    main()
