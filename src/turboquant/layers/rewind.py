"""Taking back more tokens than the ring remembers: what left it returns as decoded from its pages.

Needed only for a `crop` beyond the recipe's `rewind`. Statistics that are gone are read off a page: its decoded keys
give μ and σ_K, and its header the reader power up to a factor, σ_Q ∝ σ_K/s². The factor hardly matters: s is
normalised and the hot set only compares channels.
"""

import torch
from torch import Tensor

from turboquant.kernels.reference import decode_page_keys, decode_page_values
from turboquant.maths.codec import log_decode
from turboquant.maths.tracker import page_stats
from turboquant.packed.buffers import READER_STRIDE, STATES, CacheBuffers
from turboquant.packed.page import PageLayout


def rewind(
    buf: CacheBuffers, layout: PageLayout, reach: list[int], new: list[int], pages: list[list[int]]
) -> list[int]:
    """Make ring, tracker and readers of every sequence fit its new length.

    Args:
        reach: the furthest position ever written plus one, of each sequence.
        new: lengths after the crop.
        pages: ids of each sequence's pages before the crop.

    Returns:
        the new reach: the ring then holds the positions from reach - slots on.
    """
    out = []
    for row, (old, length) in enumerate(zip(reach, new, strict=True)):
        if old - length <= layout.kv.rewind:
            out.append(old)
            continue
        out.append(_refill_ring(buf, layout, row, old, length))
        if layout.kv.codec == "live":
            _recall_statistics(buf, layout, row, old, length, len(pages[row]))
    return out


def _refill_ring(buf: CacheBuffers, layout: PageLayout, row: int, old: int, new: int) -> int:
    """Returns the reach of a ring that holds just what is needed at the new length."""
    slots, size = buf.ring_k.shape[2], layout.kv.page
    lowest = min(max(0, new - layout.kv.ring), new // size * size)  # first token that must stand in the ring
    lost_end = min(new, max(0, old - slots))
    for page in range(lowest // size, -(-lost_end // size)):
        data = buf.pages[buf.table[row, page].long()]
        at = torch.arange(page * size, (page + 1) * size, device=data.device)
        lost = (at >= lowest) & (at < lost_end)
        where = at[lost] % slots
        buf.ring_k[row, :, where] = decode_page_keys(layout, data)[:, lost].to(buf.ring_k.dtype)
        buf.ring_v[row, :, where] = decode_page_values(layout, data)[:, lost].to(buf.ring_v.dtype)
    return old if lost_end <= lowest else lowest + slots


def _recall_statistics(buf: CacheBuffers, layout: PageLayout, row: int, old: int, new: int, pages: int) -> None:
    size, opened = layout.kv.page, new // layout.kv.page
    if opened >= pages:  # the open page was never complete: its samples are still there
        return
    for page in range(max(0, opened - STATES), opened):  # all that a further crop takes to be there
        if page < old // size - STATES:
            buf.tracker[row, page % STATES] = _page_statistics(buf, layout, row, page)
    power = _page_statistics(buf, layout, row, opened)[:, 2]
    if opened:  # as strong as the tracker's readers
        power = power * buf.tracker[row, (opened - 1) % STATES, :, 2].mean(-1, keepdim=True)
    j = torch.arange(opened * size // READER_STRIDE, new // READER_STRIDE, device=power.device)
    buf.readers[row, :, j % buf.readers.shape[2]] = power.sqrt().unsqueeze(1).to(buf.readers.dtype)


def _page_statistics(buf: CacheBuffers, layout: PageLayout, row: int, page: int) -> Tensor:
    """(H, 3, d) mean, variance and reader power (normalised to mean 1) of a page as its bytes tell."""
    data = buf.pages[buf.table[row, page].long()]
    keys, size = decode_page_keys(layout, data), layout.kv.page
    usable = torch.arange(page * size, (page + 1) * size, device=data.device) >= buf.sink_k.shape[2]
    stats = page_stats(keys, torch.ones_like(keys[:, 0]), usable.expand(keys.shape[:-1]))
    power = stats.var / log_decode(layout.read(data, "key_log_s")).pow(4)
    return torch.stack((stats.mean, stats.var, power / power.mean(-1, keepdim=True).clamp_min(1e-30)), -2)
