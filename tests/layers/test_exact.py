"""Where nothing is quantized the cache is ordinary attention, at 8 bit nearly so; sizes are what they should be."""

import pytest
import torch
import torch.nn.functional as F

from turboquant.layers.cache import CacheError, LayerCache
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe, RecipeError, parse_recipe


def batch(tokens, hq, h, n, d, dtype=torch.float32, rows=2):
    sequences = [tokens(hq, h, n, d, dtype, seed) for seed in range(rows)]
    return tuple(torch.stack([s[x] for s in sequences]) for x in range(3))


def formula(q, k, v, window=None, softcap=None, extra=None, scaling=None):
    """Attention as the textbook has it, in the dtype of its input."""
    g, n = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    t = torch.arange(n)
    see = (t[None] <= t[:, None]) & (t[:, None] - t[None] < (window or n))
    weight = torch.exp(logits - logits.amax()).masked_fill(~see, 0)
    total = weight.sum(-1, keepdim=True)
    if extra is not None:
        total = total + torch.exp(extra.to(q.dtype).view(1, -1, 1, 1) - logits.amax())
    return weight / total @ v


def feed(cache, q, k, v, sizes, **options):
    out, at = [], 0
    for n in sizes:
        part = slice(at, at + n)
        out.append(cache.step(q[:, :, part], k[:, :, part], v[:, :, part], **options))
        at += n
    return torch.cat(out, 2)


SIZES = (40, 1, 1, 30, 1, 17, 1, 1)
N = sum(SIZES)
OPTIONS = [
    {},
    {"window": 25},
    {"softcap": 4.0},
    {"extra": torch.linspace(-2, 3, 4)},
    {"window": 25, "softcap": 4.0, "extra": torch.linspace(-2, 3, 4), "scaling": 0.3},
]


def through(kv, q, k, v, sizes=SIZES, window=None, softcap=None, extra=None, scaling=None):
    cache = LayerCache(kv, window)
    return feed(cache, q, k, v, sizes, softcap=softcap, sink_logits=extra, scaling=scaling)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "causal")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_inside_the_ring_it_is_exact_attention(heads, options, dtype, tokens):
    """Pages are written and never read: 2-bit codes change nothing. Error within twice plain torch's own."""
    q, k, v = batch(tokens, *heads, N, 32, dtype)
    want = formula(q.double(), k.double(), v.double(), **options)
    coarse = formula(q, k, v, **options)
    got = through(KVRecipe(2, 2, page=16, ring=N, rewind=16), q, k, v, **options)
    assert got.dtype == dtype
    floor = torch.finfo(dtype).eps / 4 * rms(want)
    assert rms(got.double() - want) <= 2 * max(rms(coarse.double() - want), floor)


def test_against_torch_sdpa(tokens):
    q, k, v = batch(tokens, 4, 2, N, 64)
    got = through(KVRecipe(8, 8, page=16, ring=N, rewind=16), q, k, v)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "causal")
@pytest.mark.parametrize("recipe", ["kv8:page=16,ring=0,sinks=0,rewind=0", "kv8:page=16,ring=20,sinks=4,rewind=16"])
def test_eight_bits_are_nearly_exact(recipe, options, tokens):
    """Pages are read: measured relative error 0.4 %; an off-by-one in page, window or mask costs tens of percent."""
    q, k, v = batch(tokens, 4, 2, N, 64)
    want = formula(q.double(), k.double(), v.double(), **options)
    got = through(parse_recipe(recipe).kv, q, k, v, **options)
    assert 0 < rms(got - want) <= 0.01 * rms(want)


def test_fewer_bits_err_more_and_the_ring_helps(tokens):
    q, k, v = batch(tokens, 4, 2, N, 64)
    want = formula(q.double(), k.double(), v.double())
    error = lambda b, ring: rms(through(KVRecipe(b, b, page=16, ring=ring, rewind=0), q, k, v) - want).item()  # noqa: E731
    errors = [error(b, 0) for b in (8, 4, 3, 2)]
    assert errors == sorted(errors) and errors[-1] > 10 * errors[0]
    assert error(4, 40) < error(4, 20) < error(4, 0)


