"""The Triton backend in Triton's interpreter, on the CPU: the contract of the ops, bytes, and the parts of a prompt.

`make test` runs this file on its own, with TRITON_INTERPRET=1. On a GPU the same is checked by benchmarks/check_gpu.py.
"""

import copy
import importlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turboquant.kernels import ops, reference
from turboquant.layers.cache import LayerCache
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1")

SMALL = "page=16,ring=24,sinks=3,rewind=8"
FP, BF, HF = torch.float32, torch.bfloat16, torch.float16
# recipe, head_dim, query heads, kv heads, dtype, window, softcap, sink logits
SPECS = [
    (f"kv4:{SMALL}", 64, 4, 2, FP, None, None, False),
    (f"k4v3:{SMALL}", 80, 3, 1, BF, None, None, False),
    (f"k3v2:{SMALL}", 96, 2, 1, FP, None, 3.0, True),
    (f"kv8:{SMALL}", 16, 4, 2, HF, 30, None, True),
    (f"kv2:{SMALL}", 16, 7, 1, FP, 7, 5.0, False),
    (f"plain4:{SMALL}", 48, 2, 2, BF, None, None, False),
    (f"plain8:{SMALL}", 16, 2, 1, FP, None, None, False),
    (f"kv4:{SMALL}", 256, 2, 1, FP, None, None, False),
    (f"kv4:{SMALL}", 128, 2, 1, HF, None, None, False),
    ("kv4:page=16,ring=0,sinks=0,rewind=0", 16, 2, 1, FP, None, None, False),
    ("kv4:page=16,ring=0,sinks=20,rewind=16,hot=0", 16, 2, 1, FP, 40, None, False),
    ("kv4:page=48,ring=20,sinks=2,rewind=5,hot=8,decay=0,blend=1", 16, 2, 1, FP, None, None, False),
    ("kv4", 64, 2, 1, BF, None, None, False),
]
# tokens per step of two sequences: prompts, decoding, a sequence that rests, a chunk over several pages
SCHEDULE = [(21, 14), (1, 1), (1, 0), (5, 3), (0, 18), (8, 8), (1, 1), (20, 20)]


def equal_but_for_ties(layout: PageLayout, got: torch.Tensor, want: torch.Tensor) -> None:
    """Bytes of pages (count, H, page_bytes): equal, but for a row or two.

    Sums run in another order: a row may take the other of two trial scales that fit equally well, or its scale, or a
    code next to an edge, round the other way.
    """
    rows = torch.zeros(*got.shape[:2], layout.kv.page, dtype=torch.bool)
    for name in layout.fields:
        a, b = layout.read(got, name), layout.read(want, name)
        if name.endswith(("key_codes", "value_codes")):
            assert ((a.int() - b.int()).abs() <= 1).all(), name
            rows |= (a != b).any(-1)
        elif name.endswith("scale"):
            rows |= a != b
        else:
            assert torch.equal(a, b), name
    assert rows.sum() <= 2
    padding = torch.ones(layout.page_bytes, dtype=torch.bool)
    for f in layout.fields.values():
        padding[f.offset : f.offset + f.nbytes] = False
    assert not got[..., padding].any()


@pytest.mark.parametrize("recipe, d, hq, h, dtype, window, softcap, extra", SPECS)
def test_against_oracle(recipe, d, hq, h, dtype, window, softcap, extra, oracle, run, tokens, close):
    kv = parse_recipe(recipe).kv
    options = dict(scaling=None, softcap=softcap, sink_logits=torch.linspace(-1, 2, hq) if extra else None)
    length = 2 * kv.page + 40
    r = run(LayerCache(kv, window), [tokens(hq, h, length, d, dtype, seed) for seed in range(2)], **options)
    with ops.use_backend("triton"):
        for at, counts in enumerate([*SCHEDULE, *([(75, 75)] if kv.page > 16 else [])]):
            counts = [min(c, length - a) for c, a in zip(counts, r.at, strict=True)]
            r.step(counts, left=at % 2 == 0, row_exact=at == 7 and kv.chunk > 4, masked=at in (3, 4))
    assert r.cache.lengths == r.at == r.cache.buf.length.tolist() and min(r.at) >= 2 * kv.page
    for i in range(2):
        maths = oracle(kv, window, **options)
        want = maths.encode(*r.fed(i))
        got = want.clone()
        for page, at in enumerate(r.cache._pages[i]):
            got[page] = r.cache.buf.pages[at] if at >= 0 else want[page]
        equal_but_for_ties(r.cache.layout, got, want)
        maths.encode = lambda *chunk, got=got: got  # attention to what stands in the pages
        close(maths(*r.fed(i), torch.tensor(r.began[i])), r.output(i))
    assert r.cache.buf.nonfinite.tolist() == [0, 0]


