"""A step on a GPU: decoding rows together, positions and block tables on the device; prompts one by one.

Decoding reads nothing back to the host, so vLLM captures it in a CUDA graph: the tensors of a `Step` are the builder's,
at the same place at every step, and every layer's part of the pool stays where it is. A prompt is appended first, in
chunks that end where a prefix hit may, then attended to in one piece (prompt.py).

What a query reads is what `plan` has it read: the newest `ring` tokens and the sinks in 16 bit, the others packed. The
pieces of a plan do not matter for that where the ring holds a page, which is what `refusal` asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.plan import order
from turboquant.integrations.vllm.prompt import Prompt, attend
from turboquant.kernels import ops

DECODE = 8  # most new tokens of a row that goes together with others


def refusal(layout: BlockLayout, device: torch.device) -> str | None:
    """None if steps run on the device, else why `plan` and its calls serve them."""
    if layout.dtype not in (torch.bfloat16, torch.float16):
        return f"a cache in {layout.dtype}"
    if layout.kv.ring < layout.kv.page:
        return f"a ring of {layout.kv.ring} tokens, shorter than a page"
    for op in ops.OPS:
        name, why = ops.choose(op, layout.page(layout.row), device, ops.Chunk(layout.dtype))
        if name not in ("cuda", "triton"):
            return f"{op} runs on {name}: {why}"
    return None


def serves(layout: BlockLayout, device: torch.device) -> bool:
    """Whether steps run on the device; on the CPU only `plan` does."""
    return device.type == "cuda" and refusal(layout, device) is None


def most_tokens(layout: BlockLayout) -> int:
    """Of a decoding row: each of its tokens reads what it would read alone."""
    return min(DECODE, layout.kv.chunk)


def graphs(layout: BlockLayout, config: Any) -> AttentionCGSupport:
    """Which steps vLLM may capture."""
    device = torch.device(config.device_config.device_type)
    if not serves(layout, device):
        return AttentionCGSupport.NEVER
    drafts = getattr(config.speculative_config, "num_speculative_tokens", None) or 0
    if 1 + drafts > most_tokens(layout):
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    return AttentionCGSupport.UNIFORM_BATCH


@dataclass(frozen=True)
class Decode:
    """Rows of equal numbers of new tokens that follow one another. rows, tokens: slices of the step. n: tokens each."""

    rows: slice
    tokens: slice
    n: int


@dataclass
class Step:
    """Metadata of the tail on a GPU.

    Attributes:
        table: (R, M) int32, tail blocks of each request, 0 for none. start: (R,) int64, computed tokens.
        work: what is done, in order.
    """

    table: Tensor
    start: Tensor
    work: list[Decode | Prompt] = field(default_factory=list)


class Steps:
    """Makes the steps of a KV cache group.

    Args:
        layout: of the tails. interval: of the TailSpec. most: requests of a batch.
    """

    def __init__(self, layout: BlockLayout, interval: int, most: int, device: torch.device) -> None:
        self.layout, self.interval, self.device = layout, interval, device
        self.start = torch.zeros(most, dtype=torch.int64, device=device)
        self.table = torch.zeros(0, 0, dtype=torch.int32, device=device)

    def build(self, m: CommonAttentionMetadata, table: Tensor, lengths: Sequence[int] | None) -> Step:
        """The step of a batch.

        Args:
            table: (R, M) tail blocks.
            lengths: of the requests with their new tokens, as the host knows them; None where only the device does.
        """
        counts = m.query_start_loc_cpu.diff().tolist()
        rows = len(counts)
        self.table = kept(self.table, table, len(self.start), 0)
        self.start[:rows] = m.seq_lens[:rows] - m.query_start_loc.diff()[:rows]
        step = Step(self.table[:rows], self.start[:rows])
        runs = self._runs(counts)
        if all(isinstance(run, Decode) for run in runs):
            step.work.extend(runs)
            return step
        if lengths is None:
            lengths = m.seq_lens.tolist()
        starts = [n - c for n, c in zip(lengths, counts, strict=True)]
        after = order(self.layout, starts, counts, table)
        for now in range(max(after) + 1):
            for run in runs:
                some = range(run.rows.start, run.rows.stop) if isinstance(run, Decode) else (run[0],)
                here = [r for r in some if after[r] == now]
                if isinstance(run, Decode) and len(here) == len(some):
                    step.work.append(run)
                elif isinstance(run, Decode):  # one by one: some of them wait for others
                    first = run.tokens.start - run.rows.start * run.n
                    at = lambda r, run=run, first=first: first + r * run.n  # noqa: E731
                    step.work += [Decode(slice(r, r + 1), slice(at(r), at(r) + run.n), run.n) for r in here]
                elif here:
                    row, token = run
                    step.work.append(Prompt.of(self.layout, row, token, starts[row], counts[row], self.interval, self.device))
        return step

    def _runs(self, counts: Sequence[int]) -> list[Any]:
        """Decode for rows of equal counts, (row, first token) for prompts."""
        out: list[Any] = []
        row, token, most = 0, 0, most_tokens(self.layout)
        while row < len(counts):
            n, last = counts[row], row + 1
            if n > most:
                out.append((row, token))
            elif n:
                while last < len(counts) and counts[last] == n:
                    last += 1
                out.append(Decode(slice(row, last), slice(token, token + n * (last - row)), n))
            token += n * (last - row)
            row = last
        return out


def kept(buffer: Tensor, table: Tensor, most: int, none: int) -> Tensor:
    """A table copied to the place where it stood at the step before: the buffer, made anew only if it is too narrow.

    Args:
        most: rows of the buffer. none: what stands for no block.
    """
    rows, width = table.shape
    if buffer.shape[1] != width or len(buffer) < rows:
        buffer = torch.full((max(most, rows), width), none, dtype=torch.int32, device=table.device)
    buffer[:rows] = table if none == 0 else table.masked_fill(table == 0, none)
    return buffer


def run(impl: Any, step: Step, pages: Tensor, page_table: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """A layer's step.

    Args:
        pages: (N, H, row) uint8, the pool. page_table: (R, P) int32, -1 for none.
        q, out: (T, Hq, d), k, v: (T, H, d).
    """
    carrier, page = impl.tail.carrier, impl.layout.page(pages.shape[2])
    for work in step.work:
        if isinstance(work, Prompt):
            x, table = slice(work.row, work.row + 1), slice(work.token, work.token + work.n)
            attend(impl, work, pages, page_table[x], step.table[x], step.start[x], q[table], k[table], v[table], out[table])
            continue
        rows, n = work.rows, work.n
        table, start = step.table[rows], step.start[rows]
        qs, ks, vs = (x[work.tokens].unflatten(0, (-1, n)).transpose(1, 2) for x in (q, k, v))  # (G, heads, n, d)
        carrier.put(table, start, ks, vs)
        buf = carrier.gather(pages, page_table[rows], table, start)
        y = ops.cache_attention(buf, page, qs, ks, vs, None, None, impl.scale, impl.window, impl.softcap, impl.sinks)
        ops.cache_append(buf, page, qs, ks, vs, None)
        carrier.keep(buf, table, start, n, impl.nonfinite)
        out[work.tokens] = y.transpose(1, 2).flatten(0, 1)
