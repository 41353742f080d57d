"""ChannelTracker: its statistics against direct computation, and what follows from them."""

import pytest
import torch

from turboquant.maths.codec import decode_keys, encode_keys
from turboquant.maths.tracker import ChannelStats, ChannelTracker, page_stats


def stats(d: int = 16, heads: int = 2) -> ChannelStats:
    return ChannelStats(torch.randn(heads, d), torch.rand(heads, d) + 0.1, torch.rand(heads, d) + 0.1)


def same(a: ChannelStats, b: ChannelStats, **tolerance) -> None:
    torch.testing.assert_close(a.stack(), b.stack(), **tolerance)


def test_page_stats_against_direct_computation():
    k, power = torch.randn(3, 2, 32, 16) * 4 + 7, torch.rand(3, 2, 16)
    usable = torch.rand(3, 2, 32) > 0.3
    got = page_stats(k, power, usable)
    for i in range(3):
        for h in range(2):
            kept = k[i, h, usable[i, h]].double()
            torch.testing.assert_close(got.mean[i, h], kept.mean(0).float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.var[i, h], kept.var(0, unbiased=False).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(got.power, power)


def test_unusable_tokens_may_hold_anything():
    k, usable = torch.randn(1, 32, 16), torch.ones(1, 32, dtype=torch.bool)
    usable[0, [0, 9]] = False
    clean = page_stats(k, torch.ones(1, 16), usable)
    k[0, 0], k[0, 9] = torch.nan, torch.inf
    same(page_stats(k, torch.ones(1, 16), usable), clean, rtol=0, atol=0)


def test_page_without_usable_tokens():
    got = page_stats(torch.full((1, 32, 16), torch.nan), torch.ones(1, 16), torch.zeros(1, 32, dtype=torch.bool))
    assert not got.mean.any() and not got.var.any()


def test_update_is_an_exponential_average():
    pages, decay = [stats() for _ in range(5)], 0.7
    tracker = ChannelTracker(decay, None)
    want = None
    for page in pages:
        tracker.update(page)
        now = page.stack().double()
        want = now if want is None else decay * want + (1 - decay) * now
    torch.testing.assert_close(tracker.state.stack().double(), want, rtol=1e-5, atol=1e-6)


def test_update_with_decay_zero_forgets():
    tracker = ChannelTracker(0.0, stats())
    page = stats()
    tracker.update(page)
    same(tracker.state, page, rtol=0, atol=0)


def test_frozen_has_the_mean_of_the_page_and_mixes_the_rest_with_the_past():
    state, page = stats(), stats()
    tracker = ChannelTracker(0.5, state)
    same(tracker.frozen(page, 1.0), page)
    got = tracker.frozen(page, 0.25)
    mix = lambda a, b: 0.75 * a + 0.25 * b  # noqa: E731
    same(got, ChannelStats(page.mean, mix(state.var, page.var), mix(state.power, page.power)))
    assert tracker.state is state
    same(ChannelTracker(0.5, None).frozen(page, 0.25), page)


def test_stack_round_trip():
    s = stats()
    same(ChannelStats.unstack(s.stack()), s, rtol=0, atol=0)
    assert s.stack().shape == (2, 3, 16)


def test_scales_balance_keys_and_readers():
    """s minimises Σ σ²_Q s² · mean(σ²_K/s²) over all s, is (σ_K/σ_Q)^½ up to a factor, and has unit RMS."""
    st = stats(64)
    s = st.scales()
    torch.testing.assert_close(s.square().mean(-1), torch.ones(2), rtol=1e-5, atol=0)
    ratio = s / (st.var / st.power).pow(0.25)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=0)
    cost = lambda s: (st.power * s**2).sum(-1) * (st.var / s**2).mean(-1)  # noqa: E731
    for _ in range(20):
        assert (cost(s * torch.exp(0.1 * torch.randn_like(s))) > cost(s)).all()


def test_hot_channels_have_the_largest_product():
    st = stats(64)
    importance = st.var * st.power
    for count in (0, 1, 4, 64):
        hot = st.hot(count)
        assert hot.shape == (2, count) and (hot.diff() > 0).all()
        for h in range(2):
            assert set(hot[h].tolist()) == set(importance[h].topk(count).indices.tolist())


def test_hot_depends_on_keys_and_on_readers():
    var, power = torch.ones(1, 16), torch.ones(1, 16)
    var[0, 3], power[0, 3] = 100.0, 1e-4  # loud, but nobody reads it
    var[0, 5], power[0, 7] = 2.0, 3.0
    assert ChannelStats(torch.zeros(1, 16), var, power).hot(2).tolist() == [[5, 7]]


def test_equal_channels_are_taken_in_order():
    one = torch.ones(1, 16)
    assert ChannelStats(one, one, one).hot(3).tolist() == [[0, 1, 2]]


