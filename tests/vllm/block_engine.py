"""What vLLM does with blocks, without vLLM's engine, and what our own LayerCache makes of the same tokens."""

import random
from types import SimpleNamespace

import torch

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.pages import Pages, TurboQuantImpl
from turboquant.integrations.vllm.plan import NULL, plan
from turboquant.integrations.vllm.tail import Tail
from turboquant.kernels import ops
from turboquant.layers.cache import LayerCache
from turboquant.maths.tracker import ChannelTracker, page_stats
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

H, G, D = 2, 2, 128 if torch.cuda.is_available() else 32  # the CUDA kernels have no 32
SCALE = 0.2


class Engine:
    """What vLLM does with blocks: a pool full of garbage; tail blocks given as TailSpec wants, and taken back."""

    def __init__(self, recipe, dtype=torch.float32, window=None, softcap=None, blocks=400):
        kv = parse_recipe(recipe).kv
        self.layout = BlockLayout(kv, D, dtype)
        self.tail = Tail(self.layout, H)
        cache = SimpleNamespace(enable_prefix_caching=True, prefix_cache_retention_interval=0)
        self.spec = self.tail.get_kv_cache_spec(SimpleNamespace(cache_config=cache, speculative_config=None))
        self.pool = torch.full((blocks, H, 1, self.layout.row), 0xFF, dtype=torch.uint8)  # NaN in every dtype
        self.tail.bind_kv_cache(self.pool)
        layer = SimpleNamespace(num_heads=H * G, num_kv_heads=H, head_size=D, sliding_window=window, has_sink=False)
        layer.kv_cache_dtype = "auto"
        was = SimpleNamespace(scale=SCALE, logits_soft_cap=softcap)
        self.impl = TurboQuantImpl(layer, was, "x", self.layout, self.tail)
        self.free = list(range(1, blocks))
        random.Random(0).shuffle(self.free)
        self.pages: dict[str, list[int]] = {}
        self.tails: dict[str, list[int]] = {}

    def grow(self, name, start, end):
        """Blocks for the tokens up to `end`; those of the tail that `start` does not need any more go back."""
        pages, tails, size = self.pages.setdefault(name, []), self.tails.setdefault(name, []), self.layout.tokens
        for i in range(self.spec.sink_blocks, max(0, start - self.spec.sliding_window + 1) // size):
            if tails[i] != NULL:
                self.pool[tails[i]] = 0xFF  # another request may write here
                self.free.append(tails[i])
                tails[i] = NULL
        while len(pages) * self.layout.kv.page < end:
            pages.append(self.free.pop())
        while len(tails) * size < end:
            tails.append(self.free.pop() if self.spec.wanted(len(tails), end) else NULL)

    def step(self, work):
        """work: (name, start, q, k, v), each of q, k, v (n, heads, d) -> outputs."""
        for name, start, q, _, _ in work:
            self.grow(name, start, start + len(q))
        tables = [[t[name] for name, *_ in work] for t in (self.tails, self.pages)]
        tail, page = (torch.tensor([r + [NULL] * (max(map(len, t)) - len(r)) for r in t]).int() for t in tables)
        q, k, v = (torch.cat([w[i] for w in work]) for i in (2, 3, 4))
        out = torch.full_like(q, torch.nan)
        calls = plan(self.layout, [w[1] for w in work], [len(w[2]) for w in work], tail)
        self.impl.step(calls, Pages(page), q, k, v, self.pool, out)
        return list(out.split([len(w[2]) for w in work]))

    def stored(self, name, tokens):
        """(pages, H, page_bytes) of the completed pages of a request."""
        size = PageLayout(self.layout.kv, D).page_bytes
        return self.pool[self.pages[name][: tokens // self.layout.kv.page], :, 0, :size]


def stream(n, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(D, generator=g) * 3 + 0.1
    q, k, v = (torch.randn(n, h, D, generator=g) * s for h, s in ((H * G, 1.0), (H, scale), (H, 1.0)))
    return q.to(dtype), (k + scale).to(dtype), v.to(dtype)


def drifting(seed, at, n=640, dtype=torch.float32):
    """A stream whose keys swap their channels' variances at a token."""
    q, k, v = stream(n, seed, dtype)
    k[at:] = k[at:].flip(-1)
    return q, k, v


def drifted(recipe, q, k):
    """Pages of a KV head whose logits err twice as much with the scales before them as with their own, from scratch."""
    kv, size = recipe, recipe.page
    alarms = 0
    for h in range(H):
        tracker = ChannelTracker(kv.decay)
        for first in range(0, len(k) // size * size, size):
            rows = k[first : first + size, h].float()
            readers = q[first + 7 : first + size : 8, h * G : (h + 1) * G].float()
            usable = torch.arange(first, first + size) >= kv.sinks
            page = page_stats(rows, readers.square().mean((0, 1)), usable)
            if tracker.state is not None:
                hot = kv.hot_channels(D)
                alarms += int(page.logit_error(tracker.state, hot) >= 2 * page.logit_error(page, hot))
            tracker.update(page)
    return alarms


def expected(recipe, streams, window=None, softcap=None, sinks=None, backend="auto"):
    """Outputs and pages of our own cache, every row reading what a decode step would."""
    out = []
    for q, k, v in streams:
        cache = LayerCache(parse_recipe(recipe).kv, window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        with ops.use_backend(backend):
            o = cache.step(q, k, v, scaling=SCALE, softcap=softcap, sink_logits=sinks, row_exact=True)
        ids = [i for i in cache._pages[0] if i >= 0]
        out.append((o[0].transpose(0, 1), cache.buf.pages[ids]))
    return out


def read_from(pages, recipe, stream, softcap=None, sinks=None):
    """Outputs of our own cache on the reference, if its pages hold these bytes (pages, H, page_bytes).

    A page is put in place when it is complete: with a ring of at least a page no row before reads it.
    """
    cache, at = LayerCache(parse_recipe(recipe).kv, None), 0
    size, outs = cache.kv.page, []
    while at < len(stream[0]):
        q, k, v = (x[at : at + size].transpose(0, 1)[None] for x in stream)
        with ops.use_backend("reference"):
            outs.append(cache.step(q, k, v, scaling=SCALE, softcap=softcap, sink_logits=sinks, row_exact=True))
        at += size
        if at <= len(stream[0]):
            cache.buf.pages[cache._pages[0][at // size - 1]] = pages[at // size - 1]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def near(got, want):
    tolerance = 2e-2 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


def in_any_order(engine, streams, rng, sizes):
    """Outputs of requests "0", "1", ... with these (q, k, v): each step some of them, so many tokens as `sizes` has."""
    done, lengths = [0] * len(streams), [len(s[0]) for s in streams]
    outputs = [torch.full_like(s[0], torch.nan) for s in streams]
    while done != lengths:
        work = []
        for i in rng.sample(range(len(streams)), rng.randrange(1, len(streams) + 1)):
            n = min(lengths[i] - done[i], rng.choice(sizes))
            if n:
                work.append((str(i), done[i], *(x[done[i] : done[i] + n] for x in streams[i])))
        if not work:
            continue
        for (name, start, q, *_), out in zip(work, engine.step(work), strict=True):
            outputs[int(name)][start : start + len(q)] = out
            done[int(name)] = start + len(q)
    return outputs
