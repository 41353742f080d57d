"""Prompts and continuations over packed history: flash attention on a bounded 16-bit workspace, merged by logsumexp.

Row t of a chunk that begins at `start` reads packed every token j <= t - R whose page is complete. So for all rows
  j <= start - R              packed: dequantized tile by tile into the workspace, torch's flash attention without mask
  start - R < j < start       packed for some rows and 16 bit for others, and the sinks: `attention.generic` with masks
  j in the chunk              16 bit: torch's flash attention, causal
and the three are merged. That needs equal lengths and what flash attention can express; where there is a soft-cap, a
window, a mask, padding, a value that is not finite, unequal lengths or fp32, `attention.generic` does all of it. The
lengths are read back to the host, so a step that is captured in a CUDA graph goes through `generic` too.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.kernels.triton import attention
from turboquant.kernels.triton.append import warps
from turboquant.kernels.triton.levels import row_levels
from turboquant.kernels.triton.spec import constants, parts, spec, tables
from turboquant.kernels.triton.tile import hadamard, load16, narrow
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout

MANY = 32  # chunks of more tokens than this take the way of this file
WORKSPACE = 1 << 24  # numbers of keys, and of values, that are 16-bit at a time


@triton.jit(do_not_specialize=("first", "width"))
def _dequantize(
    pages, table, out_k, out_v, tab, matrix, first, width, sb, sh, sn,
    H: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    nth, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, rows = tl.arange(0, L.DP), tl.arange(0, L.PP)
    real = c < L.D
    see = (rows < L.P)[:, None] & real[None, :]
    number = tl.load(table + b * width + first + nth).to(tl.int64)
    at = pages + (tl.maximum(number, 0) * H + h) * L.BYTES
    sign = tl.load(tab + L.T_signs + c, mask=real, other=0.0)
    to = b.to(tl.int64) * sb + h.to(tl.int64) * sh + (nth * L.P + rows).to(tl.int64)[:, None] * sn + c[None, :]
    see = see & (number >= 0)
    x = row_levels(at + L.O_key_codes, rows[:, None], c[None, :], see, tab + L.T_key_levels, 1 / L.KUNIT, L.KROW, L.KB)
    y = row_levels(at + L.O_value_codes, rows[:, None], c[None, :], see, tab + L.T_value_levels, 1 / L.VUNIT, L.VROW,
                   L.VB)  # fmt: skip
    x = hadamard(x, matrix, L.PP, L, PARTS, TYPE) * sign[None, :]
    y = hadamard(y, matrix, L.PP, L, PARTS, TYPE) * sign[None, :]
    some = rows < L.P
    if L.LIVE:
        ka = tl.load(tab + L.T_a + tl.load(at + L.O_key_log_scale + rows, mask=some, other=255).to(tl.int32))
        va = tl.load(tab + L.T_a + tl.load(at + L.O_value_log_scale + rows, mask=some, other=255).to(tl.int32))
        x = x * (ka * (load16(at + L.O_key_base) * L.KUNIT * L.NORM))[:, None]
        y = y * (va * (load16(at + L.O_value_base) * L.VUNIT * L.NORM))[:, None]
        s = tl.load(tab + L.T_s + tl.load(at + L.O_key_log_s + c, mask=real, other=128).to(tl.int32))
        mean = tl.load(at + L.O_key_mean_code + c, mask=real, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        x = (x + (mean * load16(at + L.O_key_mean_step))[None, :]) * s[None, :]
        for i in range(L.HOT):
            index = tl.load(at + L.O_key_hot_index + i).to(tl.int32)
            codes = tl.load(at + L.O_key_hot_codes + i * L.P + rows, mask=some, other=0).to(tl.int8, bitcast=True)
            hot = load16(at + L.O_key_hot_mean + 2 * i) + codes.to(tl.float32) * load16(at + L.O_key_hot_step + 2 * i)
            x = tl.where((c == index)[None, :], hot[:, None], x)
    else:
        x = x * (load16(at + L.O_key_scale + 2 * rows, some) * L.NORM)[:, None]
        y = y * (load16(at + L.O_value_scale + 2 * rows, some) * L.NORM)[:, None]
    tl.store(out_k + to, narrow(x, out_k.dtype.element_ty), mask=see)
    tl.store(out_v + to, narrow(y, out_v.dtype.element_ty), mask=see)


def dequantize_pages(
    buf: CacheBuffers, layout: PageLayout, first: int, last: int, out_k: Tensor, out_v: Tensor
) -> None:
    """Decode pages first..last-1 of every sequence's table into out_k and out_v.

    Args:
        out_k, out_v: (B, H, T, d), T >= (last-first)·P, of equal strides with a dense last dimension. The tokens of a
            page without a place (-1 in the table) are not written.

    Raises:
        ValueError: pages beyond the table, or outputs that do not fit.
    """
    b, h, t, d = out_k.shape
    if out_v.shape != out_k.shape or out_v.stride() != out_k.stride() or out_k.stride(-1) != 1:
        raise ValueError("out_k and out_v must have the same shape and strides and a dense last dimension")
    if not 0 <= first <= last <= buf.table.shape[1] or t < (last - first) * layout.kv.page or d != layout.head_dim:
        raise ValueError(f"pages {first} to {last} of a table of {buf.table.shape[1]} do not fit {tuple(out_k.shape)}")
    if first == last:
        return
    tab, matrix, _ = tables(layout, out_k.device)
    s = spec(layout)
    integers = s.LIVE  # whole units up to 127 are exact in 16 bit
    _dequantize[(last - first, h, b)](
        buf.pages, buf.table, out_k, out_v, tab, matrix, first, buf.table.shape[1], *out_k.stride()[:3],
        H=h, L=constants(layout), PARTS=parts(torch.bfloat16 if integers else torch.float32), TYPE=tl.bfloat16,
        num_warps=warps(s.PP * s.DP),
    )  # fmt: skip


@triton.jit
def _fold(acc, lse, part, part_lse, D: tl.constexpr, DP: tl.constexpr):
    """acc (rows, D) fp32 and lse (rows,) <- merged with another part."""
    r, c = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    a, x = tl.load(lse + r), tl.load(part_lse + r)
    top = tl.maximum(a, x)
    base = tl.where(top == -float("inf"), 0.0, top)
    wa, wx = tl.exp(a - base), tl.exp(x - base)
    total = wa + wx
    old = tl.load(acc + r * D + c, mask=c < D, other=0.0)
    new = tl.load(part + r * D + c, mask=c < D, other=0.0).to(tl.float32)
    y = (old * wa + new * wx) / tl.where(total == 0, 1.0, total)
    tl.store(acc + r * D + c, y, mask=c < D)
    tl.debug_barrier()
    tl.store(lse + r, base + tl.log(total))


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """torch's flash attention of (B, H, n, d) tensors with grouped heads: (B, n, Hq, d), logsumexp (B, Hq, n)."""
    out, lse = torch.ops.aten._flash_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2], 0.0, causal, False,
        scale=scaling,
    )[:2]  # fmt: skip
    return out, lse


