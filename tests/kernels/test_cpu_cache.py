"""The CPU backend against the reference: bytes equal, outputs within twice the error of torch at the same dtype.

Every check feeds chunks through a LayerCache whose buffers were poisoned, compares what comes out of `cpu` with float64
arithmetic on the same bytes, and knows how large the reference's own error is.
"""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant.kernels import ops, reference
from turboquant.kernels.cpu import cache as cpu
from turboquant.layers.cache import LayerCache
from turboquant.maths.codec import LiveCodes, codebook, lloyd_max, log_decode, token_scale, unrotate
from turboquant.packed.page import unpack_keys, unpack_values
from turboquant.recipe import parse_recipe

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")

RECIPES = ("kv4", "kv3", "kv2", "kv8", "k4v3", "k8v2", "k3v8", "plain4", "plain3", "plain2", "plain8")
SHAPES = ((64, 7), (128, 4), (256, 4), (16, 1), (48, 2), (80, 3), (96, 14))  # head_dim, queries per KV head
# every recipe with two shapes and two dtypes, every shape with several of both; `test_fuzz` draws other combinations
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(recipe, *SHAPES[(i + 3 * j) % 7], DTYPES[(i + j) % 3], id=f"{recipe}-{SHAPES[(i + 3 * j) % 7][0]}")
    for i, recipe in enumerate(RECIPES)
    for j in range(2)
]
CHUNKS = (1, 5, 190, 1, 1, 33, 1, 128, 1, 2, 3)  # page and ring edges fall into chunks, between them and beside them


@pytest.fixture(autouse=True)
def _on_cpu():
    with ops.use_backend("cpu"):
        yield


def make_chunks(sizes, batch, heads, group, d, dtype, padding=0.0, seed=0):
    """Chunks (q, k, v, valid) with channels of very different means and scales."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    mean, scale = 3 * normal(batch, heads, 1, d), 2 * torch.rand(batch, heads, 1, d, generator=g) + 0.1
    chunks = []
    for n in sizes:
        q, v = normal(batch, heads * group, n, d), normal(batch, heads, n, d)
        k = normal(batch, heads, n, d) * scale + mean
        valid = torch.rand(batch, n, generator=g) >= padding if padding else None
        chunks.append((q.to(dtype), k.to(dtype), v.to(dtype), valid))
    return chunks


def poison(cache: LayerCache, k: torch.Tensor) -> None:
    """Start the cache with memory that no kernel may read."""
    cache._start(k)
    for name in ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker"):
        getattr(cache.buf, name).fill_(torch.nan)
    pages = torch.full((3, *cache.buf.pages.shape[1:]), 0xEE, dtype=torch.uint8)
    for f in cache.layout.fields.values():  # halves become NaN; indices stay such that the reference can read them
        if f.dtype == torch.float16 or f.name == "key_hot_index":
            pages[..., f.offset : f.offset + f.nbytes] = 0xFF if f.dtype == torch.float16 else 0
    cache.buf.pages, cache._free = pages, [0, 1, 2]


class Softmax64(reference._Softmax):
    def __init__(self, q, *args):
        super().__init__(q.double(), *args)
        self.top, self.sum = self.top.double(), self.sum.double()

    def add(self, k, v, see):
        super().add(k.double(), v.double(), see)


def decode64(layout, pages, part):
    bits = layout.kv.key_bits if part == "keys" else layout.kv.value_bits
    c = unpack_keys(layout, pages) if part == "keys" else unpack_values(layout, pages)
    if layout.kv.codec == "plain":
        return unrotate(lloyd_max(bits)[c.codes.long()].double() * c.scale.double().unsqueeze(-1))
    rows = c.rows if isinstance(c, LiveCodes) else c
    x = codebook(bits)[rows.codes.long()].double() * token_scale(rows.log_scale, rows.base).double().unsqueeze(-1)
    x = unrotate(x)
    if not isinstance(c, LiveCodes):
        return x
    mean = c.mean_code.double() * c.mean_step.double().unsqueeze(-1)
    x = (x + mean.unsqueeze(-2)) * log_decode(c.log_s).double().unsqueeze(-2)
    hot = c.hot_mean.double().unsqueeze(-1) + c.hot_codes.double() * c.hot_step.double().unsqueeze(-1)
    return x.scatter(-1, c.hot_index.long().unsqueeze(-2).expand(*x.shape[:-1], -1), hot.transpose(-1, -2))


def exact_attention(buf, layout, q, k, v, *args, **kwargs):
    """The reference's attention in float64 on the same bytes."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(reference, "_Softmax", Softmax64)
        m.setattr(reference, "decode_page_keys", lambda lay, p: decode64(lay, p, "keys"))
        m.setattr(reference, "decode_page_values", lambda lay, p: decode64(lay, p, "values"))
        return reference.cache_attention(buf, layout, q.double(), k.double(), v.double(), *args, **kwargs)


