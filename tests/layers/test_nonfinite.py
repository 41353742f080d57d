"""A NaN or an infinity stays with its token: counted, saturated in codes; no other token moves."""

import math

import pytest
import torch

from turboquant.kernels.reference import decode_page_keys, decode_page_values
from turboquant.layers.cache import LayerCache
from turboquant.recipe import parse_recipe

RECIPES = (
    "kv4:page=16,ring=8,sinks=2,rewind=16",
    "plain4:page=16,ring=8,sinks=2,rewind=16",
    "kv8:page=16,ring=8,rewind=16",
)
BAD = (math.nan, math.inf, -math.inf)
N = 60


def batch(tokens):
    sequences = [tokens(4, 2, N, 32, seed=s) for s in range(2)]
    return [torch.stack([s[x] for s in sequences]) for x in range(3)]


def spoilt(tokens, where, value, at=20, head=1, whole=False):
    qkv = batch(tokens)
    for name in where:
        x = qkv["qkv".index(name)]
        x[1, head, at, slice(None) if whole else 7] = value
    return qkv


def feed(recipe, q, k, v, sizes):
    cache, out, at = LayerCache(parse_recipe(recipe).kv), [], 0
    for n in sizes:
        out.append(cache.step(*(x[:, :, at : at + n] for x in (q, k, v))))
        at += n
    return cache, torch.cat(out, 2)


ONE = [1] * N


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("whole", [False, True])
def test_no_other_token_is_touched(recipe, where, whole, tokens):
    """Whatever the bad value is, all fields that are not the token's own are the same bytes."""
    caches = [feed(recipe, *spoilt(tokens, where, x, whole=whole), [N])[0] for x in BAD]
    clean = feed(recipe, *batch(tokens), [N])[0]
    layout, at = clean.layout, 20
    own = {"key_log_scale": 0, "key_codes": 0, "key_scale": 0, "value_log_scale": 0, "value_codes": 0, "value_scale": 0}
    own["key_hot_codes"] = 1  # the dimension of the tokens
    for cache in caches:
        assert cache.buf.nonfinite.tolist() == [0, 1]
        for p, (mine, theirs) in enumerate(zip(cache._pages[1], caches[0]._pages[1], strict=True)):
            for name in layout.fields:
                a, b = (layout.read(c.buf.pages[i], name) for c, i in ((cache, mine), (caches[0], theirs)))
                if name in own and p == at // layout.kv.page:
                    keep = torch.arange(layout.kv.page) != at % layout.kv.page
                    a, b = (x[:, keep] if own[name] == 0 else x[:, :, keep] for x in (a, b))
                assert torch.equal(a, b), (p, name)
            assert decode_page_keys(layout, cache.buf.pages[mine]).isfinite().all()
            assert decode_page_values(layout, cache.buf.pages[mine]).isfinite().all()
        for p in range(at // layout.kv.page):  # pages before it, and the other sequence: as without it
            assert torch.equal(cache.buf.pages[cache._pages[1][p]], clean.buf.pages[clean._pages[1][p]])
        for a, b in zip(cache._pages[0], clean._pages[0], strict=True):
            assert torch.equal(cache.buf.pages[a], clean.buf.pages[b])
        if parse_recipe(recipe).kv.codec == "live":
            assert cache.buf.tracker[:, :].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", [ONE, [15, 30, 15], [N]], ids=["one by one", "chunks", "whole"])
@pytest.mark.parametrize("where", ["k", "v"])
def test_answers_before_it_and_of_others_are_finite_and_unmoved(recipe, sizes, where, tokens):
    """A query before the bad token, and every query of another head or sequence, answers as if it were not there."""
    at = 20
    _, clean = feed(recipe, *batch(tokens), sizes)
    for value in BAD:
        _, out = feed(recipe, *spoilt(tokens, where, value, at), sizes)
        torch.testing.assert_close(out[0], clean[0], rtol=1e-5, atol=1e-6)  # the other sequence
        torch.testing.assert_close(out[1, :2], clean[1, :2], rtol=1e-5, atol=1e-6)  # the other KV head
        torch.testing.assert_close(out[1, 2:, :at], clean[1, 2:, :at], rtol=1e-5, atol=1e-6)  # before it


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("value", BAD)
def test_answers_are_finite_again_once_it_has_left_the_ring(recipe, where, value, tokens):
    kv, at = parse_recipe(recipe).kv, 20
    _, out = feed(recipe, *spoilt(tokens, where, value, at), ONE)
    gone = max(at + kv.ring, (at // kv.page + 1) * kv.page)  # the first query that reads the page
    assert out[1, :, gone:].isfinite().all()
    if where != "k" or math.isnan(value):
        assert not out[1, 2:, at:gone].isfinite().all(-1).any(), "in the ring it is what it is"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_query_spoils_its_own_answer_only(recipe, tokens):
    cache, out = feed(recipe, *spoilt(tokens, "q", math.nan, 23), [20, 20, 20])  # position 23 is a reader sample
    _, clean = feed(recipe, *batch(tokens), [20, 20, 20])
    assert cache.buf.nonfinite.tolist() == [0, 0]
    keep = torch.arange(N) < 23
    torch.testing.assert_close(out[:, :, keep], clean[:, :, keep])
    assert out[1, 1, 23].isnan().all()
    rest = out.clone()
    rest[1, 1, 23] = 0
    assert rest.isfinite().all()
    assert cache.buf.readers.isfinite().all() or cache.kv.codec == "plain"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_token_bad(recipe, tokens):
    q, k, v = batch(tokens)
    cache, _ = feed(recipe, q, k * math.nan, v * math.inf, [N])
    assert cache.buf.nonfinite.tolist() == [N, N]
    for pages in cache._pages:
        for p in pages:
            assert decode_page_keys(cache.layout, cache.buf.pages[p]).isfinite().all()
            assert decode_page_values(cache.layout, cache.buf.pages[p]).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_token_counts_once_however_bad(recipe, tokens):
    q, k, v = batch(tokens)
    k[0, :, 3], v[0, :, 3], k[0, 0, 9] = math.nan, math.inf, -math.inf
    for sizes in ([N], ONE):
        assert feed(recipe, q, k, v, sizes)[0].buf.nonfinite.tolist() == [2, 0]
