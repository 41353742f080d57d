"""cache_append and cache_attention of every backend against the oracle: bytes bit-equal, outputs within rounding.

The tables register tests: a backend added to ops.BACKENDS or a line added to SPECS is tested without more ado.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turboquant.kernels import ops
from turboquant.layers.cache import LayerCache
from turboquant.recipe import EXAMPLES, KVRecipe, parse_recipe


@dataclass(frozen=True)
class Spec:
    """A layer: recipe and shapes."""

    recipe: str
    d: int = 64
    hq: int = 4
    h: int = 2
    window: int | None = None
    softcap: float | None = None
    extra: bool = False  # sink logits
    scaling: float | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        parts = [self.recipe, f"d{self.d}", f"{self.hq}over{self.h}"]
        parts += [f"{n}{x}" for n in ("window", "softcap", "scaling") if (x := getattr(self, n)) is not None]
        return "-".join([*parts, *(["extra"] if self.extra else []), str(self.dtype).removeprefix("torch.")])


SMALL = "page=16,ring=24,sinks=3,rewind=8"
CPU = torch.device("cpu")
HERE = [b for b in ops.BACKENDS if not any(ops._refusal(b, op, None, CPU) for op in ops.OPS)]  # run on this machine
SPECS = [
    *(Spec(f"{r}:{SMALL}") for r in (*EXAMPLES, "plain8")),
    *(Spec(f"kv4:{SMALL}", d=d) for d in (16, 80, 96, 128, 256)),
    *(Spec(f"plain3:{SMALL}", d=d) for d in (96, 128)),
    Spec(f"kv4:{SMALL}", hq=3, h=3),
    Spec(f"kv4:{SMALL}", hq=6, h=1),
    Spec(f"kv4:{SMALL}", hq=14, h=2),
    Spec("kv4:page=16,ring=0,sinks=0,rewind=0"),
    Spec("kv4:page=16,ring=0,sinks=20,rewind=16"),
    Spec("kv4:page=16,ring=1,sinks=0,rewind=3"),
    Spec("kv4:page=32,ring=16,sinks=4,rewind=0"),
    Spec("kv4:page=32,ring=48,sinks=40,rewind=32"),
    Spec("kv4:page=16,ring=24,hot=0,rewind=8"),
    Spec("kv4:page=16,ring=24,hot=64,rewind=8"),
    Spec("kv4:page=16,ring=24,decay=0,blend=1,rewind=8"),
    Spec("kv4"),
    *(Spec(f"kv4:{SMALL}", window=w) for w in (1, 7, 16, 30, 100)),
    Spec("kv4:page=16,ring=0,sinks=0,rewind=0", window=20),
    Spec(f"kv4:{SMALL}", softcap=3.0),
    Spec(f"kv4:{SMALL}", extra=True),
    Spec(f"kv4:{SMALL}", softcap=5.0, extra=True, window=30, scaling=0.3),
    Spec(f"kv4:{SMALL}", scaling=0.05),
    *(Spec(f"kv4:{SMALL}", dtype=t) for t in (torch.bfloat16, torch.float16)),
    Spec(f"plain4:{SMALL}", dtype=torch.bfloat16),
    Spec(f"kv8:{SMALL}", dtype=torch.float16, window=30, softcap=5.0, extra=True),
]

# Tokens per step of three sequences: a prompt, decoding, a sequence that rests, a chunk over several pages, nothing.
SCHEDULE = [(37, 20, 33), (1, 1, 1), (1, 1, 0), (5, 0, 3), (0, 30, 47), (1, 1, 1), (8, 8, 8), (1, 1, 1), (40, 40, 1)]
LENGTH = 110


def layer(spec: Spec):
    extra = torch.linspace(-1, 2, spec.hq) if spec.extra else None
    options = dict(scaling=spec.scaling, softcap=spec.softcap, sink_logits=extra)
    kv = parse_recipe(spec.recipe).kv
    return LayerCache(kv, spec.window), kv, options


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_backend_against_oracle(spec, backend, oracle, run, tokens, close):
    cache, kv, options = layer(spec)
    length = max(LENGTH, 2 * kv.page + 40)
    sequences = [tokens(spec.hq, spec.h, length, spec.d, spec.dtype, seed) for seed in range(3)]
    r = run(cache, sequences, **options)
    with ops.use_backend(backend):
        for at, counts in enumerate([*SCHEDULE, *([(40, 40, 40)] if kv.page > 32 else [])]):
            counts = [min(c, length - a) for c, a in zip(counts, r.at, strict=True)]
            r.step(counts, left=at % 2 == 0, row_exact=at == 8)
    assert cache.lengths == r.at == cache.buf.length.tolist() and min(r.at) >= 2 * kv.page
    for i in range(3):
        want = oracle(kv, spec.window, **options)(*r.fed(i), torch.tensor(r.began[i]))
        close(want, r.output(i))
        if spec.window is None:
            assert torch.equal(r.pages(i), want.pages)
        else:
            oldest = r.at[i] - kv.rewind - spec.window + 1  # token that a query may still read after a crop
            for page, (at, bytes_) in enumerate(zip(cache._pages[i], want.pages, strict=True)):
                assert at < 0 or torch.equal(cache.buf.pages[at], bytes_)
                assert at >= 0 or (page + 1) * kv.page <= oldest, "released while a query can reach it"
                assert at < 0 or (page + 2) * kv.page > oldest, "kept for nothing"
    assert cache.buf.nonfinite.tolist() == [0, 0, 0], "padding is not counted"


@st.composite
def cases(draw):
    page = draw(st.sampled_from([16, 32]))
    kv = KVRecipe(
        key_bits=draw(st.sampled_from([2, 3, 4, 8])),
        value_bits=draw(st.sampled_from([2, 3, 4, 8])),
        codec=draw(st.sampled_from(["live", "live", "plain"])),
        page=page,
        hot=draw(st.integers(-1, 8)),
        ring=draw(st.integers(0, 50)),
        sinks=draw(st.integers(0, 20)),
        rewind=draw(st.integers(0, page)),
    )
    window = draw(st.none() | st.integers(1, 60))
    count = st.integers(0, 3) | st.integers(0, 40)
    steps = draw(st.lists(st.tuples(count, count, st.booleans(), st.booleans(), st.booleans()), min_size=2, max_size=9))
    return kv, window, steps, draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases())
def test_any_chunking_and_padding(backend, case, oracle, run, tokens, close):
    """Two sequences, any recipe, any steps: bytes and outputs are the oracle's."""
    kv, window, steps, (hq, h) = case
    sequences = [tokens(hq, h, 9 * 40, 16, seed=s) for s in range(2)]
    r = run(LayerCache(kv, window), sequences)
    with ops.use_backend(backend):
        for a, b, left, row_exact, masked in steps:
            r.step((a, b), left, row_exact, masked)
    if r.cache.buf is None:
        return
    for i in range(2):
        assert r.cache.lengths[i] == r.at[i] == r.cache.buf.length[i]
        if r.at[i]:
            want = oracle(kv, window)(*r.fed(i), torch.tensor(r.began[i]))
            close(want, r.output(i))
            for page, bytes_ in zip(r.cache._pages[i], want.pages, strict=True):
                assert page < 0 or torch.equal(r.cache.buf.pages[page], bytes_)