def check_outputs(recipe, chunks, window=None, causal_mask=False, **kwargs):
    """Each chunk's output against float64, with the reference's error as the measure; returns the cache."""
    cache = LayerCache(parse_recipe(recipe).kv, window)
    poison(cache, chunks[0][1])
    ours = theirs = scale = 0.0
    for q, k, v, valid in chunks:
        n = k.shape[2]
        mask = None
        if causal_mask:
            mask = torch.ones(n, n, dtype=torch.bool).tril().expand(k.shape[0], 1, n, n)
            mask = mask & (torch.ones_like(mask) if valid is None else valid[:, None, None, :])
        args = (q, k, v, valid, mask)
        extra = dict(kwargs, window=window)
        truth = exact_attention(cache.buf, cache.layout, *args, **extra)
        plain = reference.cache_attention(cache.buf, cache.layout, *args, **extra)
        got = cpu.cache_attention(cache.buf, cache.layout, *args, **extra)
        assert got.shape == q.shape and got.dtype == q.dtype
        assert got.isfinite().all()
        if valid is not None:
            assert not got.transpose(1, 2)[~valid].any()
        ours += (got - truth).square().sum().item()
        theirs += (plain - truth).square().sum().item()
        scale += truth.square().sum().item()
        cache.step(q, k, v, valid=valid, mask=mask, **kwargs)
    assert ours**0.5 <= 2 * theirs**0.5 + 1e-7 * scale**0.5, (ours / scale, theirs / scale)
    return cache


@pytest.mark.parametrize("recipe, d, group, dtype", CASES[::2] + CASES[1:7:2])
def test_attention_against_float64(recipe, d, group, dtype):
    padding = 0.2 if group in (3, 4) else 0.0
    check_outputs(recipe, make_chunks(CHUNKS, 2, 2, group, d, dtype, padding))


@pytest.mark.parametrize(
    "recipe, dtype",
    [
        ("kv4:page=16,rewind=16", torch.float32),
        ("kv4:page=512", torch.bfloat16),
        ("kv4:page=48,rewind=0", torch.float32),
        ("kv4:ring=0,sinks=0", torch.bfloat16),
        ("kv4:ring=0,sinks=64", torch.float32),
        ("kv4:ring=200,sinks=1", torch.bfloat16),
        ("kv4:hot=0", torch.float32),
        ("k3v2:hot=17", torch.bfloat16),
    ],
)
def test_pages_rings_and_sinks(recipe, dtype):
    chunks = make_chunks((3, 61, 1, 300, 1, 29, 150, 1, 1), 2, 2, 3, 64, dtype, padding=0.1)
    check_outputs(recipe, chunks)


@pytest.mark.parametrize(
    "window, options, causal_mask",
    [
        (None, "both", False),
        (None, "sinks", True),
        (1, "", False),
        (1, "sinks", True),
        (40, "softcap", False),
        (40, "both", True),
        (128, "both", False),
        (128, "", True),
        (300, "sinks", False),
        (300, "softcap", True),
    ],
)
def test_window_softcap_sink_logits_and_mask(window, options, causal_mask):
    kwargs = {"scaling": 0.2}
    if options in ("softcap", "both"):
        kwargs["softcap"] = 3.0
    if options in ("sinks", "both"):
        kwargs["sink_logits"] = torch.tensor([-3.0, 0.5, 9.0, 2.0])
    check_outputs("kv4", make_chunks(CHUNKS, 2, 2, 2, 64, torch.float32, padding=0.2), window, causal_mask, **kwargs)


def run(recipe, chunks, window=None):
    cache = LayerCache(parse_recipe(recipe).kv, window)
    poison(cache, chunks[0][1])
    return cache, [cache.step(q, k, v, valid=valid) for q, k, v, valid in chunks]


def pages_of(cache, row=0):
    return cache.buf.pages[cache._pages[row]]


def compare_bytes(recipe, chunks):
    """Both backends leave the same bytes everywhere."""
    ours, _ = run(recipe, chunks)
    with ops.use_backend("reference"):
        theirs, _ = run(recipe, chunks)
    live = ["tracker"] if ours.kv.codec == "live" else []
    for name in ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "length", "nonfinite", *live):
        a, b = getattr(ours.buf, name), getattr(theirs.buf, name)
        assert torch.equal(a.nan_to_num(77), b.nan_to_num(77)), name
    for row in range(len(ours.lengths)):
        a, b = pages_of(ours, row), pages_of(theirs, row)
        assert len(a) >= 2
        for name in ours.layout.fields:  # one by one, to see which
            assert torch.equal(*(ours.layout.read(x, name).nan_to_num(77) for x in (a, b))), name
        assert torch.equal(a, b)
    return ours


