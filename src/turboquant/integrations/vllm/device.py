"""A step on a GPU: decoding rows together, positions and block tables on the device; prompts in chunks.

Decoding reads nothing back to the host, so vLLM captures it in a CUDA graph: the tensors of a `Step` are the builder's,
at the same place at every step, and every layer's part of the pool stays where it is. Prompts are appended first, in
chunks that end where a prefix hit may, then each is attended to in one piece (prompt.py).

What a query reads is what `plan` has it read: the newest `ring` tokens and the sinks in 16 bit, the others packed. The
pieces of a plan do not matter for that where the ring is longer than a page, which is what `obstacle` asks: a row that
begins with a prefix hit may find the hit's last page not packed yet, for another row of the step completes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.plan import order
from turboquant.integrations.vllm.prompt import Prompt, Prompts, attend, grouped
from turboquant.kernels import ops

DECODE = 8  # most new tokens of a row that goes together with others: not above `MAX_TOKENS` of kernels/cuda/attention


def obstacle(layout: BlockLayout, device: torch.device) -> str | None:
    """None if steps run on the device, else why `plan` and its calls serve them."""
    if layout.dtype not in (torch.bfloat16, torch.float16):
        return f"a cache in {layout.dtype}"
    if layout.kv.ring <= layout.kv.page:
        return f"a ring of {layout.kv.ring} tokens, not longer than a page of {layout.kv.page}"
    for op in ops.OPS:
        name, why = ops.choose(op, layout.page(layout.row), device, ops.Chunk(layout.dtype))
        if name not in ("cuda", "triton"):
            return f"{op} runs on {name}: {why}"
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if device.type == "cuda" and get_flash_attn_version(head_size=layout.head_dim) is None:
        return f"vLLM has no flash attention for head_dim {layout.head_dim} here"
    return None


def serves(layout: BlockLayout, device: torch.device) -> bool:
    """Whether steps run on the device; on the CPU only `plan` does."""
    return device.type == "cuda" and obstacle(layout, device) is None


def most_tokens(layout: BlockLayout) -> int:
    """Of a decoding row: each reads what it would read alone, and nothing packed of the page before the row."""
    return min(DECODE, layout.kv.ring - layout.kv.page)


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
class Rows:
    """Requests of equal numbers of new tokens that follow one another, from `row` and `token` of the step on.

    Attributes:
        count: of the rows. n: tokens of each.
    """

    row: int
    token: int
    count: int
    n: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)

    @property
    def tokens(self) -> slice:
        return slice(self.token, self.token + self.count * self.n)

    def each(self) -> "list[Rows]":
        """One by one."""
        return [Rows(self.row + i, self.token + i * self.n, 1, self.n) for i in range(self.count)]


@dataclass
class Step:
    """Metadata of the tail on a GPU.

    Attributes:
        table: (R, M) int32, tail blocks of each request, 0 for none. start: (R,) int64, computed tokens.
        work: what is done, in order.
    """

    table: Tensor
    start: Tensor
    work: list[Rows | Prompts] = field(default_factory=list)


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
        runs, most = rows_of(counts), most_tokens(self.layout)
        if all(run.n <= most for run in runs):
            step.work.extend(runs)
            return step
        if lengths is None:
            lengths = m.seq_lens.tolist()
        starts = [n - c for n, c in zip(lengths, counts, strict=True)]
        after = order(self.layout, starts, counts, table)
        for now in range(max(after) + 1):
            prompts: list[Prompt] = []
            for run in runs:
                here = [one for one in run.each() if after[one.row] == now]
                for some in [run] if len(here) == run.count and run.n <= most else here:
                    if some.n <= most:
                        step.work.append(some)
                        continue
                    at = some.row, some.token, starts[some.row], some.n
                    prompts.append(Prompt.of(self.layout, *at, self.interval, self.device))
            step.work.extend(grouped(prompts))
        return step


def rows_of(counts: Sequence[int]) -> list[Rows]:
    """The requests of a step, those of equal counts together.

    >>> rows_of([1, 1, 5, 0, 0])
    [Rows(row=0, token=0, count=2, n=1), Rows(row=2, token=2, count=1, n=5)]
    """
    out: list[Rows] = []
    row = token = 0
    for n, same in groupby(counts):
        count = len(list(same))
        if n:
            out.append(Rows(row, token, count, n))
        row, token = row + count, token + count * n
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
    for w in step.work:
        if isinstance(w, Rows):  # all of them first: see `carry`
            carrier.put(step.table[w.rows], step.start[w.rows], heads_of(k, w), heads_of(v, w))
    for w in step.work:
        own = w.rows
        page_ids, table, start = page_table[own], step.table[own], step.start[own]
        if isinstance(w, Prompts):
            attend(impl, w, pages, page_ids, table, start, q[w.tokens], k[w.tokens], v[w.tokens], out[w.tokens])
            continue
        args = (heads_of(q, w), heads_of(k, w), heads_of(v, w), None)
        buf = carrier.gather(pages, page_ids, table, start, w.n)
        y = ops.cache_attention(buf, page, *args, None, impl.scale, impl.window, impl.softcap, impl.sinks)
        ops.cache_append(buf, page, *args)
        carrier.keep(buf, table, start, w.n, impl.nonfinite, impl.alarms)
        out[w.tokens] = y.transpose(1, 2).flatten(0, 1)


def heads_of(x: Tensor, work: Rows) -> Tensor:
    """(T, heads, d) -> (G, heads, n, d) of the rows' tokens."""
    return x[work.tokens].unflatten(0, (-1, work.n)).transpose(1, 2)
