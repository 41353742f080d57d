"""Activations on their way into a linear layer, quantized token by token while the model runs.

8 bit: rotate (signs and block Walsh-Hadamard; the weights are rotated offline, so products are unchanged), then one
scale a token: x ≈ Rᵀ(unit · code). A few large channels, which make int8 per token lossy, are spread over their block.

4 bit: the few channels with the largest σ_x·‖W_:,c‖ (`HotTracker`) are taken out. The rest is rotated and rounded to 16
steps in groups: x ≈ unit · step · (code - zero), where step and zero are whole and fit in one byte. Turned back, its
rounding errors are in the hot channels too; what these lack then is stored as int8 of x/σ.
The 4-bit payload unpacks exactly to int8, so an int8 product serves it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turboquant.maths.rotation import rotate, unrotate

_TINY = 1e-30
STEP_SHARES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8)  # of the step that covers a group's range; the best is taken


@dataclass(frozen=True)
class Int8Rows:
    """Rotated rows: codes (..., K) int8, unit (..., 1) fp32."""

    codes: Tensor
    unit: Tensor


@dataclass(frozen=True)
class Int4Rows:
    """Rotated rows without their hot channels, and these.

    Attributes:
        codes: (..., K) uint8 below 16.
        step: (..., K/g) uint8 from 1 to 16, in units; zero: (..., K/g) uint8 below 16, a code.
        unit: (..., 1) fp32.
        hot: (..., h) int8 of x/σ over the hot channels, less what the codes decode to there; hot_unit: (..., 1) fp32.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor
    unit: Tensor
    hot: Tensor
    hot_unit: Tensor

    def int8(self) -> Tensor:
        """What the payload stands for, exactly: (..., K) int8."""
        g = self.codes.unflatten(-1, (self.step.shape[-1], -1)).to(torch.int16)
        step, zero = (t.to(torch.int16).unsqueeze(-1) for t in (self.step, self.zero))
        return (step * (g - zero)).flatten(-2).to(torch.int8)


def _unit(x: Tensor) -> Tensor:
    """(..., 1): the largest magnitude of a row over 127; NaN for a row that is not finite, whose output is NaN then."""
    top = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(top.isfinite(), top.clamp_min(_TINY), torch.nan)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    unit = _unit(x)
    return (x / unit).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8), unit


def encode_int8(x: Tensor) -> Int8Rows:
    """(..., K) of any float dtype -> rotated int8, one scale a row."""
    return Int8Rows(*_int8(rotate(x.float())))


def decode_int8(rows: Int8Rows) -> Tensor:
    """(..., K) fp32 in the basis of the input."""
    return unrotate(rows.codes.float() * rows.unit)


def encode_int4(x: Tensor, group: int, hot: Tensor, sigma: Tensor) -> Int4Rows:
    """(..., K) of any float dtype -> Int4Rows.

    Args:
        group: divides K.
        hot: (h,) int64, the channels kept in 8 bit, h may be 0.
        sigma: (h,) fp32, their scales.
    """
    x = x.float()
    y = rotate(x.index_fill(-1, hot, 0.0))
    unit = _unit(y)
    g = (y / unit).nan_to_num(0.0).unflatten(-1, (-1, group))
    low, high = g.amin(-1, keepdim=True).clamp_max(0), g.amax(-1, keepdim=True).clamp_min(0)
    best = torch.full_like(low, torch.inf)
    out = [torch.zeros_like(low)] * 2 + [torch.zeros_like(g)]
    for share in STEP_SHARES:
        step = ((high - low) * (share / 15)).round().clamp(1, 16)
        zero = (7.5 - (low + high) / (2 * step)).round().clamp(0, 15)
        least = torch.maximum(-zero, -(128 / step).floor())  # what unpacks to int8
        most = torch.minimum(15 - zero, (127 / step).floor())
        level = torch.minimum(torch.maximum((g / step).round(), least), most)
        error = (level * step - g).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        out = [torch.where(better, new, old) for new, old in zip((step, zero, level + zero), out, strict=True)]
    step, zero, codes = (t.to(torch.uint8) for t in out)
    none = x[..., :0].to(torch.int8), torch.ones_like(unit)
    rows = Int4Rows(codes.flatten(-2), step.squeeze(-1), zero.squeeze(-1), unit, *none)
    if not len(hot):
        return rows
    noise = unrotate(rows.int8().float() * unit)[..., hot]
    hot_codes, hot_unit = _int8((x[..., hot] - noise) / sigma)
    return replace(rows, hot=hot_codes, hot_unit=hot_unit)


