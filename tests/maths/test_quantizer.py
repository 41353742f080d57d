"""TurboQuant_mse and TurboQuant_prod keep the theorems of arXiv:2504.19874, and the least-squares scale is one."""

import math

import pytest
import torch

from turboquant.maths import bounds
from turboquant.maths.codebook import lloyd_max, nearest
from turboquant.maths.quantizer import TurboQuantMSE, TurboQuantProd, least_squares_scale, rms, safe_divide

BITS = (1, 2, 3, 4)


def sphere(n: int, d: int) -> torch.Tensor:
    x = torch.randn(n, d)
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rotation", ["hadamard", "dense"])
def test_mse_distortion_is_between_the_bounds(rotation, dim, bits):
    x = sphere(2000, dim)
    q = TurboQuantMSE(dim, bits, rotation)
    cost = (q.decode(q.encode(x)) - x).square().sum(-1).mean().item()
    assert bounds.mse_lower(bits) < cost <= bounds.mse_upper(bits)


@pytest.mark.parametrize("bits", BITS)
def test_mse_distortion_of_the_worst_vectors(bits):
    """The theorem holds for any vector over the random rotation: here one-hot and one outlier on a faint rest."""
    spiky = torch.zeros(2, 64)
    spiky[0, 3] = 1.0
    spiky[1] = torch.randn(64) * 0.01
    spiky[1, 17] = 50.0
    spiky /= spiky.norm(dim=-1, keepdim=True)
    cost = []
    for seed in range(300):
        q = TurboQuantMSE(64, bits, "dense", seed)
        cost.append((q.decode(q.encode(spiky)) - spiky).square().sum(-1))
    assert (torch.stack(cost).mean(0) <= bounds.mse_upper(bits)).all()


def test_mse_of_long_vectors_scales_with_the_square_of_their_length():
    x = sphere(50, 64)
    q = TurboQuantMSE(64, 4)
    torch.testing.assert_close(q.decode(q.encode(x * 1000)), q.decode(q.encode(x)) * 1000, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("q", [TurboQuantMSE(64, 4), TurboQuantMSE(64, 4, "dense"), TurboQuantProd(64, 4)])
def test_zero_vector_decodes_to_zero(q):
    x = torch.zeros(3, 64)
    x[1] = torch.randn(64)
    out = q.decode(q.encode(x))
    assert out.isfinite().all() and not out[0].any() and not out[2].any() and out[1].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prod_is_unbiased_and_within_its_bound(bits):
    """Over rotation and projection, for one pair of vectors; the base alone is measurably biased."""
    d, draws = 32, 500
    x, y = sphere(1, d), sphere(1, d)
    y = (y + x) / (y + x).norm()  # an inner product worth shrinking
    error, base = [], []
    for seed in range(draws):
        q = TurboQuantProd(d, bits, "dense", seed)
        c = q.encode(x)
        error.append(((q.decode(c) - x) * y).sum())
        base.append(((q._base.decode(c.base) - x) * y).sum())
    error, base = torch.stack(error).double(), torch.stack(base).double()
    assert abs(error.mean()) <= 3 * error.std() / math.sqrt(draws)
    assert abs(base.mean()) > 6 * base.std() / math.sqrt(draws), "the test would see a bias"
    assert bounds.prod_lower(bits, d) < error.square().mean() <= bounds.prod_upper(bits, d)


def test_prod_needs_a_bit_for_the_residual():
    with pytest.raises(ValueError, match="bits must be >= 2"):
        TurboQuantProd(64, 1)


def test_unknown_rotation():
    with pytest.raises(ValueError, match="'hadamard' or 'dense', got 'none'"):
        TurboQuantMSE(64, 4, "none")


def test_bounds_are_ordered():
    for bits in range(1, 9):
        assert bounds.mse_lower(bits) < bounds.mse_upper(bits)
        assert bounds.mse_upper(bits + 1) < bounds.mse_upper(bits)
        assert bounds.prod_lower(bits, 64) < bounds.prod_upper(bits, 64)
        assert bounds.prod_upper(bits, 128) == bounds.prod_upper(bits, 64) / 2
    for bits in BITS:  # the table is sharper than the closed form, which holds for all
        assert bounds.mse_upper(bits) <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_prod_bound_follows_from_the_mse_bound():
    """Theorem 2's proof: D_prod = π/(2d) · D_mse(bits-1), up to the digits printed."""
    for bits in (2, 3, 4):
        want = math.pi / 2 * bounds.mse_upper(bits - 1) / 64
        assert bounds.prod_upper(bits, 64) == pytest.approx(want, rel=0.03)


def test_least_squares_scale_is_the_best_scale():
    y = torch.randn(100, 64, dtype=torch.float64) * torch.rand(100, 1, dtype=torch.float64) * 9
    levels = lloyd_max(3).double()
    values = levels[nearest(y / rms(y), levels).long()]
    a = least_squares_scale(y, values)
    cost = lambda a: (y - a * values).square().sum(-1)  # noqa: E731
    best = cost(a)
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert (cost(a * factor) > best).all()
    assert (best <= cost(rms(y))).all()
    residual = ((y - a * values) * values).sum(-1)
    assert residual.abs().max() < 1e-9 * y.square().sum(-1).max(), "the residual is orthogonal to the values"


def test_scale_helpers_at_zero():
    zero = torch.zeros(2, 8)
    assert least_squares_scale(zero, zero).tolist() == [[0], [0]]
    assert least_squares_scale(torch.ones(1, 8), torch.zeros(1, 8)).item() == 0
    assert safe_divide(torch.ones(2, 8), torch.tensor([[0.0], [2.0]])).sum().item() == 4
