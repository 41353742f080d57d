"""crop within `rewind`: the tokens never came, bit for bit. Deeper: right lengths, and close."""

import warnings

import pytest
import torch

from turboquant.layers.cache import CacheError, LayerCache
from turboquant.packed.buffers import STATES
from turboquant.recipe import parse_recipe

RECIPES = (
    "kv4:page=16,ring=24,sinks=3,rewind=16",
    "kv4:page=16,ring=0,sinks=0,rewind=16",
    "kv3:page=32,ring=40,sinks=4,rewind=9",
    "plain4:page=16,ring=24,sinks=3,rewind=16",
)


def kv(recipe):
    return parse_recipe(recipe).kv


def join(a, b, n):
    return tuple(torch.cat([x[:, :n], y], 1) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("before", [(47, 20), (48, 64), (49, 33)])
def test_within_rewind_the_tokens_never_came(recipe, window, before, run, tokens, state, same):
    old = [tokens(2, 1, 120, 32, seed=s) for s in range(2)]
    new = [tokens(2, 1, 60, 32, seed=s + 10) for s in range(2)]
    for back in sorted({1, 2, 7, kv(recipe).rewind}):
        # speculation: `back` tokens come one chunk, are rejected, and others come instead
        tried = run(LayerCache(kv(recipe), window), old)
        tried.step(before)
        tried.step((back, back))
        columns = tried.cache.columns
        tried.cache.crop(back)
        assert tried.cache.lengths == list(before) and tried.cache.columns == columns - back
        never = run(LayerCache(kv(recipe), window), old)
        never.step(before)
        for i in range(2):
            same(state(tried.cache, i, rewind=0), state(never.cache, i, rewind=0))
        after = []
        for r in (tried, never):
            more = run(r.cache, [join(o, n, b) for o, n, b in zip(old, new, before, strict=True)])
            more.at = list(before)
            for counts in ((1, 1), (3, 3), (40, 40)):
                more.step(counts)
            after.append([more.output(i) for i in range(2)])
        for i in range(2):
            same(state(tried.cache, i), state(never.cache, i))
            assert torch.equal(after[0][i], after[1][i])


@pytest.mark.parametrize("recipe", RECIPES)
def test_again_and_again(recipe, run, tokens, state, same):
    """Accept one, reject the rest, over several pages."""
    s = tokens(2, 1, 120, 32)
    r = run(LayerCache(kv(recipe)), [s])
    r.step((20,))
    while r.at[0] < 100:
        n = min(kv(recipe).rewind, 8)
        r.step((n,))
        r.cache.crop(n - 1)
        r.at[0] -= n - 1
    alone = run(LayerCache(kv(recipe)), [s])
    alone.step((r.at[0],))
    same(state(r.cache, 0, rewind=0), state(alone.cache, 0, rewind=0))


@pytest.mark.parametrize("recipe", ["kv8:page=16,ring=24,sinks=3,rewind=4", "plain8:page=16,ring=24,sinks=3,rewind=4"])
@pytest.mark.parametrize("back", [5, 16, 33, 60, 100, 118])
def test_deeper_is_close_and_has_the_right_length(recipe, back, run, tokens):
    """At 8 bit what returns from the pages is nearly what was there, and so is everything after."""
    s, tail = tokens(2, 1, 120, 32), tokens(2, 1, 40, 32, seed=5)
    keep = 120 - back
    cropped, never = run(LayerCache(kv(recipe)), [s]), run(LayerCache(kv(recipe)), [s])
    cropped.step((120,))
    with pytest.warns(UserWarning, match=f"taking back {back} tokens, more than rewind=4"):
        cropped.cache.crop(back)
    never.step((keep,))
    assert cropped.cache.lengths == [keep] == cropped.cache.buf.length.tolist()
    assert cropped.cache.columns == keep and len(cropped.cache._pages[0]) == keep // 16
    out = []
    for r in (cropped, never):
        more = run(r.cache, [join(s, tail, keep)])
        more.at = [keep]
        for n in (1, 20, 19):
            more.step((n,))
        out.append(more.output(0))
    assert out[0].isfinite().all()
    assert (out[0] - out[1]).norm() <= 0.02 * out[1].norm()


@pytest.mark.parametrize("recipe", ["kv4:page=32,ring=24,sinks=3,rewind=4", "kv8:page=32,ring=24,sinks=3,rewind=4"])
def test_deep_crop_forgets_the_statistics_of_what_it_took(recipe, run, tokens):
    """Keys ten times as loud and another reader after token 128; cropped to 120 the tracker knows neither."""
    q, k, v = tokens(2, 1, 240, 32)
    q = torch.randn_like(q)
    q[:, :128, 3] *= 8
    q[:, 128:, 9] *= 8
    k[:, 128:] *= 10
    cropped, never = run(LayerCache(kv(recipe)), [(q, k, v)]), run(LayerCache(kv(recipe)), [(q, k, v)])
    cropped.step((240,))
    with pytest.warns(UserWarning, match="taking back"):
        cropped.cache.crop(120)
    never.step((120,))
    opened, samples = 120 // 32, range(96 // 8, 120 // 8)
    got, want = (r.cache.buf.tracker[0, (opened - 1) % 2, 0] for r in (cropped, never))
    off = (got[1] / want[1]).log().abs()
    assert off.median() < 0.7 and off.max() < 3, "variances of the first half (a hundred times smaller)"
    torch.testing.assert_close(got[0], want[0], rtol=0.2, atol=want[1].sqrt().max().item())
    assert got[2].argmax() == want[2].argmax() == 3
    readers = cropped.cache.buf.readers
    assert {readers[0, 0, j % readers.shape[2]].argmax().item() for j in samples} == {3}


def test_deep_crop_of_a_batch_touches_each_row_alone(run, tokens, state, same):
    recipe = kv("kv4:page=16,ring=24,sinks=3,rewind=4")
    sequences = [tokens(2, 1, 120, 32, seed=s) for s in range(2)]
    both = run(LayerCache(recipe), sequences)
    both.step((120, 77))
    with pytest.warns(UserWarning, match="taking back"):
        both.cache.crop(41)
    for i, n in enumerate((120, 77)):
        alone = run(LayerCache(recipe), [sequences[i]])
        alone.step((n,))
        with pytest.warns(UserWarning, match="taking back"):
            alone.cache.crop(41)
        same(state(both.cache, i, rewind=0), state(alone.cache, 0, rewind=0))


def test_within_rewind_there_is_no_warning(run, tokens):
    r = run(LayerCache(kv(RECIPES[0])), [tokens(2, 1, 60, 32)])
    r.step((60,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r.cache.crop(0)
        r.cache.crop(16)
    assert r.cache.lengths == [44]


def test_what_cannot_be_taken_back(run, tokens):
    r = run(LayerCache(kv(RECIPES[0])), [tokens(2, 1, 60, 32, seed=s) for s in range(2)])
    r.step((60, 20))
    for n in (61, -1):
        with pytest.raises(CacheError, match=f"cannot take back {n} columns: the cache holds 60"):
            r.cache.crop(n)
    assert r.cache.lengths == [60, 20], "nothing was taken"
    windowed = run(LayerCache(kv(RECIPES[0]), 8), [tokens(2, 1, 60, 32)])
    windowed.step((60,))
    with pytest.raises(CacheError, match="released pages: at most rewind=16"):
        windowed.cache.crop(17)
    windowed.cache.crop(16)
    LayerCache(kv("kv4")).crop(3)  # empty: nothing to do


def test_padding_is_taken_back_as_padding(run, tokens):
    """Columns are taken back, and of each sequence the tokens that stood in them."""
    r = run(LayerCache(kv(RECIPES[0])), [tokens(2, 1, 80, 32, seed=s) for s in range(2)])
    r.step((60, 50))
    r.step((1, 1))
    right = next(runs for runs in r.cache._padding if runs)
    assert right in ([[0, 10]], [[50, 60]])
    r.cache.crop(6)
    assert r.cache.lengths == ([55, 50] if right == [[50, 60]] else [55, 45]) and r.cache.columns == 55


@pytest.mark.parametrize("steps", [(16, 16), (8, 8, 8, 8), (16, 3, 13)])
def test_small_crops_add_up(run, tokens, steps):
    """The ring remembers `rewind` tokens behind the furthest position, however they are taken back."""
    recipe = kv("kv8:page=16,ring=24,sinks=3,rewind=16")
    sequence = tokens(2, 1, 160, 32)
    r, fresh = run(LayerCache(recipe), [sequence]), run(LayerCache(recipe), [sequence])
    r.step((130,))
    with pytest.warns(UserWarning, match="taking back"):
        for n in steps:
            r.cache.crop(n)
    left = 130 - sum(steps)
    assert r.cache.lengths == [left]
    r.at[0] = left
    fresh.step((left,))
    for x in (r, fresh):
        x.step((1,))
    torch.testing.assert_close(r.output(0)[:, -1], fresh.output(0)[:, -1], atol=0.02, rtol=0.02)


def test_a_deep_crop_recalls_the_tracker(run, tokens):
    recipe = kv("kv8:page=16,ring=24,sinks=3,rewind=4")
    q, k, v = tokens(2, 1, 160, 32)
    sequence = (q, k + 0.5 * torch.arange(160.0)[None, :, None], v)  # the mean drifts, so an old state is a wrong one
    r, fresh = run(LayerCache(recipe), [sequence]), run(LayerCache(recipe), [sequence])
    r.step((150,))
    with pytest.warns(UserWarning, match="taking back"):
        r.cache.crop(90)
    fresh.step((60,))
    got, want = (x.cache.buf.tracker[0, (60 // 16 - 1) % 2] for x in (r, fresh))
    stale = LayerCache(recipe)
    other = run(stale, [sequence])
    other.step((150,))
    before = stale.buf.tracker[0, (60 // 16 - 1) % 2]
    assert (got[:, 0] - want[:, 0]).norm() < 0.5 * (before[:, 0] - want[:, 0]).norm()


def test_a_second_deep_crop_finds_the_tracker_of_what_is_left(run, tokens):
    """Not that of tokens that the first one took, which were louder."""
    found = []
    for cuts in ((490,), (480, 10), ()):
        seq = tokens(1, 1, 1000, 32)
        k = seq[1].clone()
        k[:, 560:] *= 8
        r = run(LayerCache(kv("kv4"), None), [(seq[0], k, seq[2])])
        r.step((510,) if not cuts else (1000,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in cuts:
                r.cache.crop(n)
        assert r.cache.lengths == [510]
        found.append(r.cache.buf.tracker[0, (510 // 64 - 1) % STATES, :, 1])
    for one in found[:2]:
        assert 0.5 < float((one / found[2]).median()) < 2
