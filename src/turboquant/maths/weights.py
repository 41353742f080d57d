"""Weights as integers: W = scale · (code - zero), a scale and a whole zero for every group of a row.

One stage has 16 codes. Two stages are W ≈ Q4(W) + Q4(W - Q4(W)) with the second scale a sixteenth of the first: the
two codes then are the high and the low half of one 8-bit code of the grid scale/16, a single product with 8-bit weights
serves both, and the first stage alone still is a 4-bit weight. Scales are rounded to fp16 before anything
depends on them.

Data-free ways to better codes: `clip` searches the range of each group of a single stage (fewer, finer steps against a
few clipped weights); two stages try scales around the one that covers the range, for the error of the 8-bit grid.
Error feedback (GPTQ, arXiv:2210.17323) pushes what rounding one column lost into the columns that are still to come,
along the second moments of the input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CLIPS = tuple(1 - i / 24 for i in range(13))  # shares of a group's range that are tried
FINE_SHARES = tuple(1.05 - i / 200 for i in range(31))  # of the scale that covers a group's range, for two stages
PIECE = 1 << 20  # numbers searched at a time, so that what is made of them stays in a processor's cache
_SMALLEST = 2.0**-24  # least fp16 above zero


@dataclass(frozen=True)
class WeightCodes:
    """codes (..., S, N, K) uint8 below 16, scale (..., N, G) fp16, zero (..., N, G) uint8 from 0 to 15."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def _grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 scale and whole zero of the 16-step grid that covers [low, high] and 0."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 15).clamp_min(_SMALLEST).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    return scale, zero


def _round(w: Tensor, step: Tensor, zero: Tensor, stages: int = 1) -> Tensor:
    return (w / step + zero).round().clamp(0, 16**stages - 1)


def _steps(scale: Tensor, zero: Tensor, stages: int) -> tuple[Tensor, Tensor]:
    """Step and zero of the grid of all stages, fp32."""
    return (scale.float(), zero) if stages == 1 else (scale.float() / 16, 16 * zero + 8)


