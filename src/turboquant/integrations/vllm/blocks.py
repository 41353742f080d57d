"""Blocks of vLLM's pool: how many bytes a KV head has in one, and where the 16-bit tail stands in it.

vLLM manages one pool of equal blocks. A block holds either one page, or `tokens` tokens of the tail: their keys and
values in the model's dtype, their reader samples, and a share of the tracker state after the page they belong to. What
a request needs to go on is thus in blocks that vLLM keeps, shares, evicts and copies like any others.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm

import torch
from torch import Tensor

from turboquant.packed.buffers import READER_STRIDE, CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe

SLACK = 1.05  # a page may be padded by so much for a tail block to hold twice the tokens
PARTS = ("k", "v", "readers", "tracker")


@dataclass(frozen=True)
class BlockLayout:
    """Sizes of the blocks of one recipe, head_dim and dtype.

    Raises:
        RecipeError: a head_dim that the codec cannot take.
    """

    kv: KVRecipe
    head_dim: int
    dtype: torch.dtype

    def tail_bytes(self, tokens: int) -> int:
        """Bytes that so many tokens of the tail need per KV head."""
        return sum(self._sizes(tokens))

    def _sizes(self, tokens: int) -> tuple[int, int, int, int]:
        d, item = self.head_dim, self.dtype.itemsize
        share = -(-3 * d * tokens // self.kv.page)  # numbers of the tracker state
        rows = tokens * d * item
        readers = -(-tokens // READER_STRIDE * d * item // 4) * 4  # the fp32 share after them is aligned
        return rows, rows, readers, share * 4

    @cached_property
    def tokens(self) -> int:
        """Tokens of a tail block: 8·2^i, dividing the page, as many as fit where a page fits."""
        room = PageLayout(self.kv, self.head_dim).page_bytes * SLACK
        fits = READER_STRIDE
        while self.kv.page % (2 * fits) == 0 and self.tail_bytes(2 * fits) <= room:
            fits *= 2
        return fits

    @cached_property
    def row(self) -> int:
        """Bytes of one KV head in a block, a whole number a token: vLLM multiplies that to fit the blocks of others."""
        most = max(PageLayout(self.kv, self.head_dim).page_bytes, self.tail_bytes(self.tokens))
        unit = lcm(16, self.kv.page)
        return -(-most // unit) * unit

    @property
    def window(self) -> int:
        """Newest tokens whose tail must be there: the ring, or the open page and the one before (tracker state)."""
        return max(self.kv.ring, 2 * self.kv.page)

    @property
    def sink_blocks(self) -> int:
        """Tail blocks at the beginning of a sequence that are kept."""
        return -(-self.kv.sinks // self.tokens)

    def page(self, row: int) -> PageLayout:
        """Layout of a page in rows of `row` bytes."""
        return PageLayout(self.kv, self.head_dim, row)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Parts of tail blocks.

        Args:
            rows: (N, H, row) uint8, rows contiguous.

        Returns:
            k, v (N, H, tokens, d), readers (N, H, samples, d) in the dtype, tracker (N, H, share) fp32: views.
        """
        out, at = {}, 0
        for name, size in zip(PARTS, self._sizes(self.tokens), strict=True):
            part = rows[..., at : at + size]
            at += size
            if name == "tracker":
                out[name] = part.view(torch.float32)
            else:
                n = self.tokens // READER_STRIDE if name == "readers" else self.tokens
                out[name] = part[..., : n * self.head_dim * self.dtype.itemsize].view(self.dtype).unflatten(-1, (n, -1))
        return out

    def buffers(self, pages: Tensor, table: Tensor, length: Tensor) -> CacheBuffers:
        """Zeroed buffers of len(table) sequences around a page pool."""
        specs = CacheBuffers.specs(self.page(pages.shape[2]), len(table), pages.shape[1], self.dtype)
        given = {"pages": pages, "table": table, "length": length.clone()}  # append counts in it
        new = {n: torch.zeros(s, dtype=t, device=pages.device) for n, (s, t) in specs.items() if n not in given}
        return CacheBuffers(**given, **new)