@pytest.mark.parametrize("recipe, d, group, dtype", CASES)
def test_bytes_equal_the_references(recipe, d, group, dtype):
    compare_bytes(recipe, make_chunks((70, 1, 63, 130, 9), 2, 2, group, d, dtype, padding=0.1))


@pytest.mark.parametrize("odd", ["zero", "constant", "denormal", "huge", "too large", "nonfinite"])
@pytest.mark.parametrize("recipe", ["kv4", "kv8", "k3v2", "plain4"])
def test_bytes_of_odd_values(recipe, odd):
    chunks = make_chunks((70, 90, 60), 1, 2, 2, 64, torch.float32)
    for _, k, v, _ in chunks:
        if odd == "zero":
            k[:, :, 5:9] = 0
            v[:, 0] = 0
        elif odd == "constant":
            k[..., 3], v[..., 9] = 2.5, -1.0
        elif odd == "denormal":
            k[:, 1], v[:, 1] = k[:, 1] * 1e-40, v[:, 1] * 1e-40
        elif odd == "huge":
            k[..., 7] *= 1e4
            v[..., 2] *= 1e4
        elif odd == "too large":
            k[0, 0, 7, 5], k[0, 1, 11, 0], v[0, 1, 8, 2] = 7e4, -1e30, 65505.0
        else:
            k[0, 0, 3, 5], v[0, 1, 8, 2], k[0, 1, 11, 0] = torch.nan, torch.inf, -torch.inf
    cache = compare_bytes(recipe, chunks)
    assert cache.buf.nonfinite.tolist() == ([9] if odd == "nonfinite" else [0])


@pytest.mark.parametrize("recipe", ["kv4", "kv3", "plain4"])
def test_bytes_depend_on_the_sequence_alone(recipe):
    """A batch or each alone, one chunk or many, padded or not, one thread or two: the same pages, bit for bit."""
    chunks = make_chunks((300,), 3, 2, 2, 64, torch.bfloat16)
    whole, _ = run(recipe, chunks)
    q, k, v, _ = chunks[0]
    threads = torch.get_num_threads()
    for row in range(3):
        edges = [0, 1, 64, 100, 129, 300]
        parts = [(*(x[row : row + 1, :, i:j] for x in (q, k, v)), None) for i, j in pairwise(edges)]
        padded = []
        for a, b, c, _ in parts:  # a padding column before each chunk
            pad = lambda x: torch.cat([torch.full_like(x[:, :, :1], torch.nan), x], 2)  # noqa: E731
            valid = torch.ones(1, a.shape[2] + 1, dtype=torch.bool)
            valid[:, 0] = False
            padded.append((pad(a), pad(b), pad(c), valid))
        for some in (parts, padded):
            try:
                torch.set_num_threads(1)
                alone, _ = run(recipe, some)
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(pages_of(alone), pages_of(whole, row))


