"""One step of vLLM's batch as calls of the cache ops: which rows go together, and where their tail stands.

A request's new tokens are cut where pages end and every `kv.chunk` tokens of a page, at positions of the sequence: what
a query reads, and with what it is added up, depends on its position, never on how the scheduler cut the prompt, nor on
where a prefix hit began. Pieces of equal length of different requests are one call, so a decode batch is one.

Everything is computed once per step and KV cache group, for all layers of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.packed.buffers import READER_STRIDE, STATES

NULL = 0  # vLLM's null block: what is outside the window, or not there yet


@dataclass
class Call:
    """One call of cache_attention and cache_append: G rows of n tokens.

    Attributes:
        rows: (G,) of the batch. start: (G,) int64 tokens before. tokens: (G, n) of the step's tokens.
        pages: columns of the page table that the call reads or writes.
        ring, sinks, readers: (block, place) of what is read, (G, C), (G, S), (G, J); None for sequences at their start.
        tracker: (row, state slot, blocks (·, page/T)) of the state after the last page.
        new: (block, place), (G, n), where the tokens go.
        samples: (row, sample slot, block, place), each (·,), of the new reader samples.
        states: (row, state slot, blocks (·, page/T)) of the pages that the call completes.
    """

    rows: Tensor
    start: Tensor
    tokens: Tensor
    pages: int
    ring: tuple[Tensor, Tensor] | None
    sinks: tuple[Tensor, Tensor] | None
    readers: tuple[Tensor, Tensor] | None
    tracker: tuple[Tensor, Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    samples: tuple[Tensor, Tensor, Tensor, Tensor]
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
    kv, at, rounds = layout.kv, 0, {}
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for k, (first, n) in enumerate(pieces(start, count, kv.page, kv.chunk)):
            rounds.setdefault((k, n), []).append((row, first, at + first - start))
        at += count
    return [_call(layout, n, rows, table) for (_, n), rows in sorted(rounds.items(), key=lambda item: item[0][0])]


def _call(layout: BlockLayout, n: int, rows: list[tuple[int, int, int]], table: Tensor) -> Call:
    kv, size, device = layout.kv, layout.tokens, table.device
    row, start, at = torch.tensor(rows, dtype=torch.int64, device=device).unbind(1)
    table, latest = table[row].long(), max(r[1] for r in rows)
    step = torch.arange(n, device=device)

    def place(position: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        block = table.gather(1, position.clamp_min(0) // size).where(there, NULL)
        return block, position % size

    def slots(count: int, newest: Tensor) -> Tensor:  # number in each slot, negative where nothing was written
        return newest - (newest - torch.arange(count, device=device)) % count

    ring = sinks = readers = None
    if latest:
        position = slots(kv.ring_slots, start[:, None] - 1)
        ring = place(position, position >= 0)
        sample = slots((kv.page + kv.rewind) // READER_STRIDE + 1, start[:, None] // READER_STRIDE - 1)
        block, token = place(sample * READER_STRIDE + READER_STRIDE - 1, sample >= 0)
        readers = block, token // READER_STRIDE
        if kv.sinks:
            position = torch.arange(kv.sinks, device=device).expand(len(rows), -1)
            sinks = place(position, position < start[:, None])

    def states(tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        some = [(g, t // kv.page - 1) for g, t in enumerate(tokens) if t]
        who, page = torch.tensor(some, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        block = page[:, None] * (kv.page // size) + torch.arange(kv.page // size, device=device)
        return who, page % STATES, table[who].gather(1, block)

    position = start[:, None] + step
    new = place(position, position >= 0)
    found = [
        (g, i // READER_STRIDE, i)
        for g, (_, first, _) in enumerate(rows)
        for i in range(first, first + n)
        if i % READER_STRIDE == READER_STRIDE - 1
    ]
    who, sample, token = torch.tensor(found, dtype=torch.int64, device=device).view(-1, 3).unbind(1)
    slot = sample % ((kv.page + kv.rewind) // READER_STRIDE + 1)
    samples = who, slot, table[who, token // size], token % size // READER_STRIDE
    return Call(
        row, start, at[:, None] + step, -(-(latest + n) // kv.page), ring, sinks, readers,
        states([first // kv.page * kv.page for _, first, _ in rows]), new, samples,
        states([first + n if (first + n) % kv.page == 0 else 0 for _, first, _ in rows]),
    )  # fmt: skip
