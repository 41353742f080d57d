"""Attention of a prompt's tokens on a GPU: packed pages through a 16-bit workspace, the newest as they came.

The query at t reads token j in 16 bit if j > t - R or j is a sink, else packed: two products of vLLM's flash attention
(causal to t - R, with the sinks put into the workspace as they are; a window of R tokens), merged by logsumexp.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.kernels import ops
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe

WORKSPACE = 16384  # tokens of packed history that stand in 16 bit at a time, where no window makes rows differ


def workspace(kv: KVRecipe, window: int | None, n: int) -> int:
    """Tokens of history that stand in 16 bit at a time, at most, for prompts of up to n new tokens."""
    if window is None:
        return max(WORKSPACE, n + 2 * kv.page)
    return max(0, window - kv.ring + n + 2 * kv.page) if window > kv.ring else 0


@dataclass(frozen=True)
class Prompt:
    """More than a few new tokens of one request.

    Attributes:
        row, token: of the step. start: tokens before. n: new tokens.
        chunks: (first, last) of the new tokens that are appended together: they end where a prefix hit may.
        recent: (m,) int64, ring slots of the tokens before `start` that the first query reads in 16 bit, in order.
    """

    row: int
    token: int
    start: int
    n: int
    chunks: Sequence[tuple[int, int]]
    recent: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + 1)

    @property
    def tokens(self) -> slice:
        return slice(self.token, self.token + self.n)

    @classmethod
    def of(
        cls, layout: BlockLayout, row: int, token: int, start: int, n: int, interval: int, device: torch.device
    ) -> "Prompt":
        """`interval` as of TailSpec."""
        kv, end = layout.kv, start + n
        cuts = [p - start for p in range((start // interval + 1) * interval, end, interval)] if interval else []
        ends = [0, *cuts, n]
        recent = torch.arange(max(0, start - kv.ring + 1), start, device=device) % kv.ring_slots
        return cls(row, token, start, n, list(pairwise(ends)), recent)


def flash(impl: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int | None) -> tuple[Tensor, Tensor]:
    """vLLM's flash attention of one sequence, the last query at the last key.

    Args:
        q: (n, Hq, d), k, v: (m, H, d). left: keys that a query reads before its own; None for all.

    Returns:
        (n, Hq, d), logsumexp (Hq, n) fp32.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    of_q, of_k = (_ends(len(x), q.device) for x in (q, k))
    out, lse = flash_attn_varlen_func(
        q, k, v, max_seqlen_q=len(q), cu_seqlens_q=of_q, max_seqlen_k=len(k), cu_seqlens_k=of_k,
        softmax_scale=impl.scale, causal=causal, window_size=[-1 if left is None else left, 0 if causal else -1],
        softcap=impl.softcap or 0.0, return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=q.shape[2]),
    )  # fmt: skip
    return out, lse


@lru_cache(maxsize=1024)
def _ends(length: int, device: torch.device) -> Tensor:
    """One sequence, as flash attention takes it; every layer of a step asks for the same."""
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts of one attention, each (n, Hq, d) and logsumexp (Hq, n), as one; rows without a token have -inf."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    out, lse = torch.empty_like(first[0]), torch.empty_like(first[1])
    merge_attn_states(out, *first, *second, lse)
    return out, lse


def attend(
    impl: Any, prompt: Prompt, pages: Tensor, page_table: Tensor, table: Tensor, start: Tensor, q: Tensor, k: Tensor,
    v: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Append a prompt's tokens, then attend: q, out (n, Hq, d), k, v (n, H, d), tables and start of its row."""
    carrier, page = impl.tail.carrier, impl.layout.page(pages.shape[2])
    qs, ks, vs = (x.transpose(0, 1)[None] for x in (q, k, v))
    carrier.put(table, start, ks, vs)
    buf = carrier.gather(pages, page_table, table, start)
    near = [torch.cat([ring[0].index_select(1, prompt.recent).transpose(0, 1), x.to(ring.dtype)])
            for ring, x in ((buf.ring_k, k), (buf.ring_v, v))]  # fmt: skip
    for first, last in prompt.chunks:
        part = slice(first, last)
        ops.cache_append(buf, page, qs[:, :, part], ks[:, :, part], vs[:, :, part], None)
        carrier.keep(buf, table, start + first, last - first, impl.nonfinite)
        buf.nonfinite.zero_()
    out.copy_(attention(impl, prompt, page, buf, q.to(impl.layout.dtype), near[0], near[1]))


def attention(
    impl: Any, prompt: Prompt, page: PageLayout, buf: CacheBuffers, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """(n, Hq, d) of a prompt whose pages are there.

    Args:
        k, v: (m + n, H, d), the tokens of `recent` and the new ones.
    """
    ring, end, window = impl.layout.kv.ring, prompt.start + prompt.n, impl.window
    near = min(ring, window or ring)
    parts: Iterator[tuple[Tensor, Tensor]] = iter([flash(impl, q, k, v, True, near - 1)])
    behind = end - ring  # tokens that the last query reads packed
    if behind > 0 and (window is None or window > ring):
        left = None if window is None else window - ring - 1
        parts = chain(history(impl, prompt, page, buf, q, behind, left), parts)  # one at a time, as memory goes
    out, lse = reduce(merge, parts)
    if impl.sinks is not None:
        out = out * torch.sigmoid(lse.transpose(0, 1) - impl.sinks.float()).unsqueeze(-1).to(out.dtype)
    return out


def history(
    impl: Any, prompt: Prompt, page: PageLayout, buf: CacheBuffers, q: Tensor, behind: int, left: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(output, logsumexp) of the queries over packed tokens up to `behind`.

    Args:
        left: tokens that a query reads before the newest packed one that it reads; None for all.
    """
    from turboquant.kernels.triton import dequantize_pages

    size, sinks = impl.layout.kv.page, impl.layout.kv.sinks
    whole = max(0, prompt.start - impl.layout.kv.ring + 1)  # tokens that every query reads
    first = 0 if left is None else max(0, whole - 1 - left) // size
    last = whole // size if left is None else first  # pages from here on go together: rows differ in what they read
    steps = [*range(first, last, WORKSPACE // size), last] if last > first else [first]
    ends = [*steps[1:], -(-behind // size)]
    work = torch.zeros if left is not None else torch.empty  # pages out of the window are not written
    most = max(b - a for a, b in zip(steps, ends, strict=True)) * size
    keys, values = work(2, 1, most, q.shape[1] // impl.group, q.shape[2], dtype=q.dtype, device=q.device)
    for a, b in zip(steps, ends, strict=True):
        dequantize_pages(buf, page, a, b, keys.transpose(1, 2), values.transpose(1, 2))
        if a * size < sinks:
            n = min(sinks, b * size) - a * size
            keys[0, :n] = buf.sink_k[0, :, a * size : a * size + n].transpose(0, 1)
            values[0, :n] = buf.sink_v[0, :, a * size : a * size + n].transpose(0, 1)
        n = min(b * size, behind) - a * size
        yield flash(impl, q, keys[0, :n], values[0, :n], b == ends[-1], left)
