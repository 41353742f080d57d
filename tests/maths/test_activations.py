"""Activations: exact payloads, outliers that do not hurt, and the tracker of hot channels."""

import pytest
import torch

from turboquant.maths.activations import HotTracker, Int4Rows, decode_int4, decode_int8, encode_int4, encode_int8
from turboquant.maths.rotation import rotate

NONE = torch.empty(0, dtype=torch.int64)


def relative(got, want):
    return float((got - want).norm() / want.norm())


def plain_int8(x):
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@pytest.mark.parametrize("width", [16, 96, 576, 896])
def test_int8_is_within_half_a_unit_of_the_rotated_row(width):
    x = torch.randn(3, 4, width)
    rows = encode_int8(x)
    assert rows.codes.dtype == torch.int8 and rows.unit.shape == (3, 4, 1)
    assert ((rows.codes * rows.unit - rotate(x)).abs() <= 0.5001 * rows.unit).all()
    assert (rows.codes.abs().amax(-1) == 127).all()
    assert relative(decode_int8(rows), x) < 0.012


def test_one_large_channel_does_not_hurt_rotated_int8():
    x = torch.randn(50, 512)
    x[:, 7] = 60.0
    rest = torch.arange(512) != 7
    assert relative(decode_int8(encode_int8(x))[:, rest], x[:, rest]) < 0.4 * relative(
        plain_int8(x)[:, rest], x[:, rest]
    )


def test_rows_are_quantized_each_by_itself():
    x = torch.randn(5, 64)
    hot, sigma = torch.tensor([3, 9]), torch.ones(2)
    assert torch.equal(encode_int8(x).codes[2:3], encode_int8(x[2:3]).codes)
    a, b = encode_int4(x, 32, hot, sigma), encode_int4(x[2:3], 32, hot, sigma)
    assert all(torch.equal(getattr(a, f)[2:3], getattr(b, f)) for f in Int4Rows.__dataclass_fields__)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_int4_payload_unpacks_exactly_to_int8(scale):
    x = torch.randn(40, 128) * scale
    x[:, :3] *= 50
    rows = encode_int4(x, 16, NONE, torch.empty(0))
    assert int(rows.codes.max()) <= 15 and int(rows.zero.max()) <= 15
    assert int(rows.step.min()) >= 1 and int(rows.step.max()) <= 16, "step and zero of a group share a byte"
    step, zero = (t.int().repeat_interleave(16, -1) for t in (rows.step, rows.zero))
    value = step * (rows.codes.int() - zero)
    assert torch.equal(rows.int8().int(), value) and value.min() >= -128 and value.max() <= 127
    units = (rotate(x) / rows.unit).unflatten(-1, (-1, 16))
    width = units.amax(-1).clamp_min(0) - units.amin(-1).clamp_max(0)
    outside = (width - 15 * rows.step).clamp_min(0) / 2  # of a grid in the middle of the range
    # a zero and a code are half a step off each, and the outermost level may not fit into int8
    bound = outside.repeat_interleave(16, -1) + 2.001 * step
    assert ((units.flatten(-2) - value).abs() <= bound).all()


@pytest.mark.parametrize("group", [16, 32])
def test_int4_error_is_that_of_16_steps(group):
    """Of minimum and maximum and 16 steps in fp32; whole steps and zeros may cost little more."""
    x = torch.randn(400, 256)
    g = rotate(x).unflatten(-1, (-1, group))
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    step = (high - low) / 15
    free = relative((((g - low) / step).round() * step + low).flatten(-2), rotate(x))
    got = decode_int4(encode_int4(x, group, NONE, torch.empty(0)), NONE, torch.empty(0))
    assert relative(got, x) < 1.05 * free


def test_hot_channels_are_kept_in_eight_bit():
    x = torch.randn(60, 256)
    hot = torch.tensor([5, 100, 200])
    x[:, hot] *= torch.tensor([30.0, 60.0, 90.0])
    sigma = x[:, hot].square().mean(0).sqrt()
    rows = encode_int4(x, 32, hot, sigma)
    got = decode_int4(rows, hot, sigma)
    off = (got - x)[:, hot].abs()  # by half a step of 8 bit: rounding errors of the rest, turned back, are made up for
    assert (off <= rows.hot_unit * sigma * 0.501).all()
    assert relative(got, x) < 0.3 * relative(decode_int4(encode_int4(x, 32, NONE, sigma[:0]), NONE, sigma[:0]), x)
    cold = torch.ones(256, dtype=torch.bool)
    cold[hot] = False
    assert relative(got[:, cold], x[:, cold]) < 0.12


