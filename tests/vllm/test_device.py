"""Steps on a GPU (device.py, prompt.py, carry.py) against our own LayerCache: in Triton's interpreter on the CPU, where
flash attention is written out in torch, and on a GPU with vLLM's.
"""

import os
import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    # vLLM for CPUs comes without Triton; `make test-vllm` runs this file by itself, with one for its interpreter
    pytest.skip("needs a GPU or TRITON_INTERPRET=1: `make test-vllm` runs it so by itself", allow_module_level=True)

import triton
import triton.language as tl
from block_engine import SCALE, D, Engine, G, H, drifted, drifting, expected, in_any_order, near, stream

from turboquant.integrations.vllm import attention, device, pages, prompt
from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.plan import NULL
from turboquant.integrations.vllm.tail import pool
from turboquant.kernels import ops
from turboquant.kernels.cuda.attention import MAX_TOKENS
from turboquant.kernels.reference import decode_page_keys, decode_page_values
from turboquant.kernels.triton import carry, drift
from turboquant.maths.tracker import DRIFT, ChannelStats, ChannelTracker
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, REFERENCE = torch.bfloat16, "reference"


def flash(impl, q, k, v, causal, left):
    """What prompt.flash gives, written out."""
    n, m = len(q), len(k)
    at = torch.arange(n, device=q.device)[:, None] + (m - n) - torch.arange(m, device=q.device)
    see = (at >= 0) if causal else torch.ones_like(at, dtype=torch.bool)
    if left is not None:
        see &= at <= left
    logits = torch.einsum("nhd,mhd->hnm", q.float(), k.float().repeat_interleave(impl.group, 1)) * impl.scale
    if impl.softcap:
        logits = impl.softcap * torch.tanh(logits / impl.softcap)
    logits = logits.masked_fill(~see, -torch.inf)
    out = torch.einsum("hnm,mhd->nhd", logits.softmax(-1).nan_to_num(0), v.float().repeat_interleave(impl.group, 1))
    return out.to(q.dtype), logits.logsumexp(-1)


class Poisoned:
    """torch, but that memory nobody wrote holds NaN, and integers far from any that is right."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def __init__(self):
        self.asked = []  # tokens of workspaces

    def zeros(self, *size, **options):
        self.asked.append(size[-3])
        return torch.zeros(*size, **options)

    def empty(self, *size, **options):
        self.asked += size[-3:-2]
        return fill(torch.empty(*size, **options))

    def empty_like(self, x):
        return fill(torch.empty_like(x))


def fill(x):
    return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Prompts take no larger workspace than is reserved for them."""

    def history(impl, of, *args, was=prompt.history):
        prompt.torch.asked.clear()
        for part in was(impl, of, *args):
            assert max(prompt.torch.asked) <= prompt.workspace(impl.layout.kv, impl.window, of.n)
            yield part

    for module in (carry, prompt):
        monkeypatch.setattr(module, "torch", Poisoned())
    monkeypatch.setattr(prompt, "history", history)


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch, poison):
    if DEVICE == "cpu":
        monkeypatch.setattr(prompt, "flash", flash)
        with ops.use_backend("triton"):
            yield
    else:
        yield


