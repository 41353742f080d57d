"""The page codec: codes are the nearest to what is stored, errors within the theorem, and odd input is defined."""

import math

import pytest
import torch

from turboquant.maths import bounds, codec
from turboquant.maths.codebook import lloyd_max, nearest
from turboquant.maths.rotation import rotate
from turboquant.maths.tracker import page_stats
from turboquant.recipe import KV_BITS

PAGES, TOKENS = 6, 64
DIMS = (64, 80, 96, 128, 256)
# A scale stored as a logarithm is off by at most half a step: that much of the signal is lost, uniformly distributed.
ROW_SCALES = codec.token_scale(torch.arange(256), torch.tensor(1.0))
ROW_STEP = (ROW_SCALES[0] / ROW_SCALES[1]).item()
S_STEP = (codec.log_decode(torch.tensor(129)) / codec.log_decode(torch.tensor(128))).item()
ROUNDING = (ROW_STEP**0.5 - 1) ** 2 / 3


def allowed(bits: int, d: int) -> float:
    """Relative squared error of a row.

    The theorem's bound D for the best scale, D/(1-D) for the unbiased one that is stored (sin² and tan² of the angle
    between row and levels); at 8 bit that of 127 uniform steps up to the largest of d values.
    """
    if bits < 8:
        return bounds.mse_upper(bits) / (1 - bounds.mse_upper(bits)) + ROUNDING
    peak = 2 * math.log(2 * d)  # squared, over the mean square
    return peak / 127**2 / 12 + peak / d * ROUNDING + ROUNDING


def everything(x):
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def relative(got, want):
    return ((got - want).square().sum() / want.square().sum()).item()


def encode_keys(k, bits, hot, q=None, usable=None):
    usable = everything(k) if usable is None else usable
    power = torch.ones_like(k[..., 0, :]) if q is None else q.square().mean(-2)
    return codec.encode_keys(k, page_stats(k, power, usable), bits, hot, usable)


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("d", DIMS)
def test_error_of_gaussian_tokens(d, bits):
    x = torch.randn(PAGES, TOKENS, d) * torch.rand(PAGES, TOKENS, 1)
    v = codec.decode_values(codec.encode_values(x, bits, everything(x)), bits)
    assert 0 < relative(v, x) <= allowed(bits, d)
    k = codec.decode_keys(encode_keys(x, bits, 0), bits)
    assert 0 < relative(k, x) <= allowed(bits, d) * 1.05  # relative to s, which varies a little from channel to channel
    p = codec.decode_plain(codec.encode_plain(x, bits), bits)
    assert 0 < relative(p, x) <= bounds.mse_upper(bits) * (1.001 if bits < 8 else 1.1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_are_shrunk_less_than_the_papers(bits):
    """<y, ŷ>/‖y‖² - 1, on average: the size of logits. Measured: 0.55, 0.45, 0.39 times."""
    x = torch.randn(40, TOKENS, 64)
    along = lambda got: ((got * x).sum(-1) / x.square().sum(-1)).mean().item()  # noqa: E731
    live = along(codec.decode_values(codec.encode_values(x, bits, everything(x)), bits))
    plain = along(codec.decode_plain(codec.encode_plain(x, bits), bits))
    assert abs(live - 1) < 0.7 * abs(plain - 1)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["qwen_a", "qwen_b", "smollm2", "gemma3"])
def test_live_keys_beat_plain_ones_on_real_keys(real, name, bits):
    """In squared errors of logits, which is what counts. Measured: 818, 1095 (at 3 bit), 7.5 and 80 times smaller."""
    least = {"qwen_a": 300, "qwen_b": 300, "smollm2": 3, "gemma3": 30}[name]
    q, k = real[f"{name}.q"], real[f"{name}.k"]
    n = k.shape[1] // TOKENS * TOKENS
    pages = k[0, :n].unflatten(0, (-1, TOKENS))
    readers = q.square().mean(0).sqrt()[:n].unflatten(0, (-1, TOKENS))
    live = codec.decode_keys(encode_keys(pages, bits, 4, readers), bits)
    plain = codec.decode_plain(codec.encode_plain(pages, bits), bits)
    error = [(q[0, :n] @ (x - pages).flatten(0, 1).T).square().mean().item() for x in (live, plain)]
    assert error[0] * least < error[1], error


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("hot", [0, 4])
def test_key_codes_are_nearest_for_what_is_stored(real, hot, bits):
    """Header values are rounded before anything depends on them: from the stored ones alone the codes follow."""
    k = real["qwen_a.k"][:, :256].unflatten(1, (-1, TOKENS))
    c = encode_keys(k, bits, hot)
    s = codec.log_decode(c.log_s).unsqueeze(-2)
    mean = (c.mean_code.float() * c.mean_step.float().unsqueeze(-1)).unsqueeze(-2)
    rest = k / s - mean
    rest.scatter_(-1, c.hot_index.long().unsqueeze(-2).expand(*k.shape[:-1], hot), 0.0)
    nearest_codes(rotate(rest), c.rows, bits)
    picked = k.gather(-1, c.hot_index.long().unsqueeze(-2).expand(*k.shape[:-1], hot)).transpose(-1, -2)
    off = picked - c.hot_mean.float().unsqueeze(-1) - c.hot_codes.float() * c.hot_step.float().unsqueeze(-1)
    assert (off.abs() <= c.hot_step.float().unsqueeze(-1) * 0.5001).all(), "no hot value saturates"
    assert not c.mean_code.gather(-1, c.hot_index.long()).any()


