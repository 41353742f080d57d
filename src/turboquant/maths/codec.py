"""The page codec: P tokens of one KV head to integers and back. Unpacked; `packed/page.py` lays the integers out.

Keys, live:   k ≈ μ + s∘Rᵀ(a_t·level[code]),  with a few hot channels replaced by μ + step·int8
Values:       v ≈ Rᵀ(a_t·level[code])
Keys, plain:  as values (the paper's TurboQuant_mse with the length of each token stored in 16 bit)

μ, s and every scale are rounded to their stored form *before* anything depends on them, so the encoder corrects what
rounding did to them. s is stored as a logarithm in 8 bit; μ as int8 in units of s (a residual mean of a fraction of
s costs nothing: it is coded with the rest); a_t as 8-bit logarithm below the page's largest scale.

A row's codes are those of the best of eight trial scales around its RMS, and its stored scale is ‖y‖²/<y,level> rather
than the least-squares <y,level>/‖level‖²: slightly worse as a reconstruction, but <y, a·level> = ‖y‖², so a row's own
direction, which the logits of its readers are made of, is not shrunk. Both cost nothing to read; docs/measured.md has
what they buy. The search is in integers, whose sums have no order: see `search_levels`.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from turboquant.maths.codebook import lloyd_max, nearest, uniform
from turboquant.maths.exact import lane_sum, root
from turboquant.maths.quantizer import least_squares_scale, rms, safe_divide
from turboquant.maths.rotation import rotate, unrotate
from turboquant.maths.tracker import ChannelStats

S_STEPS = 16  # steps per octave of log_s: 4.4 % apart
ROW_STEPS = 32  # steps per octave of log_scale: 2.2 % apart
TRIALS = (1.0, 0.75, 0.8, 0.8667, 0.9333, 1.0667, 1.1333, 1.2)  # of a row's RMS; the first wins a tie
CODE_CELLS = 256  # of a scale: codes change at whole cells only
SEARCH_UNITS = 2048  # of the search for a scale: a row's RMS is so many units, and numbers are whole units
SEARCH_CELL = 32  # units of a cell: the search takes one level for all of it, that of its middle
SEARCH_CELLS = 192  # three RMS; what lies beyond has the outermost level at every trial scale
FP16_MAX = 65504.0


@dataclass(frozen=True)
class RowCodes:
    """Rotated rows: codes (..., P, d) uint8; log_scale (..., P) uint8; base (...) fp16, the page's largest scale."""

    codes: Tensor
    log_scale: Tensor
    base: Tensor


@dataclass(frozen=True)
class PlainCodes:
    """The paper's rows: codes (..., P, d) uint8; scale (..., P) fp16 (the length over sqrt d)."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class LiveCodes:
    """A live key page.

    rows: the rotated rest. log_s (..., d) uint8; mean_code (..., d) int8 in units of mean_step·s, zero at hot
    channels; mean_step (...) fp16; hot_index (..., h) uint8; hot_mean, hot_step (..., h) fp16; hot_codes (..., h, P)
    int8, one row a channel.
    """

    rows: RowCodes
    log_s: Tensor
    mean_code: Tensor
    mean_step: Tensor
    hot_index: Tensor
    hot_mean: Tensor
    hot_step: Tensor
    hot_codes: Tensor


def codebook(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Levels of the row codes: Lloyd-Max for N(0,1) up to 4 bit, uniform on [-1, 1] at 8 bit; int8 times one unit."""
    codes, unit = int8_levels(bits)
    return (torch.tensor(codes, dtype=torch.float64) * unit).float().to(device)


@lru_cache(maxsize=8)
def int8_levels(bits: int) -> tuple[tuple[int, ...], float]:
    """The levels as int8 and their unit, so that kernels can multiply codes as integers, exactly.

    The largest Lloyd-Max level is 127 units and the others are rounded to whole units, which adds 0.15 % to
    the mean squared error at 4 bit (docs/measured.md).
    """
    levels = uniform(8) if bits == 8 else lloyd_max(bits, None)
    unit = levels[-1].item() / 127
    return tuple(int(c) for c in (levels / unit).round().tolist()), unit