def test_tiles_change_nothing(monkeypatch, run, tokens):
    """The reference goes through pages and chunk in tiles; a tiny tile gives the same answer."""
    from turboquant.kernels import reference

    backend, out = "reference", []
    for size in (reference.TILE, 1):
        monkeypatch.setattr(reference, "TILE", size)
        r = run(LayerCache(parse_recipe(f"kv4:{SMALL}").kv), [tokens(4, 2, 90, 16, seed=s) for s in range(2)])
        with ops.use_backend(backend):
            for counts in ((60, 50), (1, 1), (20, 30)):
                r.step(counts)
        out.append([r.output(i) for i in range(2)])
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-5)


def test_explain_names_a_kernel_for_every_op():
    rows = ops.explain()
    assert [r["op"] for r in rows] == list(ops.OPS)
    assert all(r["kernel"] in ops.BACKENDS and r["why"] for r in rows)


def test_what_was_asked_for_runs_or_says_why_not(monkeypatch):
    with (
        pytest.raises(ops.BackendError, match=r"'abacus' is not known: choose one of .*reference"),
        ops.use_backend("abacus"),
    ):
        pass
    from turboquant.kernels import reference

    refuse = lambda op, layout, device: "no luck today" if op == "cache_append" else None  # noqa: E731
    monkeypatch.setattr(reference, "supports", refuse, raising=False)
    with ops.use_backend("reference"), pytest.raises(ops.BackendError, match=r"reference.*cache_append.*no luck today"):
        ops.choose("cache_append", None, torch.device("cpu"))
    assert ops.choose("cache_attention", None, torch.device("cpu"))[0] in ops.BACKENDS
    monkeypatch.setattr(ops, "BACKENDS", ("reference",))
    with pytest.raises(ops.BackendError, match="no luck today"):
        ops.choose("cache_append", None, torch.device("cpu"))


def test_under_compile_the_ops_are_kept_whole(tokens):
    """No graph break, and the buffers are written as without torch.compile."""
    start, step = [[t[None] for t in tokens(4, 2, n, 16, seed=n)] for n in (90, 3)]
    caches = [LayerCache(parse_recipe(f"kv4:{SMALL}").kv) for _ in range(2)]
    outs = []
    for cache, compiled in zip(caches, (False, True), strict=True):
        cache.step(*start)
        cache._reserve([3])

        def both(q, k, v, buf=cache.buf, layout=cache.layout):
            out = ops.cache_attention(buf, layout, q, k, v, scaling=0.2)
            ops.cache_append(buf, layout, q, k, v, None)
            return out + 1

        outs.append((torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both)(*step))
    assert torch.equal(*outs)
    a, b = (c.state()[0] for c in caches)
    assert a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(7), b[n].nan_to_num(7)) for n in a)
    assert a["length"].tolist() == [93]