def test_drift():
    page = stats(64)
    tracker = ChannelTracker(0.5, None)
    assert not tracker.drift(page).any(), "nothing to drift from"
    tracker.update(page)
    assert tracker.drift(page).abs().max() < 1e-6
    moved = [tracker.drift(ChannelStats(page.mean + x * page.var.sqrt(), page.var, page.power)) for x in (0.5, 1, 2)]
    for x, drift in zip((0.5, 1, 2), moved, strict=True):
        torch.testing.assert_close(drift, torch.full((2,), float(x)), rtol=1e-4, atol=1e-4)
    louder = tracker.drift(ChannelStats(page.mean, page.var * torch.e, page.power))
    torch.testing.assert_close(louder, torch.ones(2), rtol=1e-4, atol=1e-4)
    assert (tracker.drift(ChannelStats(page.mean, page.var / 9, page.power)) > louder).all()


def test_merge_is_what_all_tokens_together_give():
    k, q = torch.randn(2, 48, 16).double() * 3 + 5, torch.randn(2, 48, 16).double()
    part = lambda a, b: page_stats(k[:, a:b], q[:, a:b].square().mean(1), torch.ones(2, b - a, dtype=torch.bool))  # noqa: E731
    same(ChannelTracker.merge(part(0, 16), part(16, 48), 16, 32), part(0, 48), rtol=1e-9, atol=1e-12)
    a, b = part(0, 16), part(16, 48)
    same(ChannelTracker.merge(a, b, 16, 32), ChannelTracker.merge(b, a, 32, 16))


@pytest.mark.parametrize("value", [0.0, 1e-38, 5.0, 1e15])
def test_constant_channels_stay_finite(value):
    """Also when all channels are constant and when no query was seen."""
    k = torch.full((1, 32, 16), value)
    usable = torch.ones(1, 32, dtype=torch.bool)
    for power in (torch.zeros(1, 16), torch.ones(1, 16), torch.full((1, 16), 1e-38)):
        page = page_stats(k, power, usable)
        assert page.scales().isfinite().all() and (page.scales() > 0).all()
        assert page.hot(4).tolist() == [[0, 1, 2, 3]]
        tracker = ChannelTracker(0.5, page)
        tracker.update(page)
        assert tracker.drift(page).isfinite().all() and tracker.state.stack().isfinite().all()


def test_one_constant_channel_among_others():
    k = torch.randn(1, 64, 16)
    k[..., 5] = 3.0
    page = page_stats(k, torch.ones(1, 16), torch.ones(1, 64, dtype=torch.bool))
    s = page.scales()
    assert s.isfinite().all() and (s > 0).all() and s[0, 5] < s.median()
    assert 5 not in page.hot(8)[0]


def logit_error(page, by, hot):
    """As docs/maths.md defines it, channel by channel."""
    k, q = (x.double().sqrt() for x in (page.var, page.power))
    s = (by.var.double() / by.power.double()) ** 0.25
    kept = (by.var * by.power).argsort(descending=True)[hot:].tolist()
    return sum((k[c] / s[c]) ** 2 for c in kept) * sum((q[c] * s[c]) ** 2 for c in kept)


@pytest.mark.parametrize("hot", [0, 3])
def test_misfit_is_what_the_scales_before_a_page_cost(hot):
    g = torch.Generator().manual_seed(3)
    before, page = (ChannelStats(*torch.rand(3, 16, generator=g).add(0.05).unbind()) for _ in range(2))
    tracker = ChannelTracker(0.7, before)
    tracker.update(page)
    want = logit_error(page, before, hot) / logit_error(page, page, hot)
    assert want > 1.3
    torch.testing.assert_close(ChannelTracker.misfit(before, tracker.state, 0.7, hot).double(), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(ChannelTracker.misfit(before, before, 0.7, hot), torch.tensor(1.0))
    none = ChannelStats(*torch.zeros(3, 16).unbind())
    assert ChannelTracker.misfit(none, tracker.state, 0.7, hot) == 1


def test_misfit_predicts_the_error_of_coded_pages():
    """Logits of pages coded with other scales than their own, over those of their own."""
    g = torch.Generator().manual_seed(4)
    spread = torch.logspace(-0.4, 0.4, 64)
    k, q = torch.randn(50, 64, 64, generator=g) * spread, torch.randn(50, 64, 64, generator=g)
    usable = torch.ones(50, 64, dtype=torch.bool)
    page = page_stats(k, q.square().mean(1), usable)
    other = ChannelStats(page.mean, page.var.flip(-1), page.power)
    error = []
    for stats in (other, page):
        coded = decode_keys(encode_keys(k, stats, 4, 0, usable), 4)
        error.append((q @ (coded - k).mT).square().mean())
    tracker = ChannelTracker(0.5, other)
    tracker.update(page)
    predicted = ChannelTracker.misfit(other, tracker.state, 0.5, 0).mean()
    assert predicted > 2
    assert error[0] / error[1] == pytest.approx(float(predicted), rel=0.05)