class DeviceEngine(Engine):
    """Steps through metadata as vLLM gives it."""

    def __init__(self, recipe, interval=512, **kwargs):
        super().__init__(recipe, BF16, **kwargs)
        self.pool = self.pool.to(DEVICE)
        self.tail.bind_kv_cache(self.pool)
        self.blocks = pool(self.pool)
        self.tail.carrier = carry.Carrier(
            self.layout.page(self.layout.row), self.layout.tokens, self.blocks, self.tail.views
        )
        self.steps = device.Steps(self.layout, self.spec.interval, 8, torch.device(DEVICE))
        self.page_table = torch.zeros(0, 0, dtype=torch.int32, device=DEVICE)
        self.impl.nonfinite, self.impl.alarms = (x.to(DEVICE) for x in (self.impl.nonfinite, self.impl.alarms))

    def step(self, work, padding=0):
        for name, start, q, _, _ in work:
            self.grow(name, start, start + len(q))
            if self.impl.window is not None:  # pages out of it go back to vLLM
                gone = max(0, start - self.impl.window + 1) // self.layout.kv.page
                self.pages[name][:gone] = [NULL] * gone
        tables = [[t[name] for name, *_ in work] + [[]] * padding for t in (self.tails, self.pages)]
        tail, page = (torch.tensor([r + [NULL] * (40 - len(r)) for r in t]).int().to(DEVICE) for t in tables)
        counts = torch.tensor([len(w[2]) for w in work] + [0] * padding)
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        lengths = torch.tensor([w[1] + len(w[2]) for w in work] + [0] * padding).int()
        m = SimpleNamespace(query_start_loc=ends.to(DEVICE), query_start_loc_cpu=ends, seq_lens=lengths.to(DEVICE))
        self.page_table = device.kept(self.page_table, page, 8, -1)
        step = self.steps.build(m, tail, lengths.tolist())
        if padding:  # as a captured graph runs it
            step.work[:] = [device.Rows(0, 0, len(counts), 1)]
        extra = torch.full((padding,), 7.0, dtype=BF16)
        q, k, v = (torch.cat([w[i] for w in work] + [extra[:, None, None].expand(-1, h, D)]) for i, h in
                   ((2, H * G), (3, H), (4, H)))  # fmt: skip
        q, k, v = (x.to(DEVICE) for x in (q, k, v))
        out = torch.full_like(q, torch.nan)
        device.run(self.impl, step, self.blocks, self.page_table[: len(counts)], q, k, v, out)
        return list(out.cpu().split([len(w[2]) for w in work] + [1] * padding))[: len(work)]


def attended(pages, recipe, stream, softcap, sinks, dtype):
    """Outputs where every row reads these pages (n, H, page_bytes), decoded and weighted in a dtype, written out."""
    kv, (q, k, v) = parse_recipe(recipe).kv, (x.transpose(0, 1).float() for x in stream)
    layout, t = PageLayout(kv, D), torch.arange(q.shape[1])
    values, back = [], t[:, None] - t
    stored = (f(layout, pages.transpose(0, 1)).flatten(1, 2) for f in (decode_page_keys, decode_page_values))
    for x, old in zip((k, v), stored, strict=True):
        old = torch.nn.functional.pad(old.to(dtype).float(), (0, 0, 0, len(t) - old.shape[1]))
        values.append(torch.stack([x, old]).repeat_interleave(G, 1))
    logits = torch.einsum("htd,phjd->phtj", q, values[0]) * SCALE
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    packed = (back >= kv.ring) & (t >= kv.sinks)
    logits = torch.where(packed, logits[1], logits[0]).masked_fill(back < 0, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, len(t), 1)], 2)
    p = logits.softmax(-1).to(dtype).float()[..., : len(t)]
    out = torch.where(packed, 0, p) @ values[1][0] + torch.where(packed, p, 0) @ values[1][1]
    return out.transpose(0, 1).to(dtype).float()


def right(got, pages, recipe, stream, softcap=None, sinks=None):
    """Outputs err at most twice as much as plain torch does with decoded keys and values and weights in 16 bit."""
    exact, rough = (attended(pages, recipe, stream, softcap, sinks, dtype) for dtype in (torch.float32, BF16))
    assert (got.float() - exact).abs().max() <= 2 * (rough - exact).abs().max()


def same(engine, name, tokens, want):
    """Triton may store the neighbouring scale of a row; the CUDA kernels write the reference's bytes."""
    got = engine.stored(name, tokens).cpu()
    layout = engine.layout.page(engine.layout.row)
    if ops.choose("cache_append", layout, torch.device(DEVICE), ops.Chunk(BF16))[0] == "cuda":
        assert torch.equal(got, want)
    else:
        assert (got != want).float().mean() < 2e-3


