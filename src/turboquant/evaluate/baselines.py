"""Schemes to compare with that are not recipes: fake quantization of keys and values over whole windows.

plain4, plain3   the paper: TurboQuant_mse of every token of keys and values (arXiv:2504.19874), no staging in pages
kivi-g32, -g128  asymmetric 4-bit keys per channel over groups of 32 or 128 tokens (KIVI, arXiv:2402.02750, §3.2);
                 rotated Lloyd-Max 4-bit values with a least-squares scale per token
int4-token       asymmetric 4 bit per token and head after rotation, keys and values
int8-token       absmax 8 bit per token and head, unrotated, keys and values
NAME+ring        the same, the newest 128 and the first 4 tokens exact

The query at position t reads token j as it was if j > t - ring or j < sinks, else its quantized copy; KIVI's
incomplete last group stays as it was. Every stored scale and offset is rounded to fp16 and counted in the bits.
plain3 and plain4 alone mean these here; the recipes of that name, which stage tokens in pages and have a ring, are
measured when written with an option, as plain4:ring=128.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.evaluate.attention import register
from turboquant.maths.codebook import lloyd_max, nearest
from turboquant.maths.codec import decode_plain, encode_plain
from turboquant.maths.quantizer import least_squares_scale, rms, safe_divide
from turboquant.maths.rotation import rotate, unrotate

RING, SINKS = 128, 4
TILE_LOGITS = 1 << 25


def _plain(x: Tensor, bits: int) -> Tensor:
    return decode_plain(encode_plain(x, bits), bits)


def _rotated_lloyd_max(x: Tensor, bits: int) -> Tensor:
    levels = lloyd_max(bits, None, x.device)
    y = rotate(x)
    values = levels[nearest(safe_divide(y, rms(y)), levels).long()]
    return unrotate(values * least_squares_scale(y, values).half().float())


def _asymmetric(x: Tensor, bits: int, dim: int) -> Tensor:
    """Round to 2^bits steps between the minimum and maximum over `dim`; step and minimum in fp16."""
    low = x.amin(dim, keepdim=True)
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = safe_divide(x - low, step.expand_as(x)).round().clamp(0, 2**bits - 1)
    return codes * step + low


def _rotated_asymmetric(x: Tensor, bits: int) -> Tensor:
    return unrotate(_asymmetric(rotate(x), bits, -1))


def _absmax(x: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    step = (x.abs().amax(-1, keepdim=True) / top).half().float()
    return safe_divide(x, step.expand_as(x)).round().clamp(-top, top) * step


def _kivi(x: Tensor, bits: int, group: int) -> Tensor:
    """(..., T, d): per channel over each whole group of tokens; an incomplete last group stays."""
    n = x.shape[-2] // group * group
    whole = _asymmetric(x[..., :n, :].unflatten(-2, (-1, group)), bits, -2).flatten(-3, -2)
    return torch.cat([whole, x[..., n:, :]], -2)


@dataclass(frozen=True)
class Baseline:
    """One scheme. keys, values: (B, H, T, d) fp32 -> the same, as decoded; *_bits: head_dim -> true bits a number."""

    name: str
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    key_bits: Callable[[int], float]
    value_bits: Callable[[int], float]
    ring: int = 0
    sinks: int = 0

    @property
    def attention(self) -> str:
        """Name of its attention function in transformers; registered when first asked for."""
        name = "turboquant_" + self.name.replace("-", "_").replace("+", "_")
        register(name, partial(_attention, self))
        return name


def _bits(codes: float, words: int) -> Callable[[int], float]:
    """head_dim -> bits a number of `codes` bits with `words` 16-bit words a token and head."""
    return lambda d: codes + 16 * words / d


def _schemes() -> dict[str, Baseline]:
    out = []
    for b in (4, 3):
        plain = partial(_plain, bits=b)
        out.append(Baseline(f"plain{b}", plain, plain, _bits(b, 1), _bits(b, 1)))
    for g in (32, 128):
        values = partial(_rotated_lloyd_max, bits=4)
        out.append(
            Baseline(f"kivi-g{g}", partial(_kivi, bits=4, group=g), values, _bits(4 + 2 * 16 / g, 0), _bits(4, 1))
        )
    int4, int8 = partial(_rotated_asymmetric, bits=4), partial(_absmax, bits=8)
    out.append(Baseline("int4-token", int4, int4, _bits(4, 2), _bits(4, 2)))
    out.append(Baseline("int8-token", int8, int8, _bits(8, 1), _bits(8, 1)))
    out += [replace(b, name=b.name + "+ring", ring=RING, sinks=SINKS) for b in out]
    return {b.name: b for b in out}


BASELINES = _schemes()


def _attention(
    scheme: Baseline,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract for a whole window without a cache: (B, Hq, T, d) -> ((B, T, Hq, d), None)."""
    b, hq, t, d = query.shape
    h = key.shape[1]
    if key.shape[2] != t:
        raise ValueError(f"baseline {scheme.name!r} runs whole windows only: {t} queries, {key.shape[2]} keys")
    k, v = key.float(), value.float()
    k_hat, v_hat = scheme.keys(k), scheme.values(v)
    if scheme.sinks:
        k_hat = torch.cat([k[:, :, : scheme.sinks], k_hat[:, :, scheme.sinks :]], 2)
        v_hat = torch.cat([v[:, :, : scheme.sinks], v_hat[:, :, scheme.sinks :]], 2)
    q = query.float().unflatten(1, (h, hq // h)) * (scaling or d**-0.5)
    v_rest = v - v_hat if scheme.ring else None
    out = torch.empty(b, t, hq, d, dtype=query.dtype, device=query.device)
    position = torch.arange(t, device=query.device)
    block = max(16, min(t, TILE_LOGITS // (b * hq * t)))
    for i in range(0, t, block):
        end = min(i + block, t)
        rows, low = position[i:end, None], max(0, i + 1 - scheme.ring)
        near = position[low:end] > rows - scheme.ring
        logits = torch.einsum("bhgnd,bhmd->bhgnm", q[:, :, :, i:end], k_hat[:, :, :end])
        if scheme.ring:
            exact = torch.einsum("bhgnd,bhmd->bhgnm", q[:, :, :, i:end], k[:, :, low:end])
            logits[..., low:] = torch.where(near, exact, logits[..., low:])
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if attention_mask is None:
            see = position[:end] <= rows
        else:
            see = attention_mask[:, :, None, i:end, :end]
            see = see if see.dtype == torch.bool else see >= 0
        logits = logits.masked_fill(~see, -math.inf)
        if s_aux is not None:
            extra = s_aux.float().view(1, h, hq // h, 1, 1).expand(b, -1, -1, end - i, 1)
            logits = torch.cat([logits, extra], -1)
        p = torch.softmax(logits, -1)[..., :end]
        o = torch.einsum("bhgnm,bhmd->bhgnd", p, v_hat[:, :, :end])
        if v_rest is not None:
            o += torch.einsum("bhgnm,bhmd->bhgnd", p[..., low:] * near, v_rest[:, :, low:end])
        out[:, i:end] = o.flatten(1, 2).transpose(1, 2).to(out.dtype)
    return out, None
