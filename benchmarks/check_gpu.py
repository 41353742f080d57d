"""The Triton backend on a GPU against the reference: numbers first, then times. A plain script, no pytest needed.

Correctness over a table of recipes, head_dims, dtypes and odd lengths: every chunk goes through both backends from
the same state in poisoned buffers; printed are the largest attention error (RMS, in rounding steps of the dtype,
against the reference's fp32 arithmetic) and the rows whose bytes differ. Times: cache_append and cache_attention under
CUDA graphs, prompt encoding against a copy of as many bytes, and a prompt over packed history against torch's flash
attention in bf16.

    python benchmarks/check_gpu.py [--quick] [--only checks|times] [--backend triton]

Exits with 1 if a check fails: an error beyond LIMIT, more than 2 rows in 1000 with other bytes, a state tensor that
differs. Without a GPU the checks run in Triton's interpreter (TRITON_INTERPRET=1), slowly.
"""

import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F

from turboquant.kernels import ops, reference
from turboquant.layers.cache import LayerCache
from turboquant.packed.buffers import CacheBuffers
from turboquant.recipe import parse_recipe

SMALL = "page=16,ring=24,sinks=3,rewind=8"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF, HF, FP = torch.bfloat16, torch.float16, torch.float32
CASES = [  # recipe, head_dim, dtype, queries per head, padding, window, softcap, sink logits
    ("kv4", 128, BF, 4, 0.0, None, None, False),
    ("kv4", 128, HF, 4, 0.2, None, None, False),
    ("kv4", 128, FP, 1, 0.0, None, None, False),
    ("kv4", 64, BF, 7, 0.0, None, None, True),
    ("kv4", 80, BF, 2, 0.2, None, None, False),
    ("kv4", 96, HF, 3, 0.0, 100, None, False),
    ("kv4", 256, BF, 2, 0.0, None, 5.0, False),
    ("kv3", 128, BF, 4, 0.2, None, None, False),
    ("kv2", 64, HF, 4, 0.0, 40, None, False),
    ("kv8", 128, BF, 4, 0.0, None, None, True),
    ("k4v3", 80, FP, 2, 0.2, None, None, False),
    ("plain4", 128, BF, 4, 0.0, None, None, False),
    ("plain3", 96, HF, 1, 0.2, None, None, False),
    ("plain8", 64, BF, 2, 0.0, 64, None, False),
    (f"kv4:{SMALL}", 64, FP, 16, 0.2, None, 3.0, True),
    ("kv4:ring=0,sinks=0", 128, BF, 4, 0.2, None, None, False),
    ("kv4:page=128,hot=17", 128, BF, 4, 0.0, None, None, False),
]
LIMIT = {BF: 1.0, HF: 2.0, FP: 40.0}  # rounding steps
CHUNKS = (1, 5, 190, 1, 1, 33, 1, 128, 1, 2, 8, 700, 1)