def test_sliding_window_frees_its_pages(tokens):
    kv = KVRecipe(page=16, ring=16, rewind=0)
    q, k, v = batch(tokens, 2, 1, 600, 16, rows=2)
    cache, full = LayerCache(kv, 40), LayerCache(kv)
    most = []
    for c in (cache, full):
        for at in range(0, 600, 20):
            part = slice(at, at + 20)
            c.step(q[:, :, part], k[:, :, part], v[:, :, part])
            most.append(sum(p >= 0 for pages in cache._pages for p in pages))
    assert max(most) <= 2 * (40 // 16 + 2)
    assert cache.buf.pages.shape[0] <= 2 * (40 // 16 + 5) < 2 * (600 // 16) <= full.buf.pages.shape[0]
    assert cache._pages[0][0] == -1 and cache._pages[0][-1] >= 0


def test_old_tokens_cost_packed_bytes_only(tokens):
    """The 16-bit part does not grow, and a token costs what its page costs, in what is really allocated."""
    kv = parse_recipe("kv4").kv
    layout = PageLayout(kv, 64)
    q, k, v = batch(tokens, 2, 1, 4 * kv.page, 64, torch.bfloat16, rows=2)
    cache = LayerCache(kv)
    assert cache.nbytes() == {"pages": 0, "ring": 0, "state": 0}
    seen = []
    for _ in range(10):
        cache.step(q, k, v)
        seen.append(cache.nbytes())
    assert len({s["ring"] for s in seen}) == len({s["state"] for s in seen}) == 1
    assert seen[0]["ring"] == 2 * 2 * (kv.ring_slots + kv.sinks) * 64 * 2
    pages = 2 * 10 * 4
    exact = pages * layout.page_bytes + pages * 4  # and the table
    assert exact <= seen[-1]["pages"] <= exact * 9 / 8 + layout.page_bytes
    assert sum(t.nbytes for t in vars(cache.buf).values()) == sum(seen[-1].values())
    numbers = 2 * cache.columns * 64 * 2
    assert seen[-1]["pages"] * 8 / numbers <= (layout.key_bits + layout.value_bits) / 2 * 9 / 8 + 0.1
    held = [t for t in vars(cache).values() if torch.is_tensor(t)]
    assert not held, "no tensor outside the buffers"


def test_reset(tokens):
    q, k, v = batch(tokens, 2, 1, 40, 16)
    cache = LayerCache(KVRecipe(page=16, rewind=16))
    first = cache.step(q, k, v)
    cache.reset()
    assert cache.columns == 0 and cache.buf is None and cache.lengths == []
    assert torch.equal(cache.step(q, k, v), first)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 3, 16), (1, 2, 3, 16), (1, 2, 3, 32)), "differ in shape"),
        (((1, 3, 3, 16), (1, 2, 3, 16), (1, 2, 3, 16)), "queries .* do not fit keys"),
        (((1, 2, 4, 16), (1, 2, 3, 16), (1, 2, 3, 16)), "queries .* do not fit keys"),
        (
            ((2, 2, 3, 16), (2, 2, 3, 16), (2, 2, 3, 16)),
            "holds 1 sequences of 2 heads .* 16, got 2 of 2 with 16",
        ),
        (((1, 1, 3, 16), (1, 1, 3, 16), (1, 1, 3, 16)), "holds 1 sequences of 2 heads"),
        (
            ((1, 2, 3, 32), (1, 2, 3, 32), (1, 2, 3, 32)),
            "holds 1 sequences of 2 heads .* 16, got .* with 32",
        ),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    cache = LayerCache(KVRecipe(page=16, rewind=16))
    cache.step(*(torch.randn(1, 2, 3, 16) for _ in range(3)))
    with pytest.raises(CacheError, match=message):
        cache.step(*(torch.randn(s) for s in shapes))
    assert cache.lengths == [3]


def test_dtype_that_does_not_fit():
    cache = LayerCache(KVRecipe(page=16, rewind=16))
    cache.step(*(torch.randn(1, 2, 3, 16) for _ in range(3)))
    with pytest.raises(CacheError, match=r"holds torch.float32, got torch.bfloat16"):
        cache.step(*(torch.randn(1, 2, 3, 16).bfloat16() for _ in range(3)))


def test_head_dim_that_the_codec_cannot_take():
    with pytest.raises(RecipeError, match="head_dim=40"):
        LayerCache(KVRecipe()).step(*(torch.randn(1, 1, 3, 40) for _ in range(3)))