def both(recipe, chunks, window=None):
    """The same chunks through the reference and through Triton."""
    caches = []
    for name in ("reference", "triton"):
        cache = LayerCache(parse_recipe(recipe).kv, window)
        with ops.use_backend(name):
            outs = [cache.step(*chunk) for chunk in chunks]
        caches.append((cache, outs))
    return caches


def pages(cache, row=0):
    return cache.buf.pages[cache._pages[row]]


@pytest.mark.parametrize("name", ["qwen_a", "qwen_b"])
def test_bytes_of_captured_keys(name, real):
    """Real keys, with the outlier channels of Qwen2.5."""
    if f"{name}.k" not in real:
        name = sorted({n.partition(".")[0] for n in real})[0]
    k, v = (real[f"{name}.{x}"][:, :140].unsqueeze(0) for x in "kv")
    q = real[f"{name}.q"][:, :140].unsqueeze(0) if f"{name}.q" in real else k
    q = q[:, : q.shape[1] // k.shape[1] * k.shape[1]]
    chunks = [[x[:, :, a:b].bfloat16() for x in (q, k, v)] for a, b in ((0, 100), (100, 127), (127, 128), (128, 140))]
    (want, _), (got, _) = both("kv4", chunks)
    equal_but_for_ties(got.layout, pages(got), pages(want))
    torch.testing.assert_close(got.buf.tracker, want.buf.tracker, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("odd", ["zero", "constant", "tiny", "too large", "nonfinite"])
def test_bytes_of_odd_values(odd, tokens):
    q, k, v = (t[None] for t in tokens(2, 1, 70, 16))
    if odd == "zero":
        k[:, :, 5:9] = 0
        v[:, :, 16:32] = 0
    elif odd == "constant":
        k[..., 3], v[..., 9] = 2.5, -1.0
    elif odd == "tiny":
        k[:, :, :32] *= 1e-30
        v[:, :, :32] *= 1e-30
    elif odd == "too large":
        k[0, 0, 7, 5], k[0, 0, 11, 0], v[0, 0, 18, 2] = 7e4, -1e30, 65505.0
    else:
        k[0, 0, 3, 5], v[0, 0, 18, 2], k[0, 0, 40, 0] = torch.nan, torch.inf, -torch.inf
    chunks = [[x[:, :, a:b] for x in (q, k, v)] for a, b in ((0, 50), (50, 60), (60, 70))]
    (want, _), (got, _) = both(f"kv4:{SMALL}", chunks)
    equal_but_for_ties(got.layout, pages(got), pages(want))
    assert got.buf.nonfinite.tolist() == want.buf.nonfinite.tolist() == [3 if odd == "nonfinite" else 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_its_readers_only(bad, tokens):
    q, k, v = (t[None] for t in tokens(4, 2, 80, 16))
    v[0, 1, 50, 5] = v[0, 0, 72, 3] = bad
    chunks = [[x[:, :, a:b] for x in (q, k, v)] for a, b in ((0, 40), (40, 62), (62, 65), (65, 80))]
    (_, want), (_, got) = both(f"kv4:{SMALL}", chunks, window=10)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not want[-1].isfinite().all() and want[-1].isfinite().any()


@pytest.fixture
def history(tokens):
    """A layer of two sequences of 90 tokens, and 40 more tokens."""
    sequences = [tokens(4, 2, 130, 16, seed=s) for s in range(2)]
    q, k, v = (torch.stack([s[i] for s in sequences]) for i in range(3))
    cache = LayerCache(parse_recipe(f"kv4:{SMALL}").kv)
    with ops.use_backend("reference"):
        cache.step(q[:, :, :90], k[:, :, :90], v[:, :, :90])
    return cache, q[:, :, 90:], k[:, :, 90:], v[:, :, 90:]


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_change_nothing(splits, history):
    from turboquant.kernels.triton import attention

    cache, *chunk = history
    chunk = [x[:, :, :3] for x in chunk]
    want = reference.cache_attention(cache.buf, cache.layout, *chunk)
    got = attention.generic(cache.buf, cache.layout, *chunk, splits=splits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["kv4", "k3v2", "plain8", "kv8:page=32,rewind=8"])
def test_dequantized_pages_are_the_maths(recipe, tokens):
    from turboquant.kernels import triton

    q, k, v = (t[None] for t in tokens(2, 2, 150, 48))
    cache = LayerCache(parse_recipe(recipe).kv)
    with ops.use_backend("reference"):
        cache.step(q, k, v)
    size, first, last = cache.kv.page, 1, cache.buf.table.shape[1]
    out = torch.full((2, 1, 2, (last - first) * size + 3, 48), torch.nan)
    triton.dequantize_pages(cache.buf, cache.layout, first, last, out[0], out[1])
    want = [d(cache.layout, pages(cache)[first:]).transpose(0, 1).flatten(1, 2) for d in
            (reference.decode_page_keys, reference.decode_page_values)]  # fmt: skip
    for got, w in zip(out[:, 0], want, strict=True):
        torch.testing.assert_close(got[:, :-3], w, rtol=1e-4, atol=1e-5)
        assert got[:, -3:].isnan().all()
    with pytest.raises(ValueError, match="do not fit"):
        triton.dequantize_pages(cache.buf, cache.layout, 0, last + 1, out[0], out[1])


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("workspace", [1 << 24, 1])
def test_a_prompt_over_history_merges_its_parts(workspace, extra, history, monkeypatch):
    """The way of a GPU, with plain torch in the place of flash attention."""
    from turboquant.kernels.triton import prefill

    def flash(q, k, v, causal, scaling):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        logits = q @ k.transpose(2, 3) * scaling
        if causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1)

    monkeypatch.setattr(prefill, "_flash", flash)
    monkeypatch.setattr(prefill, "WORKSPACE", workspace)
    cache, *chunk = history
    logits = torch.linspace(-1, 2, 4) if extra else None
    want = reference.cache_attention(cache.buf, cache.layout, *chunk, scaling=0.2, sink_logits=logits)
    got = prefill.chunk_attention(cache.buf, cache.layout, *chunk, 0.2, logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    chunk[2][0, 0, 3, 3] = torch.nan
    assert prefill.chunk_attention(cache.buf, cache.layout, *chunk, 0.2, logits) is None


def test_a_page_without_a_place_is_not_stored_but_counted(history):
    cache, *chunk = history
    cache._reserve([40, 40])
    want, got = copy.deepcopy(cache.buf), copy.deepcopy(cache.buf)
    got.table[0, 6] = got.table[1, 7] = -1
    with ops.use_backend("reference"):
        ops.cache_append(want, cache.layout, *chunk, None)
    with ops.use_backend("triton"):
        ops.cache_append(got, cache.layout, *chunk, None)
    for now, before, full in zip(got.table.flatten().tolist(), want.table.flatten().tolist(), want.pages, strict=False):
        page = want.pages[before]
        assert torch.equal(got.pages[before], page) if now >= 0 else not torch.equal(got.pages[before], page)
        assert full.shape == page.shape
    torch.testing.assert_close(got.tracker, want.tracker, rtol=1e-5, atol=1e-6)
    assert got.length.tolist() == want.length.tolist() == [130, 130]


def test_as_many_states_of_the_tracker_are_kept_as_there_are_slots(tokens, following):
    following("triton", tokens, exact=False)


def test_buffers_and_chunks_that_do_not_match_are_refused(history):
    cache, q, k, v = history
    with ops.use_backend("triton"):
        with pytest.raises(ValueError, match="do not match"):
            ops.cache_append(cache.buf, cache.layout, q, k, v[:, :, 1:], None)
        cache.buf.length = cache.buf.length.int()
        with pytest.raises(ValueError, match=r"CacheBuffers\.length must be"):
            ops.cache_attention(cache.buf, cache.layout, q, k, v)


class Reads(TorchDispatchMode):
    """Counts what copies a number to the host or makes a shape depend on data."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [1, 5])
def test_a_static_step_reads_nothing_back(n, tokens):
    """Nor does it give new buffers to the cache: what a CUDA graph captures."""
    q, k, v = (t[None] for t in tokens(4, 2, 60, 16))
    cache = LayerCache(parse_recipe(f"kv4:{SMALL}").kv, capacity=64)
    with ops.use_backend("triton"):
        cache.step(q[:, :, :30], k[:, :, :30], v[:, :, :30])
        held = {name: t.data_ptr() for name, t in vars(cache.buf).items()}
        with Reads() as reads:
            for i in range(30, 40, n):  # a page completes on the way
                cache.step(q[:, :, i : i + n], k[:, :, i : i + n], v[:, :, i : i + n])
    assert reads.count == 0
    assert held == {name: t.data_ptr() for name, t in vars(cache.buf).items()}
    assert cache.lengths == cache.buf.length.tolist() == [40]


def test_it_says_what_it_cannot_do():
    from turboquant.kernels import triton

    large = PageLayout(parse_recipe("kv4:page=512").kv, 128)
    assert "too large" in triton.supports("cache_append", large, torch.device("cpu"))
    assert "meta" in triton.supports("cache_append", None, torch.device("meta"))
    assert ops.choose("cache_append", None, torch.device("cpu"))[0] in ("cpu", "reference")
    assert "interpreter" in ops.choose("cache_append", None, torch.device("cpu"))[1]


TRITON = """
    import os
    import torch, torch.nn.functional as F
    from turboquant.kernels.triton.rows import fused_quantize, tile_of
    from turboquant.kernels.fused import NormRule, rms_norm
    from turboquant.maths.activations import encode_int8
    assert tile_of(96) == (32, 1, 16) and tile_of(14336) == (64, 32, 256) and tile_of(16384) == (64, 256, 256)
    for width in (16, 96, 576, 896, 1536, 3 * 8192, 4096):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(2, 3, width).to(dtype)
            x[..., 5] *= 30
            w, g = torch.rand(width).add(0.5).to(dtype), torch.randn(2, 3, width).to(dtype)
            normed = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
            kept = torch.full_like(x, torch.nan)
            cases = [
                (fused_quantize(x), x),
                (fused_quantize(x, norm=w, eps=1e-5), normed * w),
                (fused_quantize(x, norm=w, eps=1e-5, shift=1.0), (normed.float() * (1 + w.float())).to(dtype)),
                (fused_quantize(x, norm=w, eps=1e-5, once=True, keep=kept), rms_norm(x, w, NormRule(1e-5, once=True))),
                (fused_quantize(x, gate=g), F.silu(g) * x),
                (fused_quantize(x, gate=g, activation="gelu_tanh"), F.gelu(g, approximate="tanh") * x),
                (fused_quantize(x.transpose(0, 1)), x.transpose(0, 1)),
            ]
            tight = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(kept, cases[3][1], **tight)
            for i, (got, seen) in enumerate(cases):
                want = encode_int8(seen)
                assert got.codes.shape == seen.shape and got.unit.shape == (*seen.shape[:-1], 1)
                torch.testing.assert_close(got.unit, want.unit, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=0)
                off = (got.codes.int() - want.codes.int()).abs()
                assert off.max() <= 1 and (off > 0).float().mean() < 0.01, (width, dtype, i)
    assert fused_quantize(torch.randn(0, 64)).codes.shape == (0, 64)
    one, two = torch.ones(64), torch.ones(2, 64)
    for bad in (dict(norm=torch.ones(3)), dict(gate=torch.ones(2, 3)), dict(norm=one, gate=two)):
        try:
            fused_quantize(torch.randn(2, 64), **bad)
        except ValueError:
            continue
        raise AssertionError(bad)
    for width in (8, 24):
        try:
            fused_quantize(torch.randn(2, width))
        except ValueError as e:
            assert f"width={width}" in str(e)
"""


def test_triton_kernel_in_the_interpreter():
    """Norm, activation, rotation, scale and codes in one pass, compared with maths; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRITON)], capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_quantizer_lets_in_early_what_waits_for_its_weight_only():
    """The CUDA product of few rows; humming-kernels, which takes more rows, gains nothing by it."""
    from turboquant.kernels.triton.rows import LAUNCH

    linear = importlib.import_module("turboquant.kernels.cuda.linear")  # the package has a function of this name
    assert LAUNCH.early_to == linear.FEW
