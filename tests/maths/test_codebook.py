"""Levels: the two Lloyd-Max conditions against independent integrals, symmetry, and values known since Max (1960)."""

import itertools
import math

import numpy as np
import pytest
import torch

from turboquant.maths.codebook import lloyd_max, nearest, uniform

CASES = [(b, d) for b in (1, 2, 3, 4) for d in (None, 16, 64, 128, 256)] + [(8, None)]
KNOWN = {  # Max, Quantizing for Minimum Distortion (1960), Table I: the positive levels for N(0,1)
    1: [0.7980],
    2: [0.4528, 1.5100],
    3: [0.2451, 0.7560, 1.3440, 2.1520],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.2560, 1.6180, 2.0690, 2.7330],
}


def centroid(low: float, high: float, dim: int | None) -> float:
    """Conditional mean of the density on [low, high]: closed form for N(0,1), Gauss-Legendre for the sphere."""
    if dim is None:
        density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        # upper tails, so that the far cells keep their digits
        tail = lambda x: math.erfc(x / math.sqrt(2)) / 2  # noqa: E731
        return (density(low) - density(high)) / (tail(low) - tail(high))
    low, high = max(low, -math.sqrt(dim)), min(high, math.sqrt(dim))
    node, weight = np.polynomial.legendre.leggauss(200)
    x = (high - low) / 2 * node + (high + low) / 2
    f = weight * np.clip(1 - x * x / dim, 0, None) ** ((dim - 3) / 2)
    return float((x * f).sum() / f.sum())


@pytest.mark.parametrize(("bits", "dim"), CASES)
def test_lloyd_max_levels(bits, dim):
    levels = lloyd_max(bits, dim)
    assert levels.shape == (2**bits,) and levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=0)
    x = levels.double().tolist()
    edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(x)), math.inf]
    for i, level in enumerate(x):
        if level > 0:  # the others by symmetry
            # the table is rounded to 1e-6; 8 bit converges slowly and its outermost cells are nearly empty
            allowed = 1e-3 if bits == 8 else 5e-6
            assert abs(centroid(edges[i], edges[i + 1], dim) - level) < allowed, (i, level)


@pytest.mark.parametrize(("bits", "dim"), CASES)
def test_cell_edges_are_midpoints(bits, dim):
    levels = lloyd_max(bits, dim)
    middle = (levels[1:].double() + levels[:-1].double()) / 2
    index = torch.arange(len(middle))
    assert torch.equal(nearest((middle - 1e-6).float(), levels).long(), index)
    assert torch.equal(nearest((middle + 1e-6).float(), levels).long(), index + 1)


@pytest.mark.parametrize("bits", KNOWN)
def test_known_values(bits):
    positive = lloyd_max(bits)[2 ** (bits - 1) :]
    torch.testing.assert_close(positive, torch.tensor(KNOWN[bits]), rtol=0, atol=6e-4)  # Max prints 4 digits, some off


def test_one_bit_is_the_mean_absolute_value():
    assert abs(lloyd_max(1)[1].item() - math.sqrt(2 / math.pi)) < 1e-6


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sphere_marginal_tends_to_gaussian(bits):
    far = [(lloyd_max(bits, d) - lloyd_max(bits)).abs().max().item() for d in (16, 64, 256, 4096)]
    assert far == sorted(far, reverse=True) and far[0] > 10 * far[-1] and far[-1] < 2e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform(bits):
    levels = uniform(bits)
    assert len(levels) == 2**bits - 1 and levels[0] == -1 and levels[-1] == 1 and levels[len(levels) // 2] == 0
    torch.testing.assert_close(levels.diff(), torch.full((2**bits - 2,), 2 / (2**bits - 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", [lloyd_max, uniform])
def test_nearest_is_the_nearest(bits, kind):
    levels = kind(bits)
    y = torch.randn(50, 64) * 1.5
    far = (y.unsqueeze(-1).double() - levels.double()).abs()
    code = nearest(y, levels)
    assert code.dtype == torch.uint8 and code.shape == y.shape
    chosen = far.gather(-1, code.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= far.amin(-1) + 1e-7).all()
    assert torch.equal(nearest(levels, levels).long(), torch.arange(len(levels))), "a level is its own nearest"
    assert nearest(torch.tensor([math.inf, -math.inf]), levels).tolist() == [len(levels) - 1, 0]


@pytest.mark.parametrize(("call", "message"), [((0,), "bits"), ((9,), "bits"), ((4, 2), "dim")])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        lloyd_max(*call)


def test_uniform_needs_two_bits():
    with pytest.raises(ValueError, match="bits >= 2"):
        uniform(1)