@pytest.mark.parametrize("d, group, n", [(64, 7, 5), (128, 4, 8), (80, 1, 3), (64, 9, 9)])
def test_rows_of_a_verify_step_equal_single_steps(d, group, n):
    """Also across a page edge, and whatever the number of threads: bit for bit."""
    head = make_chunks((125, 3000, 65), 1, 2, group, d, torch.float32)
    q, k, v, _ = make_chunks((n,), 1, 2, group, d, torch.float32, seed=1)[0]
    cache, _ = run("kv4", head)
    single = copy.deepcopy(cache)
    together = cache.step(q, k, v)
    for threads in (1, 2):
        again = copy.deepcopy(single)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            rows = [again.step(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(n)]
        finally:
            torch.set_num_threads(before)
        assert torch.equal(together, torch.cat(rows, 2))


def test_a_row_does_not_depend_on_its_batch():
    chunks = make_chunks((200, 1, 90, 1), 3, 2, 3, 64, torch.float32, padding=0.2)
    _, outs = run("kv4", chunks)
    for row in range(3):
        _, alone = run("kv4", [tuple(x[row : row + 1] for x in c) for c in chunks])
        for a, b in zip(alone, outs, strict=True):
            assert torch.equal(a, b[row : row + 1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_instruction_sets_write_the_same_bytes_and_agree(recipe, monkeypatch):
    chunks = make_chunks((90, 1, 1, 180), 1, 2, 5, 80, torch.float32)
    results = {}
    for isa in cpu.isas():
        monkeypatch.setenv("TURBOQUANT_CPU_ISA", isa)
        assert cpu.isa() == isa
        results[isa] = run(recipe, chunks)
    (first, outs), *others = results.values()
    for cache, some in others:
        assert torch.equal(pages_of(cache), pages_of(first))
        for a, b in zip(outs, some, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_strides_are_honoured():
    """Queries, keys and values as transformers hands them over: (B, n, H, d) seen transposed."""
    chunks = make_chunks((130, 1, 40), 2, 2, 3, 64, torch.bfloat16)
    turned = [
        (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), valid) for q, k, v, valid in chunks
    ]
    (a, x), (b, y) = run("kv4", chunks), run("kv4", turned)
    assert torch.equal(a.buf.pages[a._pages[0]], b.buf.pages[b._pages[0]])
    assert all(torch.equal(i, j) for i, j in zip(x, y, strict=True))


@pytest.mark.parametrize("recipe", ["kv4", "plain4"])
def test_a_page_without_a_place_is_not_stored_but_counted(recipe):
    """-1 in the table of a page that completes: statistics and tracker advance, nothing is written."""
    chunks = make_chunks((60, 210), 2, 2, 2, 64, torch.float32)
    kept, _ = run(recipe, chunks)
    cache, _ = run(recipe, chunks[:1])
    (q, k, v, _), size = chunks[1], cache.kv.page
    ids = kept.buf.table.clone()
    ids[0, 1] = ids[1, 0] = -1
    cache.buf.pages, cache.buf.table = torch.full_like(kept.buf.pages, 0xEE), ids
    cpu.cache_append(cache.buf, cache.layout, q, k, v, None)
    assert ids.shape[1] == 270 // size
    for got, want in zip(ids.flatten().tolist(), kept.buf.table.flatten().tolist(), strict=True):
        expected = kept.buf.pages[want] if got >= 0 else torch.full_like(kept.buf.pages[want], 0xEE)
        assert torch.equal(cache.buf.pages[want], expected)
    for name in ("ring_k", "ring_v", "readers", "tracker", "length", "nonfinite"):
        a, b = getattr(cache.buf, name), getattr(kept.buf, name)
        assert torch.equal(a.nan_to_num(77), b.nan_to_num(77)), name


def test_a_window_that_passed_by_is_not_stored():
    """A prompt much longer than the window: `LayerCache` gives -1 to the pages that nobody will read."""
    chunks = make_chunks((500, 1, 70, 1), 2, 2, 2, 64, torch.float32)
    cache = check_outputs("kv4", chunks, window=100)
    assert cache._pages[0][0] == -1 and cache._pages[0][-1] >= 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal_mask", [False, True])
@pytest.mark.parametrize("n, d", [(40, 64), (3, 16), (1, 64)])
def test_a_value_that_is_not_finite_reaches_its_readers_only(n, d, causal_mask, bad):
    """In the ring and in the chunk; a window lets later queries be past it again."""
    chunks = make_chunks((70, 40, n), 2, 2, 3, d, torch.float32)
    chunks[1][2][0, 1, 30, 5] = chunks[2][2][1, 0, n // 2, 3] = bad
    cache = LayerCache(parse_recipe("kv4").kv, 20)
    for q, k, v, _ in chunks:
        m = k.shape[2]
        causal = torch.ones(m, m, dtype=torch.bool).tril()[None, None]
        mask = causal & ~causal.tril(-20) if causal_mask else None
        if cache.buf is not None:
            want = reference.cache_attention(cache.buf, cache.layout, q, k, v, None, mask, window=20)
            got = cpu.cache_attention(cache.buf, cache.layout, q, k, v, None, mask, window=20)
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
            assert not want.isfinite().all()
        cache.step(q, k, v, mask=mask)


@settings(max_examples=10)
@given(
    recipe=st.sampled_from(RECIPES),
    page=st.sampled_from([16, 32, 64, 80, 128]),
    ring=st.integers(0, 200),
    sinks=st.integers(0, 8),
    d=st.sampled_from(range(16, 257, 16)),
    heads=st.integers(1, 3),
    group=st.integers(1, 10),
    batch=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    padding=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_fuzz(recipe, page, ring, sinks, d, heads, group, batch, sizes, window, dtype, padding, seed):
    chunks = make_chunks(sizes, batch, heads, group, d, dtype, padding, seed)
    with ops.use_backend("cpu"):
        check_outputs(f"{recipe}:page={page},ring={ring},sinks={sinks},rewind=16", chunks, window)
