"""Weights as integers: exact grids, stages, clipping and error feedback."""

import pytest
import torch

from turboquant.maths import weights
from turboquant.maths.weights import WeightCodes, decode_weight, encode_weight


def error(w, codes, stages=None):
    return float((decode_weight(codes, stages) - w).norm() / w.norm())


@pytest.mark.parametrize("stages", [1, 2])
def test_weights_on_the_grid_come_back_exactly(stages):
    """The output is the code: each of 16 (or 256) levels of a group is met and decodes to itself."""
    levels = 16**stages
    group = torch.arange(levels).repeat(3, 1)
    codes = torch.stack((group // 16, group % 16)) if stages == 2 else group.unsqueeze(0)
    scale = torch.tensor([[0.5], [0.25], [2.0]]).half()
    zero = torch.tensor([[0], [7], [15]], dtype=torch.uint8)
    w = decode_weight(WeightCodes(codes.to(torch.uint8), scale, zero))
    if stages == 2:
        w = w[:, 8:249]  # the outermost half step is there for what rounding of the zero leaves outside
        w = torch.cat([w, w[:, -1:].expand(-1, 15)], 1)
    got = encode_weight(w, w.shape[1], stages, clip=False)
    torch.testing.assert_close(decode_weight(got), w, rtol=1e-3, atol=1e-3 * 2.0)


@pytest.mark.parametrize("group", [16, 32, 128])
def test_error_is_within_half_a_step(group):
    w = torch.randn(6, 256) * torch.logspace(-2, 2, 6).unsqueeze(1)
    for stages, parts in ((1, 1), (2, 16)):
        c = encode_weight(w, group, stages, clip=False)
        assert c.codes.shape == (stages, 6, 256) and int(c.codes.max()) <= 15
        step = c.scale.float().repeat_interleave(group, 1) / parts
        # the whole zero may leave up to half a coarse step of the range outside a single stage
        slack = 1.02 if stages == 1 else 2.02
        assert ((decode_weight(c) - w).abs() <= slack * step).all()
    inner = encode_weight(w.clamp_min(0), group, 1, clip=False)
    half = inner.scale.float().repeat_interleave(group, 1) / 2
    assert ((decode_weight(inner) - w.clamp_min(0)).abs() <= 1.01 * half).all(), "without rounding of the zero: half"


def test_the_first_stage_is_a_weight_by_itself():
    w = torch.randn(64, 128)
    for group in (64, 128):
        two, one = encode_weight(w, group, 2), encode_weight(w, group, 1, clip=False)
        assert error(w, two) < error(w, two, 1) / 12
        assert error(w, two, 1) < 1.01 * error(w, one)


@pytest.mark.parametrize(("group", "share"), [(64, 0.92), (128, 0.94), (1024, 0.96)])
def test_two_stages_search_their_scale(group, share):
    """Against the scale that covers the range, with which a symmetric group leaves a sixteenth of the grid unused."""
    w = torch.randn(64, 1024)
    got, covering = encode_weight(w, group, 2), encode_weight(w, group, 1, clip=False)
    step = covering.scale.float().repeat_interleave(group, 1) / 16
    zero = 16 * covering.zero.float().repeat_interleave(group, 1) + 8
    want = ((w / step + zero).round().clamp(0, 255) - zero) * step
    assert error(w, got) < share * float((want - w).norm() / w.norm())


def test_clipping_never_costs_and_helps_long_groups():
    w = torch.randn(32, 1024)
    plain, clipped = encode_weight(w, 1024, 1, clip=False), encode_weight(w, 1024, 1, clip=True)
    rows = lambda c: (decode_weight(c) - w).square().sum(1)  # noqa: E731
    assert (rows(clipped) <= rows(plain) * (1 + 1e-6)).all()
    assert error(w, clipped) < 0.9 * error(w, plain)
    assert torch.equal(encode_weight(w, 128, 2, clip=True).codes, encode_weight(w, 128, 2, clip=False).codes)


@pytest.mark.parametrize("stages", [1, 2])
def test_error_feedback_lowers_the_output_error(stages):
    """Along the second moments that it was given, and not at the cost of the grid."""
    mix = torch.randn(64, 64)
    x = torch.randn(2000, 64) @ mix
    w = torch.randn(48, 64)
    moment = x.T @ x / len(x)
    out = lambda c: float((x @ (decode_weight(c) - w).T).norm() / (x @ w.T).norm())  # noqa: E731
    plain, fed = encode_weight(w, 32, stages), encode_weight(w, 32, stages, moment=moment)
    assert out(fed) < 0.8 * out(plain) and error(w, fed) > error(w, plain)
    same = encode_weight(w, 32, stages, moment=torch.eye(64))
    assert torch.equal(same.codes, plain.codes), "against the identity nothing is pushed"


def test_feedback_takes_the_range_for_inputs_that_are_loud():
    """A weight that little meets does not set the step of its group."""
    w = torch.randn(64, 32)
    w[:, 5] *= 40
    loud = torch.ones(32)
    loud[5] = 1e-6
    fed, plain = encode_weight(w, 32, 1, moment=torch.diag(loud)), encode_weight(w, 32, 1)
    error = [(((decode_weight(c) - w).square()) * loud).sum().sqrt() for c in (fed, plain)]
    assert error[0] < 0.85 * error[1]


def test_zero_and_one_sided_groups():
    w = torch.zeros(3, 32)
    w[1] = torch.rand(32) + 1
    w[2] = -torch.rand(32) - 1
    for stages in (1, 2):
        got = decode_weight(encode_weight(w, 32, stages))
        assert (got[0] == 0).all() and (got[1] > 0.8).all() and (got[2] < -0.8).all() and got.isfinite().all()


def test_rows_do_not_depend_on_each_other():
    w = torch.randn(2, 5, 64)
    whole, part = encode_weight(w, 32), encode_weight(w[1, 3:4], 32)
    assert torch.equal(whole.codes[1, :, 3:4], part.codes) and torch.equal(whole.scale[1, 3:4], part.scale)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(group=24), "group=24"),
        (dict(group=32, stages=3), "stages=3"),
        (dict(group=32, moment=torch.eye(3)), "error feedback"),
    ],
)
def test_what_cannot_be_done(options, words):
    with pytest.raises(ValueError, match=words):
        encode_weight(torch.randn(4, 64), **options)
    with pytest.raises(ValueError, match="stages=2"):
        decode_weight(encode_weight(torch.randn(4, 64), 32), 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite(bad):
    w = torch.randn(4, 64)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        encode_weight(w, 32)


@pytest.mark.parametrize("stages", [1, 2])
def test_pieces_are_no_part_of_the_result(stages, monkeypatch):
    """Large weights are searched piece by piece."""
    w = torch.randn(3, 10, 96)
    whole = encode_weight(w, 32, stages)
    monkeypatch.setattr(weights, "PIECE", 7 * 32)
    parts = encode_weight(w, 32, stages)
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(parts).values(), strict=True))
