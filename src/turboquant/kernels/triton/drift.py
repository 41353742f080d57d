"""Whether a page of a KV head has drifted: `ChannelTracker.misfit` from the tracker's states before and after it."""

import triton
import triton.language as tl

from turboquant.kernels.triton.encode import floored_root, hottest
from turboquant.maths.tracker import DRIFT

_DRIFT = tl.constexpr(DRIFT)


@triton.jit
def _error(k, q, by_k, by_q, c, D: tl.constexpr, DP: tl.constexpr, HOT: tl.constexpr):
    """`ChannelStats.logit_error` of keys and queries of these deviations, coded by others: Σ(k/s)²·Σ(q·s)² over the
    channels that are not hot, where s² = by_k / by_q; what s is normalised to cancels.
    """
    cold = (c < D) & (hottest(tl.where(c < D, by_k * by_q, -1.0), c, HOT, DP) == 0)
    keys = tl.sum(tl.where(cold, k * k * (by_q / by_k), 0.0), 0)
    return keys * tl.sum(tl.where(cold, q * q * (by_k / by_q), 0.0), 0)


@triton.jit
def drifted(before, after, c, OLD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HOT: tl.constexpr):
    """Whether the page between two states (pointers to mean, variance, power, (D,) each) has drifted.

    Args:
        OLD: decay / (1 - decay): the page is after + OLD·(after - before).
    """
    see = c < D
    var, power = tl.load(before + D + c, mask=see, other=0.0), tl.load(before + 2 * D + c, mask=see, other=0.0)
    page_var, page_power = tl.load(after + D + c, mask=see, other=0.0), tl.load(after + 2 * D + c, mask=see, other=0.0)
    page_var += OLD * (page_var - var)
    page_power += OLD * (page_power - power)
    old_k, old_q, k, q = floored_root(var), floored_root(power), floored_root(page_var), floored_root(page_power)
    misfit = _error(k, q, old_k, old_q, c, D, DP, HOT) >= _DRIFT * _error(k, q, k, q, c, D, DP, HOT)
    return misfit & (tl.max(var, 0) > 0)
