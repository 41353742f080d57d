"""ChannelTracker: live per-channel statistics of the keys and of the queries that read them.

Per channel c it follows the mean μ_c and variance σ²_K,c of the keys and the reader power σ²_Q,c = E q_c². A logit
error is Σ_c q_c·e_c, so what has to be small is Σ_c σ²_Q,c·E e_c², not the key error alone: the scale that balances
both is s_c = (σ_K,c/σ_Q,c)^½, and the channels to keep in 8 bit are those with the largest σ_K,c·σ_Q,c
(docs/maths.md derives both). Statistics move in steps of one page: x <- decay·x + (1-decay)·page.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.maths.exact import lane_sum, root

DRIFT = 2.0  # from this `ChannelTracker.misfit` on, a page has drifted from the statistics before it
_TINY = 1e-20


@dataclass(frozen=True)
class ChannelStats:
    """mean, var, power: (..., d) fp32 each; the state of a tracker, or the statistics of one page."""

    mean: Tensor
    var: Tensor
    power: Tensor

    def stack(self) -> Tensor:
        """(..., 3, d) for storage."""
        return torch.stack((self.mean, self.var, self.power), -2)

    @staticmethod
    def unstack(t: Tensor) -> "ChannelStats":
        """Inverse of `stack`."""
        return ChannelStats(*t.unbind(-2))

    def blend(self, other: "ChannelStats", weight: float) -> "ChannelStats":
        """(1-weight)·self + weight·other, channel by channel."""
        mix = lambda a, b: (1 - weight) * a + weight * b  # noqa: E731
        return ChannelStats(mix(self.mean, other.mean), mix(self.var, other.var), mix(self.power, other.power))

    def sigma_key(self) -> Tensor:
        """σ_K with a floor that keeps a constant channel finite: (..., d)."""
        return _floored_root(self.var)

    def sigma_query(self) -> Tensor:
        """σ_Q with the same kind of floor: (..., d)."""
        return _floored_root(self.power)

    def scales(self) -> Tensor:
        """s = (σ_K/σ_Q)^½ normalised to unit RMS over the channels: (..., d)."""
        s = root(self.sigma_key() / self.sigma_query())
        return s / root(lane_sum(s.square()) / s.shape[-1]).unsqueeze(-1)

    def hot(self, count: int) -> Tensor:
        """Indices of the `count` channels with the largest σ_K·σ_Q, ascending: (..., count) int64."""
        importance = self.sigma_key() * self.sigma_query()
        order = torch.argsort(importance, dim=-1, descending=True, stable=True)
        return order[..., :count].sort(-1).values

    def logit_error(self, by: "ChannelStats", hot: int) -> Tensor:
        """What the logit error of keys of these statistics is proportional to (docs/maths.md, 3 and 4): (...,).

        Args:
            by: the statistics whose scales and `hot` hot channels they are coded with; their own give the least error.
        """
        keep = torch.ones_like(self.var).scatter(-1, by.hot(hot), 0.0)
        s, k, q = by.scales(), self.sigma_key(), self.sigma_query()
        return ((k / s).square() * keep).sum(-1) * ((q * s).square() * keep).sum(-1)


def _floored_root(x: Tensor) -> Tensor:
    return root(x.clamp_min(0).add(1e-8 * x.amax(-1, keepdim=True) + _TINY))


def page_stats(k: Tensor, power: Tensor, usable: Tensor) -> ChannelStats:
    """Statistics of one page of keys.

    Args:
        k: (..., P, d) fp32 keys.
        power: (..., d) fp32 mean of q² over the page's sampled readers.
        usable: (..., P) bool; unusable tokens (attention sinks, non-finite values) do not count. With no usable
            token at all the mean and variance are zero.
    """
    w = usable.unsqueeze(-1)
    n = w.sum(-2).clamp_min(1)
    mean = lane_sum(torch.where(w, k, 0.0), -2) / n
    var = lane_sum(torch.where(w, k - mean.unsqueeze(-2), 0.0).square(), -2) / n
    return ChannelStats(mean, var, power)


class ChannelTracker:
    """An exponential average of page statistics, one page at a time.

    `state` is None before the first page. `frozen(page, blend)` gives the statistics a page is encoded with: its own
    mean (a page is encoded when it is complete, so its mean is known and the best one to subtract), and variance and
    reader power mixed with what came before, so that one odd page neither goes unnoticed nor erases the past.
    """

    def __init__(self, decay: float = 0.8, state: ChannelStats | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.state = decay, state

    def frozen(self, page: ChannelStats, blend: float) -> ChannelStats:
        """The page's mean; blend·page + (1-blend)·state of the rest; the page's own where there is no past."""
        if self.state is None:
            return page
        mixed = self.state.blend(page, blend)
        return ChannelStats(page.mean, mixed.var, mixed.power)

    def update(self, page: ChannelStats) -> None:
        """state <- decay·state + (1-decay)·page; the first page sets it."""
        self.state = page if self.state is None else self.state.blend(page, 1 - self.decay)

    def drift(self, page: ChannelStats) -> Tensor:
        """How far a page lies from the state: RMS over channels of (μ_page-μ)/σ and of ln(σ²_page/σ²), (...,).

        0 means the same distribution; 1 means that the means moved by one standard deviation, or the variances by a
        factor e, in the RMS over channels.
        """
        if self.state is None:
            return torch.zeros(page.mean.shape[:-1])
        sigma = self.state.sigma_key()
        shift = (page.mean - self.state.mean) / sigma
        ratio = 2 * (page.sigma_key() / sigma).log()
        return (shift.square() + ratio.square()).mean(-1).sqrt()

    @staticmethod
    def misfit(before: ChannelStats, after: ChannelStats, decay: float, hot: int) -> Tensor:
        """How many times larger the logit error of the page between two states is with the scales and hot channels of
        the state before it than with its own: (...,), 1 where nothing was known before.

        Means do not count: a page is coded around its own.
        """
        page = after.blend(before, -decay / (1 - decay))  # what `update` mixed in
        ratio = page.logit_error(before, hot) / page.logit_error(page, hot)
        return torch.where(before.var.amax(-1) > 0, ratio, 1.0)

    @staticmethod
    def merge(a: ChannelStats, b: ChannelStats, weight_a: float, weight_b: float) -> ChannelStats:
        """Pool two statistics of `weight_a` and `weight_b` tokens as if they had been taken over all tokens."""
        wa, wb = weight_a / (weight_a + weight_b), weight_b / (weight_a + weight_b)
        mean = wa * a.mean + wb * b.mean
        var = wa * (a.var + (a.mean - mean).square()) + wb * (b.var + (b.mean - mean).square())
        return ChannelStats(mean, var, wa * a.power + wb * b.power)