def fine_grid(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero of two stages for groups (..., g) fp32, as `group_grid` returns them.

    The zero is the whole one that leaves as much of the grid beyond one end of the group as beyond the other; of the
    scales the one with the smallest squared error is taken.
    """
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = _grid(low, high)
    for share in FINE_SHARES:
        scale = ((high - low) * (share / 15)).clamp_min(_SMALLEST).half()
        zero = ((119.5 - 8 * (low + high) / scale.float()) / 16).round().clamp(0, 15)
        error = _error(w, scale, zero, 2, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _error(w: Tensor, scale: Tensor, zero: Tensor, stages: int, importance: Tensor | None) -> Tensor:
    """(..., 1): squared error of groups (..., g) on a grid."""
    step, offset = _steps(scale, zero, stages)
    error = ((_round(w, step, offset, stages) - offset) * step - w).square()
    return (error if importance is None else error * importance).sum(-1, keepdim=True)


def group_grid(w: Tensor, clip: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups (..., g) fp32 -> two of (..., 1): fp16, and fp32 whole numbers.

    Args:
        clip: take the share of the range with the smallest squared error; else the whole range.
        importance: (..., g) or broadcastable, weights of the squared errors.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best_scale, best_zero = _grid(low, high)
    if not clip:
        return best_scale, best_zero
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for ends in ((1, 1), (1, 0), (0, 1)):  # both ends together, then each by itself
        from_low, from_high = best_low, best_high
        for share in CLIPS:
            l, h = (low * share if ends[0] else from_low), (high * share if ends[1] else from_high)
            scale, zero = _grid(l, h)
            error = _error(w, scale, zero, 1, importance)
            better = error < best
            best = torch.where(better, error, best)
            best_low, best_high = torch.where(better, l, best_low), torch.where(better, h, best_high)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def encode_weight(
    w: Tensor, group: int, stages: int = 1, clip: bool = True, moment: Tensor | None = None
) -> WeightCodes:
    """Quantize (..., N, K).

    Args:
        w: any float dtype, finite.
        group: weights along K that share a scale; divides K.
        stages: 1 (4 bit) or 2 (4+4 bit).
        clip: search the range of each group of a single stage.
        moment: (K, K) fp32 second moments of the input in the basis of K, for error feedback; w must be (N, K) then.

    Raises:
        ValueError: a weight that is not finite or has scales beyond fp16, or a group, stage or shape that does not fit.
    """
    k = w.shape[-1]
    if stages not in (1, 2) or group < 1 or k % group:
        raise ValueError(f"stages={stages}, group={group} is not allowed: stages 1 or 2, and a group that divides {k}")
    w = w.detach().float()
    if not w.isfinite().all():
        raise ValueError("a weight that is not finite cannot be quantized")
    if moment is not None:
        if w.dim() != 2 or moment.shape != (k, k):
            raise ValueError(f"error feedback takes w (N, K) and moments ({k}, {k})")
        codes, scale, zero = _with_feedback(w, group, stages, clip, moment)
    else:
        parts = [_encode_groups(g, stages, clip) for g in w.reshape(-1, group).split(max(1, PIECE // group))]
        codes, scale, zero = (torch.cat(x) for x in zip(*parts, strict=True))
        codes, shape = codes.view(w.shape), (*w.shape[:-1], k // group)
        scale, zero = scale.view(shape), zero.view(shape)
    if not scale.isfinite().all():
        raise ValueError("a weight whose scales are beyond fp16 cannot be quantized")
    return WeightCodes(torch.stack((codes // 16, codes % 16)[2 - stages :], -3), scale, zero)


def _encode_groups(g: Tensor, stages: int, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(M, g) fp32 -> codes (M, g) uint8 of all stages, scale (M, 1) fp16, zero (M, 1) uint8."""
    scale, zero = _best_grid(g, stages, clip)
    codes = _round(g, *_steps(scale, zero, stages), stages)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def _best_grid(w: Tensor, stages: int, clip: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return group_grid(w, clip, importance) if stages == 1 else fine_grid(w, importance)


def decode_weight(w: WeightCodes, stages: int | None = None) -> Tensor:
    """(..., N, K) fp32; the first `stages` stages, by default all there are."""
    have = w.codes.shape[-3]
    stages = have if stages is None else stages
    if not 1 <= stages <= have:
        raise ValueError(f"stages={stages} is not allowed: this weight has {have}")
    codes = w.codes.unflatten(-1, (w.scale.shape[-1], -1)).float()  # (..., S, N, G, g)
    zero, scale = w.zero.float().unsqueeze(-1), w.scale.float().unsqueeze(-1)
    if stages == 1:
        out = (codes[..., 0, :, :, :] - zero) * scale
    else:
        fine = 16 * codes[..., 0, :, :, :] + codes[..., 1, :, :, :]
        out = (fine - (16 * zero + 8)) * (scale / 16)
    return out.flatten(-2)


def _with_feedback(
    w: Tensor, group: int, stages: int, clip: bool, moment: Tensor, damp: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ: columns in order, the error of each spread over later ones by the inverse of the second moments.

    Args:
        damp: for their inverse to exist; what other texts have beyond them is the caller's (`layers.moments.DAMPING`).

    Returns:
        codes of all stages (N, K) uint8, scale (N, G) fp16, zero (N, G) uint8.
    """
    n, k = w.shape
    w = w.clone()
    h = moment.float().clone()
    h += torch.eye(k, device=h.device) * (damp * h.diagonal().mean()).clamp_min(1e-12)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    scale = torch.empty(n, k // group, dtype=torch.float16, device=w.device)
    zero = torch.empty(n, k // group, dtype=torch.uint8, device=w.device)
    s = z = torch.empty(0)
    for start in range(0, k, block):
        end = min(start + block, k)
        part = w[:, start:end]
        errors = torch.zeros_like(part)
        for i in range(end - start):
            c = start + i
            if c % group == 0:
                # what of a group reaches beyond this block has not felt this block's errors yet; they are small
                importance = upper.diagonal()[c : c + group].reciprocal().square()
                s, z = _best_grid(w[:, c : c + group], stages, clip, importance)
                scale[:, c // group], zero[:, c // group] = s[:, 0], z[:, 0].to(torch.uint8)
                s, z = _steps(s, z, stages)
            code = _round(part[:, i : i + 1], s, z, stages)
            codes[:, c] = code[:, 0].to(torch.uint8)
            lost = (part[:, i] - ((code - z) * s)[:, 0]) / upper[c, c]
            part[:, i:] -= lost.unsqueeze(1) * upper[c, start + i : end].unsqueeze(0)
            errors[:, i] = lost
        w[:, end:] -= errors @ upper[start:end, end:]
    return codes, scale, zero
