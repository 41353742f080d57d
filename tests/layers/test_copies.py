"""Which copy of a token is read: one copy is changed, and exactly the queries that should read it answer otherwise."""

import copy

import pytest
import torch

from turboquant.layers.cache import LayerCache
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe

N = 70
CASES = [
    (KVRecipe(page=16, ring=24, sinks=3, rewind=16), None),
    (KVRecipe(page=16, ring=0, sinks=0, rewind=16), None),
    (KVRecipe(page=16, ring=60, sinks=20, rewind=0), None),
    (KVRecipe(page=16, ring=24, sinks=3, rewind=16), 40),
    (KVRecipe(codec="plain", page=16, ring=7, sinks=1, rewind=3), None),
]


def reads(kv, window, j, t, began):
    """(sees, 16-bit copy): the rule, said once more."""
    sees = j <= t and (window is None or t - j < window)
    complete = (j // kv.page + 1) * kv.page <= began
    return sees, j < kv.sinks or j > t - kv.ring or not complete


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0].name}-{c[1]}")
def filled(request, tokens):
    """A cache of N tokens and three queries to come."""
    kv, window = request.param
    sequences = [tokens(2, 1, N + 3, 16, seed=s) for s in range(2)]
    q, k, v = (torch.stack([s[x] for s in sequences]) for x in range(3))
    cache = LayerCache(kv, window)
    cache.step(*(x[:, :, :N] for x in (q, k, v)))
    return kv, window, cache, tuple(x[:, :, N:] for x in (q, k, v))


def changed(cache, new, spoil):
    """(2, n) which of the next queries of each sequence answer otherwise once `spoil` has changed a buffer."""
    before = copy.deepcopy(cache).step(*new)
    other = copy.deepcopy(cache)
    spoil(other)
    after = other.step(*new)
    return ((after - before).abs().amax((1, 3)) > 0).tolist()


@pytest.mark.parametrize("what", ["k", "v"])
def test_sixteen_bit_copies(filled, what):
    kv, window, cache, new = filled
    for j in range(N):
        name = f"sink_{what}" if j < kv.sinks else f"ring_{what}"
        held = getattr(cache.buf, name)
        if j >= kv.sinks and j < N - held.shape[2]:
            continue  # overwritten

        def spoil(c, name=name, j=j):
            buffer = getattr(c.buf, name)
            buffer[1, :, j % buffer.shape[2] if name.startswith("ring") else j] += 1.0

        one = kv.rewind < 2  # then three tokens are a prompt chunk: the first completes no page here
        for size in (1, 3):
            got = changed(cache, tuple(x[:, :, :size] for x in new), spoil)
            want = []
            for t in range(N, N + size):
                sees, exact = reads(kv, window, j, t, N if one else t)
                want.append(sees and exact)
            assert got == [[False] * size, want], (j, size)


@pytest.mark.parametrize("what", ["key_codes", "value_codes"])
def test_pages(filled, what):
    kv, window, cache, new = filled
    layout = PageLayout(kv, 16)
    f = layout.fields[what]
    row = f.nbytes // kv.page
    for j in range(N // kv.page * kv.page):
        at = cache._pages[1][j // kv.page]
        if at < 0:
            assert not reads(kv, window, j, N, N)[0]
            continue

        def spoil(c, at=at, j=j):
            here = f.offset + j % kv.page * row
            c.buf.pages[at, :, here : here + row] ^= 0xFF

        got = changed(cache, tuple(x[:, :, :1] for x in new), spoil)
        sees, exact = reads(kv, window, j, N, N)
        assert got == [[False], [sees and not exact]], j


def test_a_prompt_chunk_reads_itself_in_sixteen_bit(tokens):
    """Longer than rewind+1: pages that the chunk completes are not read by it, unless row_exact asks for it."""
    kv = KVRecipe(2, 2, page=16, ring=0, sinks=0, rewind=0)
    q, k, v = (x.unsqueeze(0) for x in tokens(2, 1, N, 16))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(LayerCache(kv).step(q, k, v), want, rtol=1e-4, atol=1e-5)
    exact = LayerCache(kv).step(q, k, v, row_exact=True)
    off = (exact - want).abs().amax((0, 1, 3)) > 1e-3
    assert not off[:16].any() and off[17:].all()
