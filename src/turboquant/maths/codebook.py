"""Quantization levels: Lloyd-Max for N(0,1) and for one coordinate of a random point on the sphere, and uniform.

A coordinate of a uniformly random unit vector in R^d, times sqrt(d), has the density
f(x) ∝ (1 - x²/d)^((d-3)/2) on [-sqrt d, sqrt d] (arXiv:2504.19874, Lemma 1); it tends to N(0,1). Levels are the
conditional means of their cells and cell edges the midpoints of their levels (Lloyd-Max; arXiv:2504.19874, Eq. 4).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 8)


@lru_cache(maxsize=64)
def _lloyd_max(bits: int, dim: int | None) -> tuple[float, ...]:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1..8, got {bits}")
    if dim is not None and dim < 3:
        raise ValueError(f"the sphere marginal needs dim >= 3, got {dim}")
    n = 2**bits
    edge = min(math.sqrt(dim), 12.0) if dim is not None else 12.0
    x = torch.linspace(-edge, edge, 400_001, dtype=torch.float64)
    f = torch.exp(-x * x / 2) if dim is None else (1 - x * x / dim).clamp_min(0).pow((dim - 3) / 2)
    # cumulative trapezoids of f and x·f; a cell's level is the ratio of their differences
    zero = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat([zero, torch.cumsum((f[1:] + f[:-1]) / 2, 0)])
    first = torch.cat([zero, torch.cumsum((x[1:] * f[1:] + x[:-1] * f[:-1]) / 2, 0)])

    def at(cumulative: Tensor, where: Tensor) -> Tensor:
        pos = (where + edge) / (2 * edge) * (len(x) - 1)
        i = pos.long().clamp(0, len(x) - 2)
        return torch.lerp(cumulative[i], cumulative[i + 1], pos - i)

    # start from equal masses of f^(1/3), the asymptotically optimal level density (Panter-Dite)
    g = torch.cumsum(f.pow(1 / 3), 0)
    levels = x[torch.searchsorted(g, (torch.arange(n, dtype=torch.float64) + 0.5) / n * g[-1])].clone()
    ends = torch.tensor([edge], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
        new = torch.diff(at(first, edges)) / torch.diff(at(mass, edges))
        new = (new - new.flip(0)) / 2  # the density is even: keep the levels exactly symmetric
        done = (new - levels).abs().max() < 1e-9
        levels = new
        if done:
            break
    return tuple(round(v, 6) for v in levels.tolist())


def lloyd_max(bits: int, dim: int | None = None, device: torch.device | str = "cpu") -> Tensor:
    """The 2^bits Lloyd-Max levels, ascending, fp32, rounded to 1e-6, for unit variance.

    Args:
        bits: 1..8.
        dim: None for N(0,1); d for the exact marginal of sqrt(d)·(uniform point on the unit sphere of R^d).
    """
    return torch.tensor(_lloyd_max(bits, dim), device=device)


def uniform(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """2^bits - 1 equally spaced symmetric levels on [-1, 1] (a zero level included), ascending, fp32."""
    m = 2 ** (bits - 1) - 1
    if bits < 2:
        raise ValueError(f"uniform levels need bits >= 2, got {bits}")
    return torch.arange(-m, m + 1, device=device, dtype=torch.float32) / m


def nearest(y: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value (a tie goes to the lower one), uint8, same shape as y. NaN -> last."""
    edges = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(y.contiguous(), edges).to(torch.uint8)