def test_use_backend_ends_with_its_context():
    with ops.use_backend("reference"):
        assert ops.choose("cache_append", None, torch.device("cpu"))[1] == "asked for"
    assert ops.choose("cache_append", None, torch.device("cpu"))[1] != "asked for"


@pytest.mark.parametrize("scaling", [0.3, 1.0])
def test_a_first_chunk_obeys_its_scaling(scaling, tokens):
    q, k, v = (t[None] for t in tokens(4, 2, 40, 16))
    out = LayerCache(parse_recipe("kv4").kv).step(q, k, v, scaling=scaling)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=scaling, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)


def test_pages_encoded_a_few_at_a_time_are_the_same(monkeypatch, tokens):
    from turboquant.kernels import reference

    q, k, v = (t[None] for t in tokens(4, 2, 150, 16))
    pages = []
    for at_once in (256, 2, 1):
        monkeypatch.setattr(reference, "PAGES_AT_ONCE", at_once)
        cache = LayerCache(parse_recipe("kv4:page=16,ring=24,rewind=16").kv)
        cache.step(q, k, v)
        pages.append(cache.state()[0])
    assert pages[0]["pages"].shape[0] == 9
    for other in pages[1:]:
        assert torch.equal(pages[0]["pages"], other["pages"]) and torch.equal(pages[0]["tracker"], other["tracker"])


def test_a_decode_step_decodes_a_bounded_tile(monkeypatch, tokens):
    """Never the whole cache at once."""
    from turboquant.kernels import reference

    q, k, v = (t[None] for t in tokens(4, 2, 200, 16))
    cache = LayerCache(parse_recipe("kv4:page=16,ring=16,rewind=16").kv)
    cache.step(q[:, :, :199], k[:, :, :199], v[:, :, :199])
    sizes, decode = [], reference.decode_page_keys
    monkeypatch.setattr(reference, "TILE", 4096)
    monkeypatch.setattr(reference, "decode_page_keys", lambda *a: (sizes.append(decode(*a).numel()), decode(*a))[1])
    with ops.use_backend("reference"):
        cache.step(q[:, :, 199:], k[:, :, 199:], v[:, :, 199:])
    assert len(sizes) > 1 and max(sizes) <= 4096


def test_a_prompt_longer_than_the_window_stores_the_window_only(tokens):
    q, k, v = (t[None] for t in tokens(4, 2, 400, 16))
    whole, parts = (LayerCache(parse_recipe("kv4:page=16,ring=16,rewind=16").kv, 64) for _ in range(2))
    whole.step(q, k, v)
    for i in range(0, 400, 50):
        parts.step(q[:, :, i : i + 50], k[:, :, i : i + 50], v[:, :, i : i + 50])
    assert whole.buf.pages.shape[0] <= parts.buf.pages.shape[0] <= 400 // 16 // 2
    live = [i for i, page in enumerate(whole._pages[0]) if page >= 0]
    assert live == [i for i, page in enumerate(parts._pages[0]) if page >= 0]
    for i in live:
        assert torch.equal(whole.buf.pages[whole._pages[0][i]], parts.buf.pages[parts._pages[0][i]])


@pytest.mark.parametrize("backend", HERE)
def test_pages_that_nobody_reads_may_hold_anything(backend, tokens):
    """The table of the shorter of two sequences names a page that was never written: vLLM's does."""
    cache = LayerCache(parse_recipe(f"kv4:{SMALL}").kv)
    q, k, v = (torch.stack(t) for t in zip(tokens(4, 2, 100, 16), tokens(4, 2, 100, 16, seed=1), strict=True))
    cache.step(q, k, v, valid=torch.arange(100) < torch.tensor([[100], [30]]))
    q, k, v = (t[:, :, :1] for t in (q, k, v))
    buf = cache.buf
    with ops.use_backend(backend):
        want = ops.cache_attention(buf, cache.layout, q, k, v, scaling=0.2)
        buf.pages = torch.cat([buf.pages, torch.full_like(buf.pages[:1], 255)])
        buf.table = torch.where(
            torch.arange(buf.table.shape[1]) < buf.length[:, None] // 16, buf.table, len(buf.pages) - 1
        )
        assert buf.table[1, 4] == len(buf.pages) - 1, "row 0 reads its page there"
        assert torch.equal(ops.cache_attention(buf, cache.layout, q, k, v, scaling=0.2), want)


@pytest.mark.parametrize("backend", HERE)
def test_as_many_states_of_the_tracker_are_kept_as_there_are_slots(backend, tokens, following):
    """By chunks of one page and of several, fewer and more than there are slots."""
    following(backend, tokens)
