"""One step of vLLM's batch as calls of the cache ops: which rows go together, and where their tail stands.

A request's new tokens are cut where pages end and every `kv.chunk` tokens of a page, at positions of the sequence: what
a query reads, and with what it is added up, depends on its position, never on how the scheduler cut the prompt, nor on
where a prefix hit began. Requests of one piece go together where the pieces are of equal length, so a decode batch is
one call; the pieces of a longer chunk are a chain of calls on the same buffers.

Everything is computed once per step and KV cache group, for all layers of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.packed.buffers import READER_STRIDE, STATES, reader_slots

NULL = 0  # vLLM's null block: outside the window, not kept, or not there yet
Place = tuple[Tensor, Tensor]


@dataclass
class Before:
    """Where the tail of G rows is read, as (block, place).

    Attributes:
        ring, sinks, readers: (G, C), (G, S), (G, J).
        tracker: (row, state slot), each (·,), and blocks (·, page/T) of the state after the last page.
    """

    ring: Place
    sinks: Place
    readers: Place
    tracker: tuple[Tensor, Tensor, Tensor]


@dataclass
class Call:
    """One call of cache_attention and cache_append: G rows of n tokens.

    Attributes:
        rows: (G,) of the batch. start: (G,) int64 tokens before. tokens: (G, n) of the step's tokens.
        chained: the rows are those of the call before, which has left their buffers as they are needed.
        columns: of the page table that the call and the chain after it read or write.
        before: None for sequences at their start, and in a chain.
        new: (row, place in the call), (block, place), each (·,): where tokens go that are kept.
        samples: (row, sample slot), (block, place), each (·,): where new reader samples go.
        states: (row, state slot), each (·,), and blocks (·, page/T): where states after completed pages go.
    """

    rows: Tensor
    start: Tensor
    tokens: Tensor
    chained: bool
    columns: int
    before: Before | None
    new: tuple[Place, Place]
    samples: tuple[Place, Place]
    states: tuple[Tensor, Tensor, Tensor]


def pieces(start: int, count: int, page: int, chunk: int) -> list[tuple[int, int]]:
    """(start, tokens) of the pieces of `count` new tokens after `start`: cut at page ends and every `chunk` of a page.

    >>> pieces(60, 80, page=64, chunk=65)
    [(60, 4), (64, 64), (128, 12)]
    """
    out, end = [], start + count
    while start < end:
        first = start // page * page
        stop = min(end, first + page, first + ((start - first) // chunk + 1) * chunk)
        out.append((start, stop - start))
        start = stop
    return out


def plan(layout: BlockLayout, starts: Sequence[int], counts: Sequence[int], table: Tensor) -> list[Call]:
    """The calls of a step, in order.

    Args:
        starts, counts: computed tokens of each request, and new ones, which follow one another in the step.
        table: (R, M) int, tail blocks of each request; its device is that of the result.
    """
    kv, at = layout.kv, 0
    after = order(layout, starts, counts, table)
    rounds: list[tuple[list[Call], dict[int, list[tuple[int, int, int]]]]] = [([], {}) for _ in range(max(after) + 1)]
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        chains, single = rounds[after[row]]
        some = pieces(start, count, kv.page, kv.chunk)
        if len(some) == 1:
            single.setdefault(count, []).append((row, start, at))
        else:
            for first, n in some:
                chains.append(_call(layout, n, [(row, first, at + first - start)], table, first > start, start + count))
        at += count
    return [c for chains, single in rounds for c in (*chains, *(_call(layout, n, r, table) for n, r in single.items()))]


def order(layout: BlockLayout, starts: Sequence[int], counts: Sequence[int], table: Tensor) -> list[int]:
    """The round of each request: a prefix hit may name blocks that another request of the same step writes.

    A hit ends at a page; whoever writes the tail block before its end in this step goes first.
    """
    page, size = layout.kv.page, layout.tokens
    spans = list(zip(starts, counts, strict=True))
    writers = [r for r, (s, c) in enumerate(spans) if (s + c) // page > s // page]
    readers = [r for r, (s, c) in enumerate(spans) if c and s and s % page == 0]
    out = [0] * len(spans)
    if not writers or not readers:
        return out or [0]
    blocks = table.tolist()
    writer: dict[int, int] = {}
    for r in writers:
        s, c = spans[r]
        writer |= {blocks[r][end // size - 1]: r for end in range((s // page + 1) * page, s + c + 1, page)}
    writer.pop(NULL, None)
    for r in sorted(readers, key=lambda r: starts[r]):
        first = writer.get(blocks[r][starts[r] // size - 1], r)
        if first != r:
            out[r] = out[first] + 1
    return out


def _call(
    layout: BlockLayout, n: int, rows: list[tuple[int, int, int]], table: Tensor, chained: bool = False, end: int = 0
) -> Call:
    kv, size, device = layout.kv, layout.tokens, table.device
    row, start, at = torch.tensor(rows, dtype=torch.int64, device=device).unbind(1)
    table, latest = table[row].long(), max(r[1] for r in rows)
    step = torch.arange(n, device=device)
    new = _where(
        torch.arange(len(rows), device=device)[:, None].expand(-1, n), start[:, None] + step, step, size, table
    )
    sampled = range(READER_STRIDE - 1, max(r[1] for r in rows) + n, READER_STRIDE)
    samples = [(g, i) for g, (_, first, _) in enumerate(rows) for i in sampled if first <= i < first + n]
    who, token = torch.tensor(samples, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    (who, slot), (block, place) = _where(who, token, token // READER_STRIDE % reader_slots(layout.kv), size, table)
    return Call(
        row, start, at[:, None] + step, chained, -(-max(end, latest + n) // kv.page),
        _before(layout, start, rows, table) if latest and not chained else None,
        new, ((who, slot), (block, place // READER_STRIDE)),
        _states(layout, [first + n if (first + n) % kv.page == 0 else 0 for _, first, _ in rows], table),
    )  # fmt: skip


def _where(who: Tensor, position: Tensor, slot: Tensor, size: int, table: Tensor) -> tuple[Place, Place]:
    """(row, slot), (block, place) of the positions that have a block."""
    who, position, slot = (x.flatten() for x in torch.broadcast_tensors(who, position, slot))
    block = table[who, position // size]
    kept = block != NULL
    return (who[kept], slot[kept]), (block[kept], position[kept] % size)


def _before(layout: BlockLayout, start: Tensor, rows: list[tuple[int, int, int]], table: Tensor) -> Before:
    kv, size = layout.kv, layout.tokens
    start = start[:, None]

    def place(position: Tensor, there: Tensor) -> Place:
        column = (position // size).clamp(0, table.shape[1] - 1)
        return table.gather(1, column).where(there, NULL), position % size

    def slots(count: int, newest: Tensor) -> Tensor:  # number in each slot, negative where nothing was written
        return newest - (newest - torch.arange(count, device=start.device)) % count

    ring = slots(kv.ring_slots, start - 1)
    sample = slots(reader_slots(layout.kv), start // READER_STRIDE - 1)
    block, token = place(sample * READER_STRIDE + READER_STRIDE - 1, sample >= 0)
    sinks = torch.arange(kv.sinks, device=start.device).expand(len(rows), -1)
    return Before(
        place(ring, ring >= 0), place(sinks, sinks < start), (block, token // READER_STRIDE),
        _states(layout, [first // kv.page * kv.page for _, first, _ in rows], table),
    )  # fmt: skip


def _states(layout: BlockLayout, ends: list[int], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, state slot, blocks) of the state after the page that ends at each row's token; none for 0."""
    page, size = layout.kv.page, layout.tokens
    some = [(g, t // page - 1) for g, t in enumerate(ends) if t]
    who, number = torch.tensor(some, dtype=torch.int64, device=table.device).view(-1, 2).unbind(1)
    block = number[:, None] * (page // size) + torch.arange(page // size, device=table.device)
    block = table[who].gather(1, block)
    return who, number % STATES, block