def test_zero_rows():
    x = torch.zeros(2, 64)
    assert (decode_int8(encode_int8(x)) == 0).all()
    got = decode_int4(encode_int4(x, 32, torch.tensor([1]), torch.ones(1)), torch.tensor([1]), torch.ones(1))
    assert got.abs().max() < 1e-20


def test_tracker_starts_from_the_prior():
    norm, prior = torch.ones(8), torch.tensor([1.0, 9, 2, 3, -8, 1, 1, 1])
    assert HotTracker(norm, 2, prior).hot.tolist() == [1, 4]
    assert HotTracker(torch.tensor([1.0, 1, 1, 7, 1, 1, 6, 1]), 2).hot.tolist() == [3, 6]


def test_tracker_follows_and_stands_still_without_drift():
    t = HotTracker(torch.ones(32), 2)
    x = torch.randn(100, 32)
    x[:, [4, 20]] *= 20
    assert t.update(x) and t.hot.tolist() == [4, 20] and t.seen == 100
    torch.testing.assert_close(t.sigma, x[:, [4, 20]].square().mean(0).sqrt(), rtol=0.1, atol=0)
    assert not t.update(x), "the same distribution chooses nothing anew"
    x[:, [4, 20]] /= 20
    x[:, [7, 8]] *= 20
    changed = [t.update(x) for _ in range(20)]
    assert any(changed) and t.hot.tolist() == [7, 8]


def test_tracker_sees_rare_peaks_and_weighs_columns():
    t = HotTracker(torch.ones(32), 1)
    x = torch.randn(512, 32)
    x[5, 3] = 40.0  # σ is 2 with it: less than that of channel 8
    x[:, 8] *= 2.2
    t.update(x)
    assert t.hot.tolist() == [3]
    norm = torch.ones(32)
    norm[9] = 50
    t = HotTracker(norm, 1)
    x = torch.randn(512, 32)
    x[:, 3] *= 20
    t.update(x)
    assert t.hot.tolist() == [9]


def test_tracker_freezes_after_n_tokens_whatever_the_chunks():
    x = torch.randn(64, 16)
    x[:, 3] *= 10
    t = HotTracker(torch.ones(16), 1, freeze=40)
    t.update(x)
    assert t.seen == 40
    before = t.power.clone()
    t.update(100 * torch.randn(64, 16))
    assert torch.equal(t.power, before) and t.seen == 40 and t.hot.tolist() == [3]


def test_tracker_resumes():
    x = torch.randn(30, 16)
    a = HotTracker(torch.ones(16), 3)
    a.update(x)
    state = {"power": a.power, "peak": a.peak, "hot": a.hot, "sigma": a.sigma, "seen": torch.tensor(a.seen)}
    b = HotTracker.resume(torch.ones(16), 0, state)
    for t in (a, b):
        t.update(x * torch.linspace(0.1, 5, 16))
    assert torch.equal(a.power, b.power) and torch.equal(a.hot, b.hot) and a.seen == b.seen == 60


def test_tracker_ignores_what_is_not_finite():
    t = HotTracker(torch.ones(16), 2)
    x = torch.randn(4, 16)
    x[1, 2] = torch.nan
    assert not t.update(x) and t.seen == 0 and t.power.isfinite().all()


def test_tracker_count():
    with pytest.raises(ValueError, match="count=20"):
        HotTracker(torch.ones(16), 20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_decodes_to_nan_and_leaves_the_others_alone(bad):
    x = torch.randn(3, 64)
    want = encode_int8(x)
    x[1, 5] = bad
    rows = encode_int8(x)
    assert rows.unit[1].isnan() and (rows.codes[1] == 0).all() and decode_int8(rows)[1].isnan().all()
    assert torch.equal(rows.codes[::2], want.codes[::2])
    four = encode_int4(x, 32, NONE, torch.empty(0))
    got = decode_int4(four, NONE, torch.empty(0))
    assert got[1].isnan().all() and got[::2].isfinite().all()