def _history(
    buf: CacheBuffers, layout: PageLayout, q: Tensor, end: int, scaling: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention of all rows to the packed tokens from the sinks on up to `end`, a workspace at a time."""
    b, h, size, d = len(buf.length), buf.ring_k.shape[1], layout.kv.page, layout.head_dim
    step = max(1, WORKSPACE // (b * h * d * size))
    pages = -(-end // size)
    work = torch.empty(2, b, h, min(step, pages) * size, d, dtype=buf.ring_k.dtype, device=q.device)
    for first in range(0, pages, step):
        last = min(first + step, pages)
        dequantize_pages(buf, layout, first, last, work[0], work[1])
        some = slice(max(layout.kv.sinks - first * size, 0), min(end, last * size) - first * size)
        if some.start < some.stop:
            yield _flash(q, work[0][:, :, some], work[1][:, :, some], False, scaling)


def _fits(buf: CacheBuffers, q: Tensor, v: Tensor) -> int | None:
    """The common length of the sequences if flash attention can serve them, else None."""
    *lengths, fine = torch.cat([buf.length, (v.isfinite().all() & (buf.table >= 0).all()).view(1)]).tolist()
    return lengths[0] if fine and len(set(lengths)) == 1 else None


def chunk_attention(
    buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, scaling: float, sink_logits: Tensor | None
) -> Tensor | None:
    """Attention of a long causal chunk of 16-bit numbers; None where only `attention.generic` can serve it."""
    start = _fits(buf, q, v)
    if start is None:
        return None
    b, hq, n, d = q.shape
    k, v = k.to(q.dtype), v.to(q.dtype)
    out, lse = _flash(q, k, v, True, scaling)
    if start == 0 and sink_logits is None:
        return out.transpose(1, 2)
    acc, lse = out.float().contiguous(), lse.transpose(1, 2).contiguous()  # (B, n, Hq, ...): rows in one order

    def fold(part: Tensor, part_lse: Tensor) -> None:
        _fold[(b * n * hq,)](acc, lse, part.contiguous(), part_lse, D=d, DP=triton.next_power_of_2(d), num_warps=1)

    end = start // layout.kv.page * layout.kv.page
    oldest = max(0, min(end, start - layout.kv.ring + 1))  # tokens below it are packed for every row
    if start:
        for part, part_lse in _history(buf, layout, q, oldest, scaling):
            fold(part, part_lse.transpose(1, 2).contiguous())
        sums, tops, totals = attention.generic(buf, layout, q, k, v, scaling=scaling, partial=oldest)
        g = hq // k.shape[1]
        rows = lambda x: x.flatten(2, 3)[:, :, : g * n].unflatten(2, (n, g)).transpose(1, 2).flatten(2, 3)  # noqa: E731
        totals = rows(totals)
        part_lse = torch.where(totals > 0, rows(tops) * 0.6931471805599453 + totals.log(), -torch.inf)
        part = rows(sums[..., :d]) / torch.where(totals > 0, totals, 1.0).unsqueeze(-1)
        fold(part, part_lse.contiguous())
    if sink_logits is not None:
        acc *= torch.sigmoid(lse - sink_logits.float()).unsqueeze(-1)
    return acc.to(q.dtype).transpose(1, 2)


def cache_attention(
    buf: CacheBuffers,
    layout: PageLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """See `reference.cache_attention`. Steps of up to MANY tokens read nothing back to the host."""
    if q.numel() == 0:
        return torch.empty_like(q)
    plain = valid is None and mask is None and window is None and softcap is None
    if plain and q.shape[2] > MANY and q.is_cuda and not torch.cuda.is_current_stream_capturing():
        half = q.dtype == buf.ring_k.dtype and q.dtype in (torch.float16, torch.bfloat16)
        out = chunk_attention(buf, layout, q, k, v, scaling or q.shape[-1] ** -0.5, sink_logits) if half else None
        if out is not None:
            return out
    result = attention.generic(buf, layout, q, k, v, valid, mask, scaling, window, softcap, sink_logits)
    assert isinstance(result, Tensor)
    return result
