"""Prompts on a GPU: appended together, each attended to by itself: packed pages through a 16-bit workspace, the newest
tokens as they came.

The query at t reads token j in 16 bit if j > t - R or j is a sink, else packed: two products of vLLM's flash attention
(causal to t - R, with the sinks put into the workspace as they are; a window of R tokens), merged by logsumexp.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, reduce
from itertools import groupby, pairwise, zip_longest
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


@dataclass(frozen=True)
class Prompts:
    """Prompts of rows that follow one another."""

    each: Sequence[Prompt]

    @property
    def rows(self) -> slice:
        return slice(self.each[0].row, self.each[-1].row + 1)

    @property
    def tokens(self) -> slice:
        return slice(self.each[0].token, self.each[-1].token + self.each[-1].n)

    @property
    def own(self) -> list[slice]:
        """Tokens of each of them, from the first's on."""
        return [slice(p.token - self.each[0].token, p.token - self.each[0].token + p.n) for p in self.each]

    def rounds(self) -> Iterator[tuple[slice, list[int], int]]:
        """What is appended at a time, in order: the n tokens from `at` on of each of some of the rows that follow one
        another, as (rows, at, n), both counted from the first's on.

        >>> one, two = (Prompt(i, 7 * i, 0, 7, [(0, 4), (4, 7 - i)], None) for i in range(2))
        >>> list(Prompts([one, two]).rounds())
        [(slice(0, 2, None), [0, 7], 4), (slice(0, 1, None), [4], 3), (slice(1, 2, None), [11], 2)]
        """
        begins = [own.start for own in self.own]
        for chunks in zip_longest(*(p.chunks for p in self.each), fillvalue=(0, 0)):
            row = 0
            for n, same in groupby(last - first for first, last in chunks):
                rows = slice(row, row := row + len(list(same)))
                if n:
                    yield rows, [b + first for b, (first, _) in zip(begins[rows], chunks[rows], strict=True)], n


def grouped(prompts: Sequence[Prompt]) -> list[Prompts]:
    """Those of neighbouring rows together."""
    out: list[list[Prompt]] = []
    for p in prompts:
        if out and out[-1][-1].row + 1 == p.row:
            out[-1].append(p)
        else:
            out.append([p])
    return [Prompts(each) for each in out]


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


def merge(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two parts of one attention, each (n, Hq, d) and logsumexp (Hq, n), as one, into `out` if given; rows without a
    token have -inf.
    """
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    out, lse = torch.empty_like(first[0]) if out is None else out, torch.empty_like(first[1])
    merge_attn_states(out, *first, *second, lse)
    return out, lse


def attend(
    impl: Any, prompts: Prompts, pages: Tensor, page_table: Tensor, table: Tensor, start: Tensor, q: Tensor, k: Tensor,
    v: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Append the tokens of prompts, then attend: q, out (n, Hq, d), k, v (n, H, d), tables and starts of their rows."""
    carrier, page, own = impl.tail.carrier, impl.layout.page(pages.shape[2]), prompts.own
    for i, of in enumerate(own):
        carrier.put(table[i : i + 1], start[i : i + 1], *(x[of].transpose(0, 1)[None] for x in (k, v)))
    rounds = list(prompts.rounds())
    buf = carrier.gather(pages, page_table, table, start, max(n for _, _, n in rounds))
    near = [newest(buf, i, p, k[of], v[of]) for i, (p, of) in enumerate(zip(prompts.each, own, strict=True))]
    for rows, at, n in rounds:
        some = part(buf, rows)
        ops.cache_append(some, page, together(q, at, n), together(k, at, n), together(v, at, n), None)
        carrier.keep(some, table[rows], some.length - n, n, impl.nonfinite, impl.alarms)
        some.nonfinite.zero_()
    for i, (p, of) in enumerate(zip(prompts.each, own, strict=True)):
        one = part(buf, slice(i, i + 1))
        keys, values = near[i]
        attention(impl, p, page, one, q[of].to(impl.layout.dtype), keys, values, out[of])


def newest(buf: CacheBuffers, row: int, prompt: Prompt, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (m + n, H, d) of `prompt.recent` and of the new tokens (n, H, d)."""

    def after(ring: Tensor, new: Tensor) -> Tensor:
        new = new.to(ring.dtype)
        return torch.cat([ring[row].index_select(1, prompt.recent).transpose(0, 1), new]) if len(prompt.recent) else new

    return after(buf.ring_k, k), after(buf.ring_v, v)


def part(buf: CacheBuffers, rows: slice) -> CacheBuffers:
    """The buffers of some rows, which share memory with `buf`."""
    return CacheBuffers(
        pages=buf.pages, **{f.name: getattr(buf, f.name)[rows] for f in fields(CacheBuffers) if f.name != "pages"}
    )


def together(x: Tensor, at: Sequence[int], n: int) -> Tensor:
    """n tokens from each of `at` on, of x (T, heads, d) -> (G, heads, n, d): a view if these are equally far apart."""
    apart = {b - a for a, b in pairwise(at)}
    if len(apart) > 1:
        return torch.stack([x[a : a + n] for a in at]).transpose(1, 2)
    t, h, d = x.stride()
    step = t * max(apart, default=n)
    return x[at[0] :].as_strided((len(at), x.shape[1], n, x.shape[2]), (step, h, t, d))


def attention(
    impl: Any, prompt: Prompt, page: PageLayout, buf: CacheBuffers, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> None:
    """Into `out` (n, Hq, d) of a prompt whose pages are there.

    Args:
        k, v: (m + n, H, d), the tokens of `recent` and the new ones.
    """
    ring, end, window = impl.layout.kv.ring, prompt.start + prompt.n, impl.window
    near = min(ring, window or ring)
    behind = end - ring  # tokens that the last query reads packed
    if behind > 0 and (window is None or window > ring):
        left = None if window is None else window - ring - 1
        first = reduce(merge, history(impl, prompt, page, buf, q, behind, left))  # one at a time, as memory goes
        into = out if out.dtype == q.dtype else None
        found, lse = merge(first, flash(impl, q, k, v, True, near - 1), into)
    else:
        found, lse = flash(impl, q, k, v, True, near - 1)
    if found is not out:
        out.copy_(found)
    if impl.sinks is not None:
        out *= torch.sigmoid(lse.transpose(0, 1) - impl.sinks.float()).unsqueeze(-1).to(out.dtype)


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