def decode_int4(rows: Int4Rows, hot: Tensor, sigma: Tensor) -> Tensor:
    """(..., K) fp32 in the basis of the input."""
    x = unrotate(rows.int8().float() * rows.unit)
    return x.index_add(-1, hot, rows.hot.float() * rows.hot_unit * sigma) if len(hot) else x


class HotTracker:
    """Which channels of one layer's input are hot: an exponential average over tokens, re-selected only on drift.

    The state is four tensors, so that it can live in a module's buffers and be saved with it:
        power: (K,) fp32 mean of x², each token weighing half of what the one HALF tokens later weighs.
        peak: (K,) fp32 largest |x|, decaying likewise.
        hot: (h,) int64 ascending; sigma: (h,) fp32 as they were at the last selection.
    The first tokens outweigh the prior (power from the norm's weight if the layer follows one, else constant), which
    counts as PRIOR tokens. A channel's importance is max(σ, peak/PEAK)·‖W_:,c‖.
    """

    HALF, PRIOR, PEAK = 512, 16, 16.0
    KEEP = 0.9  # the hot set stands while it holds this share of what the best set would hold

    def __init__(self, column_norm: Tensor, count: int, prior: Tensor | None = None, freeze: int = 0) -> None:
        k = len(column_norm)
        if not 0 <= count <= k:
            raise ValueError(f"count={count} is not allowed: from 0 to {k} channels")
        self.column_norm, self.count, self.freeze = column_norm.float(), count, freeze
        self.power = torch.ones_like(self.column_norm) if prior is None else prior.float().square().clamp_min(1e-12)
        self.peak = self.power.sqrt()
        self.seen = 0
        self.hot, self.sigma = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._select()

    @classmethod
    def resume(cls, column_norm: Tensor, freeze: int, state: dict[str, Tensor]) -> "HotTracker":
        """Go on from a state {"power", "peak", "hot", "sigma", "seen"}."""
        out = cls(column_norm, len(state["hot"]), None, freeze)
        out.power, out.peak, out.hot, out.sigma = (state[key].clone() for key in ("power", "peak", "hot", "sigma"))
        out.seen = int(state["seen"])
        return out

    def importance(self) -> Tensor:
        """(K,) fp32."""
        return torch.maximum(self.power.sqrt(), self.peak / self.PEAK) * self.column_norm

    def _select(self) -> None:
        order = torch.argsort(self.importance(), descending=True, stable=True)
        self.hot = order[: self.count].sort().values
        self.sigma = self.power.sqrt()[self.hot].clamp_min(1e-12)

    def update(self, x: Tensor) -> bool:
        """Follow the tokens x (..., K); True if the hot set was chosen anew. Frozen trackers stay as they are."""
        if self.count == 0 or x.numel() == 0 or (self.freeze and self.seen >= self.freeze):
            return False
        x = x.detach().float().reshape(-1, x.shape[-1])
        if self.freeze:
            x = x[: self.freeze - self.seen]
        n = len(x)
        power, peak = x.square().mean(0), x.abs().amax(0)
        if not bool(power.isfinite().all()):
            return False
        first = self.seen == 0
        if first:
            self.power = self.power * (power.mean() / self.power.mean())
            self.peak = self.power.sqrt()
        keep = 2.0 ** (-n / self.HALF)
        weight = max(1 - keep, n / (self.seen + self.PRIOR + n))
        self.power = (1 - weight) * self.power + weight * power
        self.peak = torch.maximum(self.peak * keep, peak)
        self.seen += n
        squared = self.importance().square()
        best = squared.topk(self.count).values.sum()
        if first or bool(squared[self.hot].sum() < self.KEEP * best):
            self._select()
            return True
        return False