def chunk(n, batch, heads, group, d, dtype, padding, seed):
    """(q, k, v, valid) with channels of very different means and scales."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    fixed = torch.Generator(DEVICE).manual_seed(1000)
    normal = lambda *s, gen=g: torch.randn(*s, generator=gen, device=DEVICE)  # noqa: E731
    mean, scale = 3 * normal(batch, heads, 1, d, gen=fixed), normal(batch, heads, 1, d, gen=fixed).abs() * 2 + 0.1
    q, v = normal(batch, heads * group, n, d), normal(batch, heads, n, d)
    k = normal(batch, heads, n, d) * scale + mean
    valid = torch.rand(batch, n, generator=g, device=DEVICE) >= padding if padding else None
    return q.to(dtype), k.to(dtype), v.to(dtype), valid


def rms(x):
    return x.double().square().mean().sqrt().item()


def check_case(backend, recipe, d, dtype, group, padding, window, softcap, extra, batch=3, heads=2):
    """Feeds CHUNKS through both backends; returns (ok, line)."""
    kv = parse_recipe(recipe).kv
    cache = LayerCache(kv, window)
    logits = torch.linspace(-1, 2, heads * group, device=DEVICE) if extra else None
    options = dict(softcap=softcap, sink_logits=logits)
    worst, other, rows, states = 0.0, 0, 0, []
    for at, n in enumerate(CHUNKS):
        q, k, v, valid = chunk(n, batch, heads, group, d, dtype, padding, at)
        if cache.buf is None:
            cache._start(k)
            for name in ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker"):
                getattr(cache.buf, name).fill_(torch.nan)
        given = (cache.buf, cache.layout, q, k, v, valid, None)
        with ops.use_backend(backend):
            got = ops.cache_attention(*given, window=window, **options)
        want = reference.cache_attention(*given, window=window, **options)
        eps = torch.finfo(dtype).eps
        error = rms(got.double() - want.double()) / max(rms(want), 1e-30) / eps
        worst = max(worst, error if got.isfinite().all() else float("inf"))
        before = copy.deepcopy(cache.buf)
        cache_pages = len(before.pages)
        with ops.use_backend("reference"):
            cache.step(q, k, v, valid=valid, **options)
        mine = before
        mine.table = cache.buf.table if not cache._free else cache.buf.table.clone()
        grown = torch.full_like(cache.buf.pages, 0xEE)
        grown[:cache_pages] = mine.pages
        mine.pages = grown
        with ops.use_backend(backend):
            ops.cache_append(mine, cache.layout, q, k, v, valid)
        for name in ("ring_k", "ring_v", "sink_k", "sink_v", "length", "nonfinite", "tracker", "readers"):
            a, b = getattr(mine, name), getattr(cache.buf, name)
            if name == "tracker" and kv.codec == "plain":
                continue
            if name in ("tracker", "readers"):
                same = torch.allclose(a.float(), b.float(), rtol=1e-5 if name == "tracker" else 2 * eps, atol=1e-6,
                                      equal_nan=True)  # fmt: skip
            else:
                same = torch.equal(a.nan_to_num(77), b.nan_to_num(77))
            if not same:
                states.append(f"{name}@{at}")
        ids = sorted({i for p in cache._pages for i in p if i >= 0})
        a, b = mine.pages[ids], cache.buf.pages[ids]
        if len(ids):
            lay = cache.layout
            differs = torch.zeros(a.shape[0], a.shape[1], kv.page, dtype=torch.bool, device=DEVICE)
            for part in ("key_codes", "value_codes"):
                differs |= (lay.read(a, part) != lay.read(b, part)).any(-1)
            other, rows = other + int(differs.sum()), rows + differs.numel()
            pad = torch.ones(lay.page_bytes, dtype=torch.bool)
            for f in lay.fields.values():
                pad[f.offset : f.offset + f.nbytes] = False
            if a[..., pad.to(DEVICE)].any():
                states.append(f"padding@{at}")
    ok = worst <= LIMIT[dtype] and other <= max(2, 0.002 * rows) and not states
    line = f"{'ok  ' if ok else 'FAIL'} {recipe:36s} d{d:<3d} {str(dtype)[6:]:8s} g{group:<2d} error {worst:8.3f} eps, "
    return ok, line + f"rows with other bytes {other}/{rows} {' '.join(states)}"


def check_chunking(backend):
    """One chunk or token by token: how many bytes of the pages differ (0 if both ways sum in the same order)."""
    with ops.use_backend(backend):
        caches = []
        for sizes in ((256,), (100, 1, 1, 60, 94)):
            q, k, v, _ = chunk(256, 2, 2, 4, 128, BF, 0.0, 7)
            cache, at = LayerCache(parse_recipe("kv4").kv), 0
            for n in sizes:
                cache.step(*(x[:, :, at : at + n] for x in (q, k, v)))
                at += n
            caches.append(torch.stack([cache.buf.pages[p] for p in cache._pages]))
    return int((caches[0] != caches[1]).sum())


def graph_time(run, repeats=50):
    """Median ms of one call, captured `repeats` times into a CUDA graph."""
    run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return event_time(graph.replay) / repeats


def event_time(run, repeats=9):
    """Median ms of one call by CUDA events."""
    run()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def full_cache(batch, tokens, heads=8, group=4, d=128, recipe="kv4"):
    """A cache of `tokens` random tokens a sequence, and room for 8192 more."""
    kv = parse_recipe(recipe).kv
    cache = LayerCache(kv)
    for at in range(0, tokens, 8192):
        cache.step(*chunk(min(8192, tokens - at), batch, heads, group, d, BF, 0.0, at)[:3])
    if cache.buf is None:
        cache._start(chunk(1, batch, heads, group, d, BF, 0.0, 0)[1])
    cache._reserve([8192] * batch)
    return cache


def frozen(cache) -> tuple[CacheBuffers, torch.Tensor]:
    """The buffers and a copy of the length, to put back between runs."""
    return cache.buf, cache.buf.length.clone()


def times(backend):
    """Prints the timings; every call starts from the same length."""
    print(f"device {torch.cuda.get_device_name()}, torch {torch.__version__}")
    with ops.use_backend(backend):
        for offset in (0, 63):
            cache = full_cache(64, 256 + offset)
            q, k, v, _ = chunk(1, 64, 8, 4, 128, BF, 0.0, 3)
            buf, length = frozen(cache)

            def append(buf=buf, length=length, cache=cache, q=q, k=k, v=v):
                ops.cache_append(buf, cache.layout, q, k, v, None)
                buf.length.copy_(length)

            reset = graph_time(lambda buf=buf, length=length: buf.length.copy_(length))
            what = "pages complete" if offset else "no page completes"
            us = 1e3 * (graph_time(append) - reset)
            print(f"append 64 x 1 token, {what}: {us:.2f} us (a length copy of {1e3 * reset:.2f} us taken off)")
        cache = full_cache(1, 0)
        q, k, v, _ = chunk(8192, 1, 8, 4, 128, BF, 0.0, 3)
        buf, length = frozen(cache)

        def append():
            buf.length.copy_(length)
            ops.cache_append(buf, cache.layout, q, k, v, None)

        ms = graph_time(append, 10)
        nbytes = 2 * k.nbytes + 128 * buf.pages[0].nbytes
        a = torch.empty(nbytes // 2, dtype=torch.uint8, device=DEVICE)
        b = torch.empty_like(a)
        copy_ms = graph_time(lambda: b.copy_(a), 10)
        print(f"append 1 x 8192: {1e3 * ms:.1f} us; copy of {nbytes / 1e6:.1f} MB read and written: "
              f"{1e3 * copy_ms:.1f} us = {100 * copy_ms / ms:.0f} %")  # fmt: skip
        try:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA]) as p:
                append()
                torch.cuda.synchronize()
            for e in p.key_averages():
                print(f"    {e.key[:40]:40s} {e.device_time_total:8.1f} us")
        except Exception as error:
            print("    no profile:", error)
        for batch, tokens in ((8, 32768), (64, 4096), (1, 32768)):
            cache = full_cache(batch, tokens)
            q, k, v, _ = chunk(1, batch, 8, 4, 128, BF, 0.0, 3)
            ms = graph_time(lambda c=cache, q=q, k=k, v=v: ops.cache_attention(c.buf, c.layout, q, k, v), 10)
            kk = torch.randn(batch, 8, tokens, 128, device=DEVICE, dtype=BF)
            vv = torch.randn_like(kk)
            best = graph_time(lambda q=q, kk=kk, vv=vv: F.scaled_dot_product_attention(q, kk, vv, enable_gqa=True), 10)
            print(f"decode {batch} x {tokens}: {1e3 * ms:.0f} us, bf16 sdpa {1e3 * best:.0f} us, {best / ms:.2f} x")
            del cache, kk, vv
        cache = full_cache(1, 32768)
        q, k, v, _ = chunk(8192, 1, 8, 4, 128, BF, 0.0, 3)
        ms = event_time(lambda: ops.cache_attention(cache.buf, cache.layout, q, k, v))
        kk = torch.randn(1, 8, 32768 + 8192, 128, device=DEVICE, dtype=BF)
        vv = torch.randn_like(kk)
        turn = lambda x: x.transpose(1, 2)  # noqa: E731
        flash = lambda: torch.ops.aten._flash_attention_forward(  # noqa: E731
            turn(q), turn(kk), turn(vv), None, None, 8192, 40960, 0.0, True, False, scale=128**-0.5
        )
        base = event_time(flash)
        print(f"prefill 8192 over 32768: {ms:.2f} ms, bf16 flash {base:.2f} ms, {ms / base:.2f} x")
        from turboquant.kernels import triton

        work = torch.empty(2, 1, 8, 32768, 128, device=DEVICE, dtype=BF)
        ms = event_time(lambda: triton.dequantize_pages(cache.buf, cache.layout, 0, 512, work[0], work[1]))
        print(f"dequantize 32768 tokens: {1e3 * ms:.0f} us")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first three cases")
    parser.add_argument("--only", choices=("checks", "times"))
    parser.add_argument("--backend", default="triton")
    args = parser.parse_args()
    good = True
    if args.only != "times":
        for case in CASES[:3] if args.quick else CASES:
            start = time.time()
            try:
                ok, line = check_case(args.backend, *case)
            except Exception as error:
                ok, line = False, f"FAIL {case}: {type(error).__name__}: {str(error)[:600]}"
            good &= ok
            print(f"{line} ({time.time() - start:.0f} s)", flush=True)
        print("bytes that differ between one chunk and five:", check_chunking(args.backend))
    if args.only != "checks" and DEVICE == "cuda":
        times(args.backend)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