@pytest.mark.parametrize(
    "recipe,window,softcap,sinks",
    [
        ("kv4", None, None, None),
        ("kv4", 150, None, None),
        ("kv4", 100, None, None),
        ("k4v3:ring=80,sinks=20,page=32,rewind=8", None, 5.0, None),
        ("plain3:ring=64,sinks=0", None, None, torch.arange(4) / 2),
    ],
)
def test_any_schedule_gives_the_bytes_and_outputs_of_our_own_cache(recipe, window, softcap, sinks):
    rng = random.Random(1)
    lengths = [230, 70]
    streams = [stream(n, i, BF16) for i, n in enumerate(lengths)]
    engine = DeviceEngine(recipe, window=window, softcap=softcap)
    engine.impl.sinks = None if sinks is None else sinks.to(DEVICE)
    outputs = in_any_order(engine, streams, rng, (1, 5, 8, 60, 90, 200))
    for i, (want, packed) in enumerate(expected(recipe, streams, window, softcap, sinks, REFERENCE)):
        if window is None:  # a code next to an edge may round the other way: outputs are those of the bytes stored
            same(engine, str(i), lengths[i], packed)
            right(outputs[i], engine.stored(str(i), lengths[i]).cpu(), recipe, streams[i], softcap, sinks)
        else:
            near(outputs[i], want)
    assert int(engine.impl.nonfinite) == 0


def test_a_padded_batch_as_a_graph_runs_it():
    streams = [stream(130, i, BF16) for i in range(2)]
    engine = DeviceEngine("kv4")
    engine.step([(str(i), 0, *(x[:126] for x in s)) for i, s in enumerate(streams)])
    before, outs = engine.pool[NULL].clone(), [[], []]
    for t in range(126, 130):
        got = engine.step([(str(i), t, *(x[t : t + 1] for x in s)) for i, s in enumerate(streams)], padding=2)
        for out, rows in zip(outs, got, strict=True):
            out.append(rows)
    for i, (want, packed) in enumerate(expected("kv4", streams, backend=REFERENCE)):
        near(torch.cat(outs[i]), want[126:])
        same(engine, str(i), 130, packed)
    assert torch.equal(engine.pool[NULL], before), "rows of padding write nothing"


@pytest.mark.parametrize("recipe,new", [("kv4", 40), ("kv4:ring=65", 1), ("kv4:ring=71", 7), ("kv4:ring=71", 8)])
def test_a_hit_on_what_the_same_step_writes(recipe, new):
    """Also of rows so short that they go together with the one that writes, as in a captured graph: they read nothing
    packed of the page that it completes."""
    q, k, v = stream(128 + new, 9, BF16)
    engine, part = DeviceEngine(recipe), lambda a, b: (q[a:b], k[a:b], v[a:b])
    engine.step([("a", 0, *part(0, 127))])
    engine.grow("a", 127, 128)
    engine.pages["b"], engine.tails["b"] = list(engine.pages["a"]), list(engine.tails["a"])
    b, _ = engine.step([("b", 128, *part(128, 128 + new)), ("a", 127, *part(127, 128))])
    near(b, expected(recipe, [(q, k, v)], backend=REFERENCE)[0][0][128:])


def test_a_prompt_follows_the_prompt_whose_pages_it_hits():
    """Also where it comes first in the batch: it reads, long after, what the other one writes in the same step."""
    q, k, v = stream(268, 9, BF16)
    engine, part = DeviceEngine("kv4"), lambda a, b: (q[a:b], k[a:b], v[a:b])
    engine.step([("a", 0, *part(0, 100))])
    engine.grow("a", 100, 128)
    engine.pages["b"], engine.tails["b"] = list(engine.pages["a"]), list(engine.tails["a"])
    b, _ = engine.step([("b", 128, *part(128, 268)), ("a", 100, *part(100, 128))])
    ((want, packed),) = expected("kv4", [(q, k, v)], backend=REFERENCE)
    near(b, want[128:])
    same(engine, "b", 268, packed)


def test_a_ring_of_a_page_is_served_by_plans():
    """Its first token after a page reads that page packed."""
    layouts = [BlockLayout(parse_recipe(f"kv4:ring={n}").kv, 64, BF16) for n in (64, 65)]
    assert "not longer than a page" in device.obstacle(layouts[0], torch.device(DEVICE))
    assert device.most_tokens(layouts[1]) == 1