def nearest_codes(y, rows, bits):
    a = codec.token_scale(rows.log_scale, rows.base).unsqueeze(-1)
    off = (y.unsqueeze(-1) - a.unsqueeze(-1) * codec.codebook(bits)).abs()
    mine = off.gather(-1, rows.codes.long().unsqueeze(-1)).squeeze(-1)
    best = off.amin(-1)
    cell = a / codec.CODE_CELLS if bits < 8 else 0  # codes change at whole cells: within half a one of the middle
    assert (mine <= best + cell + 1e-5 * a + 1e-6 * y.abs()).all()
    assert (mine > best + 1e-5 * a).double().mean() < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_code_edges_are_the_middles_in_cells(bits):
    levels, edges = codec.codebook(bits).double(), torch.tensor(codec.code_edges(bits))
    middles = (levels[1:] + levels[:-1]) / 2 * codec.CODE_CELLS
    assert (edges - middles).abs().max() <= 0.5 and torch.equal(edges, -edges.flip(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_best_trial_scale(bits):
    """Beside exact nearest levels at each trial, what its cells cost is a hundredth of the error at most."""
    y = torch.randn(4000, 128, generator=torch.Generator().manual_seed(bits))
    levels, rms = codec.codebook(bits), y.square().mean(-1, keepdim=True).sqrt()
    dots, fits = [], []
    for trial in codec.TRIALS:
        c = levels[nearest(y / (rms * trial), levels).long()]
        dots.append((y * c).sum(-1))
        fits.append(1 - dots[-1].square() / c.square().sum(-1) / y.square().sum(-1))
    overlap = y.square().sum(-1) / codec._row_scale(y, bits)
    chosen = (torch.stack(dots) - overlap).abs().argmin(0)
    got, best, one = torch.stack(fits).gather(0, chosen[None])[0], torch.stack(fits).amin(0), fits[0]
    assert got.mean() < best.mean() * 1.01
    assert got.mean() < one.mean() - 0.9 * (one - best).mean(), "it gains what the trials can"


@pytest.mark.parametrize("bits", KV_BITS)
def test_value_codes_are_nearest_for_what_is_stored(real, bits):
    v = real["smollm2.v"][:, :256].unflatten(1, (-1, TOKENS))
    nearest_codes(rotate(v), codec.encode_values(v, bits, everything(v)), bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_token_scales_follow_the_tokens(bits):
    """Tokens of very different lengths in one page are coded equally well, as far as the stored scales reach."""
    reach = 0.5 * (ROW_SCALES[0] / ROW_SCALES[254]).item()
    assert reach > 100
    x = torch.randn(2, TOKENS, 64)
    x = x / x.norm(dim=-1, keepdim=True) * torch.logspace(0, math.log10(reach), TOKENS).unsqueeze(-1)
    v = codec.decode_values(codec.encode_values(x, bits, everything(x)), bits)
    each = (v - x).square().sum(-1) / x.square().sum(-1)
    assert each.mean() <= allowed(bits, 64) and each.max() < 3 * allowed(bits, 64)


def test_log_code_is_the_nearest_on_a_log_scale():
    x = torch.logspace(-2.3, 2.3, 1000)
    assert ((codec.log_decode(codec.log_code(x)) / x).log().abs() <= 0.5001 * math.log(S_STEP)).all()
    assert codec.log_code(torch.tensor([0.0, 1e-30, 1e30])).tolist() == [0, 0, 255]


def test_fp16_up_never_rounds_down():
    x = torch.cat([torch.logspace(-9, 4.8, 5000), torch.tensor([0.0, 1.0, 65504.0])])
    up = codec.fp16_up(x)
    assert (up.float() >= x).all()
    one_less = (up.view(torch.int16) - 1).view(torch.half).float()
    assert (one_less < x)[x > 0].all(), "and not further than needed"
    assert codec.fp16_up(torch.tensor([1e9, math.inf])).tolist() == [65504.0, 65504.0]


@pytest.mark.parametrize("bits", KV_BITS)
def test_unusable_tokens_touch_no_other(bits):
    x = torch.randn(2, TOKENS, 64)
    usable = everything(x)
    usable[:, 7] = False
    out = []
    for value in (0.0, 1e4, -65504.0):
        x[:, 7] = value
        out.append((encode_keys(x, bits, 4, usable=usable), codec.encode_values(x, bits, usable)))
    others = torch.arange(TOKENS) != 7
    (k0, v0), *rest = out
    for k1, v1 in rest:
        for a, b in ((v0, v1), (k0.rows, k1.rows)):
            assert torch.equal(a.codes[:, others], b.codes[:, others]) and torch.equal(a.base, b.base)
            assert torch.equal(a.log_scale[:, others], b.log_scale[:, others])
        assert torch.equal(k0.hot_codes[..., others], k1.hot_codes[..., others])
        for name in ("log_s", "mean_code", "mean_step", "hot_index", "hot_mean", "hot_step"):
            assert torch.equal(getattr(k0, name), getattr(k1, name)), name


EXTREME = {
    "zeros": lambda x: x * 0,
    "denormals": lambda x: x * 1e-42,
    "tiny": lambda x: x * 1e-20,
    "huge": lambda x: x * 1e30,
    "constant": lambda x: torch.full_like(x, 3.0),
    "constant channels": lambda x: torch.randn(64).expand_as(x).contiguous() * 100,
    "one token": lambda x: torch.where(torch.arange(TOKENS).unsqueeze(-1) == 5, x, 0.0),
    "one channel": lambda x: torch.where(torch.arange(64) == 5, x * 1e3, 0.0),
}


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_input_is_defined(case, bits):
    x = EXTREME[case](torch.randn(2, TOKENS, 64))
    for readers in (torch.ones_like(x), torch.zeros_like(x), x.clamp(-1e10, 1e10)):
        k = codec.decode_keys(encode_keys(x, bits, 4, readers), bits)
        assert k.isfinite().all()
    v = codec.decode_values(codec.encode_values(x, bits, everything(x)), bits)
    p = codec.decode_plain(codec.encode_plain(x, bits), bits)
    assert v.isfinite().all() and p.isfinite().all()
    if case == "zeros":
        assert not k.any() and not v.any() and not p.any()
    if case.startswith("constant"):  # the mean says it all, what eight bits of it leave is coded like anything else
        got = codec.decode_keys(encode_keys(x, bits, 4), bits)
        assert relative(got, x) < 0.1 * bounds.mse_upper(min(bits, 4))
    if case == "one token":
        assert not v[:, torch.arange(TOKENS) != 5].any() and relative(v, x) < 2 * allowed(bits, 64)


def test_no_usable_token_at_all():
    x = torch.full((1, TOKENS, 64), 7.0)
    none = torch.zeros(1, TOKENS, dtype=torch.bool)
    c = encode_keys(x, 4, 4, usable=none)
    assert codec.decode_keys(c, 4).isfinite().all()
    assert codec.decode_values(codec.encode_values(x, 4, none), 4).isfinite().all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dimensions_are_independent(lead):
    x = torch.randn(*lead, TOKENS, 64)
    whole = codec.decode_keys(encode_keys(x, 4, 4), 4)
    assert whole.shape == x.shape
    flat, flat_out = x.reshape(-1, TOKENS, 64), whole.reshape(-1, TOKENS, 64)
    for i in range(len(flat)):
        assert torch.equal(codec.decode_keys(encode_keys(flat[i], 4, 4), 4), flat_out[i])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int8_levels_are_the_codebook_and_cost_next_to_nothing(bits: int) -> None:
    codes, unit = codec.int8_levels(bits)
    levels = codec.codebook(bits)
    assert max(codes) == 127 == -min(codes) and list(codes) == sorted(set(codes))
    assert torch.equal(levels, torch.tensor([c * unit for c in codes], dtype=torch.float64).float())
    if bits == 8:
        return
    x = torch.randn(4_000_000, generator=torch.Generator().manual_seed(bits))
    mse = [(x - lv[nearest(x, lv).long()]).double().square().mean() for lv in (levels, lloyd_max(bits))]
    assert mse[0] / mse[1] < 1.002