@lru_cache(maxsize=8)
def code_edges(bits: int) -> tuple[int, ...]:
    """Where the next code begins, ascending, in cells: the middles between levels, rounded to whole cells.

    A code is the number of edges <= y·(CODE_CELLS/scale), so kernels may look it up by cell.
    """
    levels = codebook(bits).double()
    return tuple(int(e) for e in ((levels[1:] + levels[:-1]) / 2 * CODE_CELLS).round().tolist())


@lru_cache(maxsize=8)
def search_levels(bits: int) -> tuple[tuple[int, ...], ...]:
    """(TRIALS, SEARCH_CELLS): the positive level, in int8 units, that each trial scale gives each cell of |y|.

    Whole units in and whole units out: <y, level> and ‖level‖² of a row are exact, however they are added up.
    """
    codes, unit = int8_levels(bits)
    positive = codes[len(codes) // 2 :]
    edges = [(a + b) / 2 * unit for a, b in pairwise(positive)]
    middle = [(i + 0.5) * SEARCH_CELL / SEARCH_UNITS for i in range(SEARCH_CELLS)]
    return tuple(tuple(positive[bisect_left(edges, y / trial)] for y in middle) for trial in TRIALS)


def fp16_up(x: Tensor) -> Tensor:
    """Round x >= 0 up to fp16, saturating at 65504."""
    x = x.clamp_max(FP16_MAX)
    h = x.half()
    return torch.where(h.float() < x, (h.view(torch.int16) + 1).view(torch.half), h)


def log_code(x: Tensor) -> Tensor:
    """round(16·log2 x) + 128 clamped to uint8: factors from 2^-8 to 2^7.9."""
    return (torch.log2(x) * S_STEPS).round().add(128).clamp(0, 255).to(torch.uint8)


def log_decode(code: Tensor) -> Tensor:
    """Inverse of `log_code`, fp32."""
    return torch.exp2((code.float() - 128) / S_STEPS)


def token_scale(log_scale: Tensor, base: Tensor) -> Tensor:
    """a_t = base·2^(-log_scale/32), exactly 0 for log_scale 255: (..., P)."""
    a = base.float().unsqueeze(-1) * torch.exp2(-log_scale.float() / ROW_STEPS)
    return torch.where(log_scale == 255, 0.0, a)


def _row_scale(y: Tensor, bits: int) -> Tensor:
    """The scale to store for each row (before rounding): (..., P, d) -> (..., P)."""
    if bits == 8:
        levels = codebook(bits, y.device)
        norm = y.abs().amax(-1, keepdim=True)
        return least_squares_scale(y, levels[nearest(safe_divide(y, norm), levels).long()]).squeeze(-1)
    square = lane_sum(y.square())
    norm = root(square / y.shape[-1])
    per_unit = safe_divide(torch.full_like(norm, SEARCH_UNITS), norm)
    units = (y * per_unit.unsqueeze(-1)).abs().round().clamp_max(32767).int()
    cell = (units // SEARCH_CELL).clamp_max(SEARCH_CELLS - 1)
    best, overlap = torch.zeros_like(norm), torch.zeros_like(norm)
    for table in torch.tensor(search_levels(bits), dtype=torch.int32, device=y.device):
        level = table[cell]
        dot = (units * level).sum(-1).float()
        fit = dot * dot / level.square().sum(-1).float()
        better = fit > best
        best, overlap = torch.where(better, fit, best), torch.where(better, dot, overlap)
    return safe_divide(square, overlap * int8_levels(bits)[1] * (norm / SEARCH_UNITS))


def _row_codes(y: Tensor, scale: Tensor, bits: int) -> Tensor:
    """(..., P, d), (..., P) -> codes (..., P, d) uint8."""
    scale = scale.unsqueeze(-1)
    if bits == 8:
        return nearest(safe_divide(y, scale), codebook(bits, y.device))
    cells = y * safe_divide(torch.full_like(scale, CODE_CELLS), scale)
    edges = torch.tensor(code_edges(bits), dtype=torch.float32, device=y.device)
    return torch.bucketize(cells, edges, right=True).to(torch.uint8)


def encode_rows(y: Tensor, bits: int, usable: Tensor) -> RowCodes:
    """Code rotated rows y (..., P, d) fp32; only usable (..., P) rows set the base, the others saturate at it."""
    scale = _row_scale(y, bits)
    base = fp16_up(torch.where(usable, scale, 0.0).amax(-1))
    ratio = safe_divide(base.float().unsqueeze(-1), scale)
    log_scale = (torch.log2(ratio.clamp_min(1)) * ROW_STEPS).round().clamp(0, 254)
    log_scale = torch.where((scale > 0) & (base > 0).unsqueeze(-1), log_scale, 255.0).to(torch.uint8)
    return RowCodes(_row_codes(y, token_scale(log_scale, base), bits), log_scale, base)


def decode_rows(c: RowCodes, bits: int) -> Tensor:
    """a_t·level[code], still rotated: (..., P, d) fp32."""
    return codebook(bits, c.codes.device)[c.codes.long()] * token_scale(c.log_scale, c.base).unsqueeze(-1)


def encode_values(v: Tensor, bits: int, usable: Tensor) -> RowCodes:
    """v (..., P, d) fp32, finite -> codes."""
    return encode_rows(rotate(v), bits, usable)


def decode_values(c: RowCodes, bits: int) -> Tensor:
    """Codes -> (..., P, d) fp32."""
    return unrotate(decode_rows(c, bits))


def encode_plain(x: Tensor, bits: int) -> PlainCodes:
    """TurboQuant_mse of each token with its length in fp16 and Lloyd-Max levels for N(0,1)."""
    y = rotate(x)
    scale = rms(y).squeeze(-1).clamp_max(FP16_MAX).half()
    return PlainCodes(nearest(safe_divide(y, scale.float().unsqueeze(-1)), lloyd_max(bits, None, x.device)), scale)


def decode_plain(c: PlainCodes, bits: int) -> Tensor:
    """Codes -> (..., P, d) fp32."""
    return unrotate(lloyd_max(bits, None, c.codes.device)[c.codes.long()] * c.scale.float().unsqueeze(-1))


def encode_keys(k: Tensor, stats: ChannelStats, bits: int, hot: int, usable: Tensor) -> LiveCodes:
    """Code a page of keys with the statistics frozen for it.

    Args:
        k: (..., P, d) fp32, finite.
        stats: (..., d) each; see `ChannelTracker.frozen`.
        bits: of the row codes.
        hot: channels kept in 8 bit.
        usable: (..., P) bool; the others are coded too but set no scale, and saturate.
    """
    log_s = log_code(stats.scales())
    s = log_decode(log_s)
    index = stats.hot(hot)
    is_hot = torch.zeros_like(s, dtype=torch.bool).scatter_(-1, index, True)

    relative = torch.where(is_hot, 0.0, stats.mean / s)
    step = fp16_up(relative.abs().amax(-1) / 127)
    mean_code = safe_divide(relative, step.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    rest = k / s.unsqueeze(-2) - (mean_code.float() * step.float().unsqueeze(-1)).unsqueeze(-2)
    rows = encode_rows(rotate(torch.where(is_hot.unsqueeze(-2), 0.0, rest)), bits, usable)

    hot_mean = stats.mean.gather(-1, index).clamp(-FP16_MAX, FP16_MAX).half()
    picked = k.gather(-1, index.unsqueeze(-2).expand(*k.shape[:-1], hot)) - hot_mean.float().unsqueeze(-2)
    hot_step = fp16_up(torch.where(usable.unsqueeze(-1), picked, 0.0).abs().amax(-2) / 127)
    hot_codes = safe_divide(picked, hot_step.float().unsqueeze(-2)).round().clamp(-127, 127).to(torch.int8)
    return LiveCodes(
        rows, log_s, mean_code, step, index.to(torch.uint8), hot_mean, hot_step, hot_codes.transpose(-1, -2)
    )


def decode_keys(c: LiveCodes, bits: int) -> Tensor:
    """Codes -> (..., P, d) fp32."""
    s = log_decode(c.log_s).unsqueeze(-2)
    mean = c.mean_code.float() * c.mean_step.float().unsqueeze(-1)
    k = (unrotate(decode_rows(c.rows, bits)) + mean.unsqueeze(-2)) * s
    hot = c.hot_mean.float().unsqueeze(-1) + c.hot_codes.float() * c.hot_step.float().unsqueeze(-1)
    index = c.hot_index.long().unsqueeze(-2)
    return k.scatter(-1, index.expand(*k.shape[:-1], index.shape[-1]), hot.transpose(-1, -2))
