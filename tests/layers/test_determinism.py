"""A sequence's bytes depend on its tokens alone: not on chunks, padding, or the batch it stands in."""

import pytest
import torch

from turboquant.layers.cache import LayerCache
from turboquant.recipe import parse_recipe

RECIPES = (
    "kv4:page=16,ring=24,sinks=3,rewind=16",
    "k3v2:page=32,ring=0,sinks=0,rewind=0",
    "plain4:page=16,ring=5,sinks=4,rewind=4",
    "kv8:page=16,ring=48,sinks=20,rewind=16",
)
N = 90


def kv(recipe):
    return parse_recipe(recipe).kv


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


def feed(run, cache, sequences, steps, **how):
    r = run(cache, sequences)
    for counts in steps:
        r.step(counts, **how)
    return r


def chunks(n, size):
    return [(min(size, n - i),) for i in range(0, n, size)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("size", [1, 7, 16, 17, 40])
def test_chunked_is_whole(recipe, window, size, run, tokens, state, same):
    s = tokens(4, 2, N, 32)
    whole = feed(run, LayerCache(kv(recipe), window), [s], [(N,)]).cache
    same(state(feed(run, LayerCache(kv(recipe), window), [s], chunks(N, size)).cache, 0), state(whole, 0))


def test_row_exact_changes_no_byte(recipe, run, tokens, state, same):
    s = tokens(4, 2, N, 32)
    whole = feed(run, LayerCache(kv(recipe)), [s], [(N,)])
    exact = feed(run, LayerCache(kv(recipe)), [s], [(N,)], row_exact=True)
    same(state(exact.cache, 0), state(whole.cache, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_exact_answers_as_one_by_one(recipe, dtype, run, tokens):
    s = tokens(4, 2, N, 32, dtype)
    one = feed(run, LayerCache(kv(recipe)), [s], chunks(N, 1))
    exact = feed(run, LayerCache(kv(recipe)), [s], [(N,)], row_exact=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(exact.output(0), one.output(0), rtol=0, atol=16 * eps)


@pytest.mark.parametrize("left", [True, False])
def test_batch_is_its_sequences(recipe, left, run, tokens, state, same):
    """Unequal lengths, padded at either side, against each sequence alone in one piece."""
    lengths = (N, 33, 50, 1, 64)
    sequences = [tokens(4, 2, n, 32, seed=n) for n in lengths]
    steps = [
        [min(40, n) for n in lengths],
        [max(0, min(n, 80) - 40) for n in lengths],
        [max(0, n - 80) for n in lengths],
    ]
    r = feed(run, LayerCache(kv(recipe)), sequences, steps, left=left)
    assert r.at == list(lengths)
    for i, s in enumerate(sequences):
        alone = feed(run, LayerCache(kv(recipe)), [s], [(lengths[i],)])
        same(state(r.cache, i), state(alone.cache, 0))
        assert alone.output(0).isfinite().all() and r.output(i).isfinite().all()


def test_order_of_the_rows(recipe, run, tokens, state, same):
    sequences = [tokens(2, 1, N, 32, seed=s) for s in range(3)]
    there = feed(run, LayerCache(kv(recipe)), sequences, [(N, 30, 51), (0, 40, 2)])
    back = feed(run, LayerCache(kv(recipe)), sequences[::-1], [(51, 30, N), (2, 40, 0)])
    for i in range(3):
        same(state(there.cache, i), state(back.cache, 2 - i))
        torch.testing.assert_close(there.output(i), back.output(2 - i), rtol=1e-5, atol=1e-6)


def test_large_batch_with_threads(run, tokens, state, same):
    """Torch splits large tensors among threads; the split must not reach the bytes."""
    recipe = kv("kv4:page=64,ring=0,sinks=4,rewind=0")
    sequences = [tokens(16, 8, 130, 128, seed=s) for s in range(6)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        r = feed(run, LayerCache(recipe), sequences, [(130,) * 6])
        torch.set_num_threads(1)
        for i in (0, 5):
            same(state(r.cache, i), state(feed(run, LayerCache(recipe), [sequences[i]], [(130,)]).cache, 0))
    finally:
        torch.set_num_threads(before)


def test_memory_layout_of_the_input(recipe, tokens, state, same):
    """transformers hands over transposed views of (B, n, H, d)."""
    q, k, v = (x.unsqueeze(0) for x in tokens(4, 2, N, 32))
    view = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    a, b = LayerCache(kv(recipe)), LayerCache(kv(recipe))
    torch.testing.assert_close(a.step(q, k, v), b.step(view(q), view(k), view(v)), rtol=1e-5, atol=1e-6)
    same(state(a, 0), state(b, 0))


def test_steps_without_tokens(recipe, run, tokens, state, same):
    """A sequence whose columns are all padding, also as the very first step."""
    sequences = [tokens(2, 1, N, 32, seed=s) for s in range(2)]
    r = feed(run, LayerCache(kv(recipe)), sequences, [(0, 5), (0, 30), (40, 0), (0, 0), (20, 20), (1, 0)])
    assert r.cache.lengths == [61, 55]
    for i in range(2):
        same(state(r.cache, i), state(feed(run, LayerCache(kv(recipe)), [sequences[i]], [(r.at[i],)]).cache, 0))


def fork(run, recipe, tokens, window=None):
    """Three sequences of unequal length, and the caches of their prefixes."""
    sequences = [tokens(2, 1, N, 32, seed=s) for s in range(3)]
    r = feed(run, LayerCache(kv(recipe), window), sequences, [(40, 21, 34), (1, 1, 1)])
    return sequences, r


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 1], [0, 0, 2, 2, 1], [1], [2, 0]])
def test_take_rows_then_continue(recipe, window, index, run, tokens, state, same):
    """Reordered, repeated or selected sequences go on as if each had run alone; shared pages are never overwritten."""
    sequences, r = fork(run, recipe, tokens, window)
    lengths = [r.at[i] for i in index]
    tails = [tokens(2, 1, 60, 32, seed=100 + s) for s in range(len(index))]
    joined = [
        tuple(torch.cat([a[:, :n], b], 1) for a, b in zip(sequences[i], t, strict=True))
        for i, n, t in zip(index, lengths, tails, strict=True)
    ]
    r.cache.take_rows(torch.tensor(index))
    assert r.cache.lengths == lengths
    more = run(r.cache, joined)
    more.at = list(lengths)
    for counts in ([1] * len(index), [30] * len(index)):
        more.step(counts)
    swap = list(range(len(index)))[::-1]
    r.cache.take_rows(torch.tensor(swap))
    last = run(r.cache, [joined[i] for i in swap])
    last.at = [more.at[i] for i in swap]
    last.step([3] * len(index))
    for row, i in enumerate(swap):
        alone = feed(run, LayerCache(kv(recipe), window), [joined[i]], [(last.at[row],)])
        same(state(r.cache, row), state(alone.cache, 0))


def test_take_rows_frees_what_nobody_names(run, tokens):
    _, r = fork(run, RECIPES[0], tokens)
    before = sum(map(len, r.cache._pages))
    assert len(r.cache._free) == r.cache.buf.pages.shape[0] - before
    r.cache.take_rows(torch.tensor([1, 1]))
    assert len(set(r.cache._pages[0])) == len(r.cache._pages[0]) and r.cache._pages[0] == r.cache._pages[1]
    assert len(r.cache._free) == r.cache.buf.pages.shape[0] - len(r.cache._pages[0])


def test_saved_state_continues_bit_equal(recipe, run, tokens, state, same):
    sequences, r = fork(run, recipe, tokens)
    tensors, values = r.cache.state()
    copy = LayerCache(kv(recipe))
    copy.load({n: t.clone() for n, t in tensors.items()}, values)
    assert copy.columns == r.cache.columns
    for i in range(3):
        same(state(copy, i), state(r.cache, i))
    other = run(copy, sequences)
    other.at = list(r.at)
    for x in (r, other):
        x.step((20, 40, 3))
        x.step((1, 1, 1))
    for i in range(3):
        same(state(copy, i), state(r.cache, i))
        assert torch.equal(other.output(i), r.output(i)[:, -other.output(i).shape[1] :])


def test_saved_state_without_any_page_left(run, tokens):
    """A window so short that every page was released, beside a sequence that has none yet."""
    recipe, sequences = kv("kv4:page=16,ring=0,sinks=0,rewind=0"), [tokens(2, 1, N, 32, seed=s) for s in range(2)]
    r = feed(run, LayerCache(recipe, 1), sequences, [(33, 5)])
    copy = LayerCache(recipe, 1)
    copy.load(*r.cache.state())
    other = run(copy, sequences)
    other.at = list(r.at)
    for x in (r, other):
        x.step((1, 1))
    for i in range(2):
        assert torch.equal(other.output(i), r.output(i)[:, -1:])


def test_empty_state_round_trip():
    cache, copy = LayerCache(kv("kv4")), LayerCache(kv("kv4"))
    copy.load(*cache.state())
    assert copy.buf is None and copy.columns == 0
