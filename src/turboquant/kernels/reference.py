"""The cache ops in plain torch, on any device: the oracle that every other backend is compared with.

Which copy of a token does a query read? The query at position t reads token j
  * in 16 bit if j is one of the first S sinks, or j > t - R (the ring), or j's page was not complete when the chunk
    that holds t began, or j is in that chunk;
  * from its packed page otherwise.
`cache_attention` runs before `cache_append`: it sees the cache as it was before the chunk, and the chunk itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant.kernels.fused import add_norm_quantize, gate_quantize, norm_quantize  # noqa: F401 - ops of this backend too
from turboquant.kernels.linear import linear, quantize, rotate  # noqa: F401 - ops of this backend too
from turboquant.maths.codec import (
    FP16_MAX,
    LiveCodes,
    PlainCodes,
    decode_keys,
    decode_plain,
    decode_values,
    encode_keys,
    encode_plain,
    encode_values,
)
from turboquant.maths.exact import chain_sum, root
from turboquant.maths.tracker import ChannelStats, ChannelTracker, page_stats
from turboquant.packed.buffers import READER_STRIDE, CacheBuffers
from turboquant.packed.page import PageLayout, pack_page, unpack_keys, unpack_values

PAGES_AT_ONCE = 256  # pages of a sequence encoded together: bounds the workspace of append
TILE = 1 << 24  # logits, or decoded numbers, of one tile: bounds the workspace of attention to a few times 64 MiB


def decode_page_keys(layout: PageLayout, pages: Tensor) -> Tensor:
    """(..., page_bytes) uint8 -> (..., P, d) fp32 keys."""
    if layout.kv.codec == "raw":
        return layout.read(pages, "key_codes")
    c = unpack_keys(layout, pages)
    return decode_keys(c, layout.kv.key_bits) if isinstance(c, LiveCodes) else decode_plain(c, layout.kv.key_bits)


def decode_page_values(layout: PageLayout, pages: Tensor) -> Tensor:
    """(..., page_bytes) uint8 -> (..., P, d) fp32 values."""
    if layout.kv.codec == "raw":
        return layout.read(pages, "value_codes")
    c = unpack_values(layout, pages)
    bits = layout.kv.value_bits
    return decode_plain(c, bits) if isinstance(c, PlainCodes) else decode_values(c, bits)


def _finite(x: Tensor) -> Tensor:
    """fp32 with NaN as 0, clamped to what fp16 can hold, which is what saturated codes stand for."""
    return torch.nan_to_num(x.float(), nan=0.0).clamp(-FP16_MAX, FP16_MAX)


def _usable(k: Tensor, v: Tensor) -> Tensor:
    """(..., P, d) -> (..., P): tokens whose numbers the codec can express; the others count in no statistic."""
    return ((k.abs() <= FP16_MAX) & (v.abs() <= FP16_MAX)).all(-1)  # false for NaN


def encode_pages(
    layout: PageLayout, k: Tensor, v: Tensor, power: Tensor, usable: Tensor, state: ChannelStats | None
) -> tuple[Tensor, ChannelStats]:
    """Successive pages of (..., m, P, d) keys and values -> their bytes (..., m, page_bytes) and the states after each.

    Args:
        k, v: fp32 as they came, non-finite values included.
        power: (..., m, d) mean of q² over each page's reader samples.
        usable: (..., m, P) bool, False for attention sinks and tokens with a non-finite value.
        state: tracker state (..., d) before the first of them, None at the beginning of a sequence.
    """
    kv = layout.kv
    if kv.codec == "raw":
        return layout.write({"key_codes": k, "value_codes": v}), ChannelStats(power, power, power)
    k, v = _finite(k), _finite(v)
    if kv.codec == "plain":
        data = pack_page(layout, encode_plain(k, kv.key_bits), encode_plain(v, kv.value_bits))
        return data, ChannelStats(power, power, power)
    own = page_stats(k, power, usable)
    tracker, frozen, after = ChannelTracker(kv.decay, state), [], []
    for i in range(k.shape[-3]):
        page = ChannelStats(own.mean[..., i, :], own.var[..., i, :], own.power[..., i, :])
        frozen.append(tracker.frozen(page, kv.blend).stack())
        tracker.update(page)
        assert tracker.state is not None
        after.append(tracker.state.stack())
    stats = ChannelStats.unstack(torch.stack(frozen, -3))
    keys = encode_keys(k, stats, kv.key_bits, layout.hot, usable)
    data = pack_page(layout, keys, encode_values(v, kv.value_bits, usable))
    return data, ChannelStats.unstack(torch.stack(after, -3))


def cache_append(buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """Add a chunk to the cache: write ring and sinks, encode every page that becomes complete, advance the tracker.

    Args:
        buf: buffers of the layer; `table` must already name a pool page for each page the chunk completes.
        layout: of the recipe and head_dim.
        q: (B, Hq, n, d) queries of the chunk, k, v: (B, H, n, d); any float dtype.
        valid: (B, n) bool, False for padding; None if there is none.
    """
    b, _, n, _ = k.shape
    counts = [n] * b if valid is None else valid.sum(1).tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(buf.length.tolist(), counts, strict=True)):
        if key[1]:
            groups.setdefault(key, []).append(row)
    for (start, count), rows in groups.items():
        index = torch.tensor(rows, device=k.device)
        if len(rows) == b and count == n:
            part = (q, k, v)
        elif count == n:
            part = (q[index], k[index], v[index])
        else:
            assert valid is not None
            keep = [valid[r].nonzero().squeeze(1) for r in rows]
            q_, k_, v_ = (torch.stack([t[r, :, i] for r, i in zip(rows, keep, strict=True)]) for t in (q, k, v))
            part = (q_, k_, v_)
        _append_rows(buf, layout, index, start, *part)


def _append_rows(
    buf: CacheBuffers, layout: PageLayout, rows: Tensor, start: int, q: Tensor, k: Tensor, v: Tensor
) -> None:
    """`cache_append` for rows (b,) of equal length `start` and chunks without padding."""
    kv, n = layout.kv, k.shape[2]
    slots, sinks, size, kept = buf.ring_k.shape[2], buf.sink_k.shape[2], kv.page, buf.tracker.shape[1]
    end, first = start + n, start // size
    k, v = k.to(buf.ring_k.dtype), v.to(buf.ring_v.dtype)
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1)).all(1)  # (b, n): a token counts once, not once per head
    buf.nonfinite[rows] += bad.sum(1)

    at = torch.arange(start, end, device=k.device)
    at = at[at % READER_STRIDE == READER_STRIDE - 1]
    group = q.unflatten(1, (k.shape[1], -1))[:, :, :, at - start].float()
    sample = _finite(root(chain_sum(group.square(), 2) / group.shape[2])).to(buf.readers.dtype)  # (b, H, samples, d)

    if end // size > first:
        old = torch.arange(first * size, start, device=k.device)
        old_reader = torch.arange(first * size // READER_STRIDE, start // READER_STRIDE, device=k.device)
        take = (end // size - first) * size
        page_k = torch.cat([buf.ring_k[rows][:, :, old % slots], k], 2)[:, :, :take].unflatten(2, (-1, size))
        page_v = torch.cat([buf.ring_v[rows][:, :, old % slots], v], 2)[:, :, :take].unflatten(2, (-1, size))
        reader = torch.cat([buf.readers[rows][:, :, old_reader % buf.readers.shape[2]], sample], 2)
        reader = reader[:, :, : take // READER_STRIDE].unflatten(2, (-1, size // READER_STRIDE))
        position = torch.arange(first * size, first * size + take, device=k.device).view(-1, size)
        for i in range(0, end // size - first, PAGES_AT_ONCE):
            some = slice(i, i + PAGES_AT_ONCE)
            page = torch.arange(first, end // size, device=k.device)[some]
            kf, vf = page_k[:, :, some].float(), page_v[:, :, some].float()
            usable = _usable(kf, vf) & (position[some] >= sinks)
            power = chain_sum(reader[:, :, some].float().square(), 3) / reader.shape[3]
            before = ChannelStats.unstack(buf.tracker[rows, (first + i - 1) % kept]) if first + i else None
            data, states = encode_pages(layout, kf, vf, power, usable, before)
            ids = buf.table[rows][:, page].long()
            buf.pages[ids[ids >= 0]] = data.transpose(1, 2)[ids >= 0]  # -1: out of the window already, not kept
            for last in range(max(0, len(page) - kept), len(page)):
                buf.tracker[rows, (first + i + last) % kept] = states.stack()[:, :, last]

    keep = torch.arange(max(start, end - slots), end, device=k.device)
    buf.ring_k[rows.unsqueeze(1), :, keep % slots] = k[:, :, keep - start].transpose(1, 2)
    buf.ring_v[rows.unsqueeze(1), :, keep % slots] = v[:, :, keep - start].transpose(1, 2)
    keep = torch.arange(start, max(start, min(end, sinks)), device=k.device)
    buf.sink_k[rows.unsqueeze(1), :, keep] = k[:, :, keep - start].transpose(1, 2)
    buf.sink_v[rows.unsqueeze(1), :, keep] = v[:, :, keep - start].transpose(1, 2)
    j = at // READER_STRIDE
    j, sample = j[-buf.readers.shape[2] :], sample[:, :, -buf.readers.shape[2] :]
    buf.readers[rows.unsqueeze(1), :, j % buf.readers.shape[2]] = sample.transpose(1, 2)
    buf.length[rows] = end


class _Softmax:
    """Running softmax over key tiles: (b, H, g, n) maximum and sum, (b, H, g, n, d) weighted values, fp32."""

    def __init__(self, q: Tensor, scaling: float, softcap: float | None, sink_logits: Tensor | None) -> None:
        self.q, self.scaling, self.softcap = q, scaling, softcap
        self.top = q.new_full(q.shape[:-1], -torch.inf)
        self.sum = torch.zeros_like(self.top)
        self.out = torch.zeros_like(q)
        if sink_logits is not None:  # one extra logit per query head that takes part in the sum and has no value
            h, g = q.shape[1:3]
            self.top = sink_logits.float().view(1, h, g, 1).expand(self.top.shape).clone()
            self.sum = torch.ones_like(self.top)

    def add(self, k: Tensor, v: Tensor, see: Tensor) -> None:
        """k, v: (b, H, m, d) fp32; see: (b, n, m) bool, which query reads which key."""
        logits = torch.einsum("bhgnd,bhmd->bhgnm", self.q, k) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        see = see[:, None, None]
        logits = logits.masked_fill(~see, -torch.inf)
        top = torch.maximum(self.top, logits.amax(-1))
        base = torch.where(top == -torch.inf, 0.0, top)
        p = torch.exp(logits - base.unsqueeze(-1))
        old = torch.exp(self.top - base)
        self.sum = self.sum * old + p.sum(-1)
        # 0·NaN is NaN: a value that is not finite may reach those who read it and nobody else
        finite = v.isfinite().all(-1)
        out = torch.einsum("bhgnm,bhmd->bhgnd", p, torch.where(finite.unsqueeze(-1), v, 0.0))
        for m in (~finite).flatten(0, 1).any(0).nonzero().flatten().tolist():
            reads = (see[..., m] & ~finite[:, :, None, None, m]).unsqueeze(-1)
            out = torch.where(reads, out + p[..., m, None] * v[:, :, None, None, m], out)
        self.out = self.out * old.unsqueeze(-1) + out
        self.top = top

    def result(self) -> Tensor:
        """Attention output; 0 for a query that reads nothing."""
        return self.out / torch.where(self.sum == 0, 1.0, self.sum).unsqueeze(-1)


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
    """Attention of a chunk over the cache as it was before the chunk, and over the chunk itself.

    Args:
        buf, layout: see `cache_append`.
        q: (B, Hq, n, d), k, v: (B, H, n, d) of the chunk; Hq a multiple of H.
        valid: (B, n) bool, False for padding columns of the chunk; None if there are none.
        mask: (B or 1, 1, n, n) bool or additive float for the chunk against itself; None for causal (with `window`).
        scaling: of the logits, d^-½ by default.
        window: a query reads itself and the window-1 tokens before it; None for all.
        softcap: logits become softcap·tanh(logit/softcap).
        sink_logits: (Hq,) extra logits without a value.

    Returns:
        (B, Hq, n, d) in q's dtype; zero for padding queries.
    """
    kv = layout.kv
    b, hq, n, d = q.shape
    h, size, device = k.shape[1], kv.page, q.device
    if q.numel() == 0:
        return torch.empty_like(q)
    longest = int(buf.length.max())
    unmasked = valid is None and mask is None and (window is None or n <= window)
    if longest == 0 and n > 1 and unmasked and softcap is None and sink_logits is None and v.isfinite().all():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    soft = _Softmax(q.float().unflatten(1, (h, hq // h)), scaling or d**-0.5, softcap, sink_logits)
    real = torch.ones(b, n, dtype=torch.bool, device=device) if valid is None else valid
    start = buf.length.view(b, 1, 1)
    t = start + (real.cumsum(1) - 1).unsqueeze(-1)  # (b, n, 1) position of each query
    row = real.unsqueeze(-1)

    def in_window(j: Tensor) -> Tensor:
        return (t - j < window) & row if window is not None else row

    sinks, slots = buf.sink_k.shape[2], buf.ring_k.shape[2]
    if sinks and longest:
        j = torch.arange(sinks, device=device).view(1, 1, -1)
        soft.add(buf.sink_k.float(), buf.sink_v.float(), (j < start) & in_window(j))

    packed_end = start // size * size  # tokens below it stand in pages
    oldest = 0 if window is None else max(0, int(buf.length.min()) - window + 1)
    newest = (longest + n - 1 - kv.ring) // size + 1 if longest else 0
    last = min(longest // size, newest, buf.table.shape[1])
    tile = max(1, TILE // (b * size * max(hq * n, 2 * h * d)))  # pages at a time
    for first in range(oldest // size, last if len(buf.pages) else 0, tile):
        ids = buf.table[:, first : min(first + tile, last)].long()
        pages = buf.pages[ids.clamp_min(0)].transpose(1, 2)  # (b, H, pages, bytes)
        j = torch.arange(first * size, (first + ids.shape[1]) * size, device=device).view(1, 1, -1)
        see = (j >= sinks) & (j < packed_end) & (j <= t - kv.ring) & in_window(j)
        see = see & (ids >= 0).repeat_interleave(size, 1).unsqueeze(1)
        read = see.any(1).unflatten(1, (-1, size)).any(2)  # nobody decodes a page of which nothing is read
        pages = torch.where(read[:, None, :, None], pages, 0)
        soft.add(decode_page_keys(layout, pages).flatten(2, 3), decode_page_values(layout, pages).flatten(2, 3), see)

    if longest:
        slot = torch.arange(slots, device=device).view(1, 1, -1)
        j = start - 1 - (start - 1 - slot) % slots  # position in each slot, negative where nothing was written
        exact = (j > t - kv.ring) | (j >= packed_end)
        soft.add(buf.ring_k.float(), buf.ring_v.float(), (j >= sinks) & (j < start) & exact & in_window(j))

    k, v = k.to(buf.ring_k.dtype).float(), v.to(buf.ring_v.dtype).float()
    step = max(1, TILE // (b * hq * n))
    column = t.transpose(1, 2)  # (b, 1, n)
    for i in range(0, n, step):
        j = column[:, :, i : i + step]
        see = (j <= t) & real[:, None, i : i + step] & in_window(j)
        if mask is not None:
            m = mask[:, 0, :, i : i + step]
            see = real[:, None, i : i + step] & row & (m if m.dtype == torch.bool else m >= 0)
        soft.add(k[:, :, i : i + step], v[:, :, i : i + step], see)
    return soft.result().flatten(1, 2).to(q.dtype)
