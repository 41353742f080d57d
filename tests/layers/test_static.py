"""A cache of fixed capacity answers and stores what a growing one does, and allocates once."""

import pytest
import torch

from turboquant.layers.cache import CacheError, LayerCache
from turboquant.recipe import parse_recipe

KV = parse_recipe("kv4:page=16,ring=24,sinks=3,rewind=8").kv


def feed(cache, parts):
    return [cache.step(*(x[:, :, a:b] for x in parts[0])) for a, b in parts[1]]


@pytest.fixture
def chunk():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, h, 150, 16, generator=g) for h in (4, 2, 2)]


def pages(cache):
    return [cache.buf.pages[p] for p in cache._pages]


@pytest.mark.parametrize("window", [None, 30])
def test_the_same_as_a_growing_cache(window, chunk):
    grows, fixed = LayerCache(KV, window), LayerCache(KV, window, capacity=150)
    spans = [(0, 50), (50, 51), (51, 60), (60, 100), (100, 101)]
    for a, b in zip(feed(grows, (chunk, spans)), feed(fixed, (chunk, spans)), strict=True):
        assert torch.equal(a, b)
    held = {name: t.data_ptr() for name, t in vars(fixed.buf).items()}
    for cache in (grows, fixed):
        cache.crop(5)
    for a, b in zip(feed(grows, (chunk, [(96, 140)])), feed(fixed, (chunk, [(96, 140)])), strict=True):
        assert torch.equal(a, b)
    assert held == {name: t.data_ptr() for name, t in vars(fixed.buf).items()}
    assert fixed.lengths == grows.lengths == [140] * 3
    for a, b, ids in zip(pages(grows), pages(fixed), grows._pages, strict=True):
        assert all(i < 0 or torch.equal(x, y) for i, x, y in zip(ids, a, b, strict=True))


def test_reordering_copies_the_pages(chunk):
    grows, fixed = LayerCache(KV), LayerCache(KV, capacity=150)
    for cache in (grows, fixed):
        feed(cache, (chunk, [(0, 50)]))
        cache.take_rows(torch.tensor([2, 0, 2, 1]))
    more = [x[[0, 1, 2, 0], :, 50:90] for x in chunk]
    for a, b in ((0, 20), (20, 40)):
        assert torch.equal(*(c.step(*(x[:, :, a:b] for x in more)) for c in (grows, fixed)))
    assert torch.equal(torch.stack(pages(grows)), torch.stack(pages(fixed)))


def test_its_capacity_is_a_limit(chunk):
    cache = LayerCache(KV, capacity=100)
    feed(cache, (chunk, [(0, 99), (99, 100)]))
    with pytest.raises(CacheError, match="101 tokens are more than the cache's capacity of 100"):
        feed(cache, (chunk, [(100, 101)]))
    assert cache.lengths == [100] * 3


def test_a_replayed_step_is_counted(chunk):
    cache, other = LayerCache(KV, capacity=150), LayerCache(KV, capacity=150)
    feed(cache, (chunk, [(0, 31), (31, 32)]))
    cache.advance(-1)
    assert cache.lengths == [31] * 3 and cache.columns == 31 and len(cache._pages[0]) == 1
    cache.advance(1)
    feed(other, (chunk, [(0, 32)]))
    assert (cache.lengths, cache._pages, cache.columns) == (other.lengths, other._pages, other.columns)
    with pytest.raises(CacheError, match="static"):
        LayerCache(KV).advance(1)
    with pytest.raises(CacheError, match="loaded into one that grows"):
        cache.load(*other.state())
