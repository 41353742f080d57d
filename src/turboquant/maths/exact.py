"""Sums in a fixed order and correctly rounded roots: part of the byte contract.

A page's bytes depend on sums (a row's RMS, how well levels fit, a channel's mean). torch adds in an order of its own,
which differs between machines, dtypes and shapes, and its root is off by one unit in the last place for one number in
six where MKL computes it. These are additions of whole tensors one after another and roots of the next larger type, so
every backend that follows them writes the same bytes.
"""

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16


def lane_sum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum along `dim`: element i goes to lane i mod 16, each lane adds in order, then the lanes by halves.

    (..., n, ...) of any float dtype -> (..., ...).
    """
    x = x.movedim(dim, -1)
    if x.shape[-1] % LANES:
        x = pad(x, (0, -x.shape[-1] % LANES))
    parts = x.unflatten(-1, (-1, LANES)).unbind(-2)
    out = reduce(torch.add, parts) if parts else x.new_zeros(*x.shape[:-1], LANES)
    half = LANES
    while half > 1:
        half //= 2
        out = out[..., :half] + out[..., half:]
    return out.squeeze(-1)


def chain_sum(x: Tensor, dim: int) -> Tensor:
    """Sum along `dim`, one element after another: (..., n, ...) with n > 0 -> (..., ...)."""
    return reduce(torch.add, x.unbind(dim))


def root(x: Tensor) -> Tensor:
    """Square root of x, correctly rounded where x is fp32."""
    return x.double().sqrt().to(x.dtype)