def test_prompts_of_a_step_are_appended_together_in_chunks(monkeypatch):
    """Of chunks that end where a hit may: each row's bytes, outputs, and what a hit at such a point reads."""
    streams, engine, chunks = [stream(n, 20 + n, BF16) for n in (300, 260, 200, 299)], DeviceEngine("kv4"), []
    engine.spec = replace(engine.spec, interval=128)
    engine.steps.interval = 128

    def append(buf, page, q, *args, was=ops.cache_append):
        chunks.append((q.shape[0], q.shape[2]))
        was(buf, page, q, *args)

    monkeypatch.setattr(ops, "cache_append", append)
    part = lambda i, a, b: (str(i), a, *(x[a:b] for x in streams[i]))  # noqa: E731
    first = engine.step([part(i, 0, n) for i, n in ((0, 290), (1, 20), (2, 140), (3, 290))])
    assert chunks == [(1, 128), (1, 20), (2, 128), (1, 128), (1, 12), (1, 128), (1, 34), (1, 34)]
    chunks.clear()
    engine.pages["hit"], engine.tails["hit"] = engine.pages["3"][:4], engine.tails["3"][: 256 // engine.layout.tokens]
    again = ("hit", 256, *(x[256:299] for x in streams[3]))
    *rest, hit = engine.step([part(0, 290, 300), part(1, 20, 260), part(2, 140, 200), again])
    assert chunks == [(1, 10), (1, 108), (1, 60), (1, 43), (1, 128), (1, 4)]
    rest += engine.step([part(3, 290, 299)])
    outs = [torch.cat(both) for both in zip(first, rest, strict=True)]
    for i, (_, packed) in enumerate(expected("kv4", streams, backend=REFERENCE)):
        same(engine, str(i), len(streams[i][0]), packed)
        right(outs[i], engine.stored(str(i), len(streams[i][0])).cpu(), "kv4", streams[i])
    near(hit, outs[3][256:].float())


def test_nonfinite_tokens_are_counted_once():
    q, k, v = stream(200, 12, BF16)
    k[70, 1, 3], v[70, 0, 0], v[130, 0, 0] = torch.nan, torch.inf, torch.nan
    engine = DeviceEngine("kv4")
    for a, b in ((0, 100), (100, 130), (130, 131), (131, 200)):
        engine.step([("a", a, q[a:b], k[a:b], v[a:b])])
    assert int(engine.impl.nonfinite) == 2


@triton.jit
def _drifted(before, after, out, OLD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HOT: tl.constexpr):
    i = tl.program_id(0)
    tl.store(
        out + i, drift.drifted(before + i * 3 * D, after + i * 3 * D, tl.arange(0, DP), OLD, D, DP, HOT).to(tl.int32)
    )


@pytest.mark.parametrize("d,hot", [(80, 4), (16, 8), (32, 0), (256, 16)])
def test_what_drifts_is_what_the_tracker_says(d, hot):
    """Of states that differ in variances and reader powers by little to much; nothing was known before some."""
    g, n = torch.Generator().manual_seed(d), 60
    old = torch.rand(n, 3, d, generator=g) + 0.02
    page = old * torch.exp(torch.randn(n, 3, d, generator=g) * torch.linspace(0, 1.8, n)[:, None, None])
    old[:3, 1] = 0
    new, out = 0.8 * old + 0.2 * page, torch.zeros(n, dtype=torch.int32, device=DEVICE)
    _drifted[(n,)](old.to(DEVICE), new.to(DEVICE), out, OLD=4.0, D=d, DP=triton.next_power_of_2(d), HOT=hot)
    want = ChannelTracker.misfit(ChannelStats.unstack(old), ChannelStats.unstack(new), 0.8, hot) >= DRIFT
    assert 10 < want.sum() < n - 10 and torch.equal(out.cpu() > 0, want)


@pytest.mark.parametrize("cuts,interval", [((0.5, 5.9), 0), ((1, 5), 2)])
def test_drift_alarms(cuts, interval, monkeypatch):
    """As many as in steps that go page by page (test_cache_blocks.py), in prompts and in decoded tokens; in long chunks
    too, which complete more pages than there are states of the tracker elsewhere. Cuts and interval in pages."""
    recipe = "kv4" if DEVICE == "cuda" else "kv4:page=16,ring=16,sinks=4,rewind=0"
    kv = parse_recipe(recipe).kv
    n = 6 * kv.page
    streams = [drifting(21, at, n, BF16) for at in (3 * kv.page, n)]
    want = [drifted(kv, q, k) for q, k, _ in streams]
    assert want[0] >= H and want[1] == 0
    engine = DeviceEngine(recipe)
    engine.steps.interval = interval * kv.page
    for start, end in pairwise([0, *(int(c * kv.page) for c in cuts), n - 1, n]):
        engine.step([(str(i), start, *(x[start:end] for x in s)) for i, s in enumerate(streams)])
    assert int(engine.impl.alarms) == sum(want)
    unbound = Engine("kv4", BF16)
    unbound.tail.kv_cache = torch.empty(0)  # as while a model is loaded: it is not reported
    monkeypatch.setattr(attention, "_installed", [engine.impl, unbound.impl])
    found = [(labels, count) for name, labels, count in attention.rows() if name == "drift_alarms"]
    assert found == [({"of": "cache", "layer": "x"}, sum(want))]


def test_the_kernels_that_are_reported_are_those_that_run(monkeypatch):
    engine, ran = DeviceEngine("kv4"), {}

    def choose(op, layout, device, chunk=ops.ANY, was=ops.choose):
        name, why = was(op, layout, device, chunk)
        ran.setdefault(op, {})[chunk.tokens, chunk.rows] = name
        return name, why

    monkeypatch.setattr(ops, "choose", choose)
    for a, b in ((0, 100), (100, 108), (108, 109)):
        engine.step([("a", a, *(x[a:b] for x in stream(109, 1, BF16)))])
    steps = {(n, G * n) for n in (1, 8)}
    assert set(ran["cache_attention"]) == steps and set(ran["cache_append"]) == steps | {(100, G * 100)}
    want = {op: set(chunks.values()) for op, chunks in ran.items()}
    want["cache_attention"].add("flash (prompts)")
    ran.clear()
    monkeypatch.setattr(attention, "_installed", [engine.impl])
    found = {}
    for name, labels, _ in attention.rows():
        if name == "kernel_info":
            found.setdefault(labels["op"], set()).add(labels["kernel"])
    assert found == want and set(ran["cache_attention"]) == steps


@pytest.mark.parametrize(
    "recipe,workspace",
    [("kv4", 64), ("k4v3:ring=80,sinks=40,page=32,rewind=8", 64), ("k4v3:ring=80,sinks=40,page=32,rewind=8", 32)],
)
def test_a_history_longer_than_the_workspace_is_read_in_pieces(recipe, workspace, monkeypatch):
    """Sinks of the last recipe lie in two of them."""
    monkeypatch.setattr(prompt, "WORKSPACE", workspace)
    pieces, was = [], prompt.flash
    monkeypatch.setattr(prompt, "flash", lambda impl, q, k, *args: pieces.append(len(k)) or was(impl, q, k, *args))
    q, k, v = stream(420, 5, BF16)
    engine, out = DeviceEngine(recipe), []
    for a, b in ((0, 130), (130, 400), (400, 420)):
        pieces.clear()
        out += engine.step([("a", a, q[a:b], k[a:b], v[a:b])])
    assert len(pieces) >= 6 and sum(pieces) == 420 + 19, "history, then the ring before the prompt, then the prompt"
    [(_, packed)] = expected(recipe, [(q, k, v)], backend=REFERENCE)
    same(engine, "a", 420, packed)
    right(torch.cat(out), engine.stored("a", 420).cpu(), recipe, (q, k, v))


@pytest.mark.parametrize("window", [None, 100, 150, 40000])
def test_the_workspace_is_reserved_when_vllm_measures_memory(window, monkeypatch):
    engine = DeviceEngine("kv4", window=window)
    monkeypatch.setattr(pages, "torch", Poisoned())
    monkeypatch.setattr(pages, "serves", lambda layout, device: True)
    q, k, v = stream(30, 1, BF16)
    engine.impl.forward(None, q, k, v, engine.pool, None, torch.empty_like(q))
    assert pages.torch.asked == [prompt.workspace(engine.layout.kv, window, 30)]


def test_rows_of_a_verify_step_are_no_longer_than_the_kernel_takes():
    assert device.DECODE <= MAX_TOKENS
