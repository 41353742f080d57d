"""LayerCache: the live cache of one attention layer. Allocates and indexes; the ops do the arithmetic.

Pages are immutable once written, so sequences may share them (beam search): reordering permutes the page table, and a
page is free again when no sequence names it.
"""

import warnings

import torch
from torch import Tensor

from turboquant.kernels import ops
from turboquant.layers.rewind import rewind
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe


class CacheError(ValueError):
    """The cache was asked for something it cannot do; the message says what and why."""


class LayerCache:
    """Keys and values of one layer for a batch of sequences.

    Args:
        kv: the recipe.
        window: sliding window of the layer in tokens (a query reads itself and window-1 before), None for all.

    Attributes:
        lengths: real tokens of each sequence (padding does not count).
        columns: columns seen, padding included: what transformers calls the sequence length.
    """

    def __init__(self, kv: KVRecipe, window: int | None = None) -> None:
        self.kv, self.window = kv, window
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        self.buf: CacheBuffers | None = None
        self.layout: PageLayout | None = None
        self.lengths: list[int] = []
        self.columns = 0
        self._pages: list[list[int]] = []  # host copy of the table: page ids of each sequence, -1 once released
        self._free: list[int] = []

    def _start(self, k: Tensor) -> None:
        b, h, _, d = k.shape
        self.layout = PageLayout(self.kv, d)
        specs = CacheBuffers.specs(self.layout, b, h, k.dtype)
        self.buf = CacheBuffers(**{n: torch.zeros(s, dtype=t, device=k.device) for n, (s, t) in specs.items()})
        self.lengths, self._pages = [0] * b, [[] for _ in range(b)]

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor | None = None,
        mask: Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        row_exact: bool = False,
    ) -> Tensor:
        """Attend with a chunk's queries, then add its keys and values.

        Args:
            q: (B, Hq, n, d); k, v: (B, H, n, d), rotary embedding applied.
            valid, mask, scaling, softcap, sink_logits: see `kernels.reference.cache_attention`.
            row_exact: every row reads what it would read if the tokens came one by one (as a decode step does),
                instead of reading the whole chunk in 16 bit. Chunks of up to rewind+1 tokens always do.

        Returns:
            (B, Hq, n, d) in q's dtype.

        Raises:
            CacheError: shapes that do not fit the cache.
        """
        self._check(q, k, v)
        if self.buf is None:
            self._start(k)
        assert self.buf is not None and self.layout is not None
        n = k.shape[2]
        size = self.kv.chunk if row_exact or n <= self.kv.rewind + 1 else n
        out = []
        for i in range(0, n, size):
            part = slice(i, i + size)
            qi, ki, vi = q[:, :, part], k[:, :, part], v[:, :, part]
            some = None if valid is None else valid[:, part]
            kwargs = dict(scaling=scaling, window=self.window, softcap=softcap, sink_logits=sink_logits)
            m = None if mask is None else mask[:, :, part, part]
            out.append(ops.cache_attention(self.buf, self.layout, qi, ki, vi, some, m, **kwargs))
            counts = [ki.shape[2]] * len(self.lengths) if some is None else some.sum(1).tolist()
            self._reserve(counts)
            ops.cache_append(self.buf, self.layout, qi, ki, vi, some)
            self.lengths = [a + c for a, c in zip(self.lengths, counts, strict=True)]
            self.columns += ki.shape[2]
            self._release()
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if k.shape != v.shape:
            raise CacheError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ in shape: not supported")
        if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1] or q.shape[2] != k.shape[2]:
            raise CacheError(f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)}")
        if self.buf is not None:
            have, got = self.buf.ring_k, k
            if (have.shape[0], have.shape[1], have.shape[3]) != (got.shape[0], got.shape[1], got.shape[3]):
                raise CacheError(
                    f"the cache holds {have.shape[0]} sequences of {have.shape[1]} heads with head_dim "
                    f"{have.shape[3]}, got {got.shape[0]} of {got.shape[1]} with {got.shape[3]}"
                )
            if have.dtype != got.dtype:
                raise CacheError(f"the cache holds {have.dtype}, got {got.dtype}")

    def _reserve(self, counts: list[int]) -> None:
        """Give every page that the next `counts` tokens complete a place in the pool and the table."""
        assert self.buf is not None
        buf, size = self.buf, self.kv.page
        missing = [(n + c) // size - len(p) for n, c, p in zip(self.lengths, counts, self._pages, strict=True)]
        need = sum(missing)
        if need == 0:
            return
        if need > len(self._free):
            have = buf.pages.shape[0]
            grow = max(need - len(self._free), have // 8)
            buf.pages = torch.cat([buf.pages, buf.pages.new_empty(grow, *buf.pages.shape[1:])])
            self._free.extend(range(have, have + grow))
        for pages, m in zip(self._pages, missing, strict=True):
            pages.extend(self._free.pop() for _ in range(m))
        self._write_table()

    def _write_table(self) -> None:
        assert self.buf is not None
        width = max(map(len, self._pages), default=0)
        rows = [p + [-1] * (width - len(p)) for p in self._pages]
        self.buf.table = torch.tensor(rows, dtype=torch.int32, device=self.buf.table.device).view(len(rows), width)

    def _release(self) -> None:
        """Free pages that no query can reach any more: those behind the sliding window (and what crop takes back)."""
        if self.window is None:
            return
        gone = False
        for n, pages in zip(self.lengths, self._pages, strict=True):
            dead = max(0, n - self.window - self.kv.rewind) // self.kv.page
            for i in range(min(dead, len(pages)) - 1, -1, -1):
                if pages[i] < 0:
                    break
                pages[i], gone = -1, True
        if gone:
            self._collect()

    def _collect(self) -> None:
        assert self.buf is not None
        used = {i for pages in self._pages for i in pages if i >= 0}
        self._free = [i for i in range(self.buf.pages.shape[0] - 1, -1, -1) if i not in used]
        self._write_table()

    def take_rows(self, index: Tensor) -> None:
        """Keep sequences `index` (any order, repeats allowed): beam reordering, selection and repetition."""
        if self.buf is None:
            return
        rows = index.tolist()
        index = index.to(self.buf.length.device)
        for name in ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker", "length", "nonfinite"):
            setattr(self.buf, name, getattr(self.buf, name).index_select(0, index))
        self.lengths = [self.lengths[r] for r in rows]
        self._pages = [list(self._pages[r]) for r in rows]
        self._collect()

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` columns of every sequence.

        Up to the recipe's `rewind` the cache is afterwards what it was before they came. Beyond, tokens that have
        left the ring come back as their codes decode (one warning says so).

        Raises:
            CacheError: more than there is, or beyond what a sliding-window layer still holds.
        """
        if tokens == 0 or self.buf is None:
            return
        if tokens < 0 or tokens > min(self.lengths, default=0):
            raise CacheError(f"cannot take back {tokens} tokens: the sequences hold {self.lengths}")
        if tokens > self.kv.rewind:
            if any(-1 in pages for pages in self._pages):
                raise CacheError(
                    f"cannot take back {tokens} tokens from a sliding-window layer that has released pages: at most "
                    f"rewind={self.kv.rewind} (a recipe option)"
                )
            warnings.warn(
                f"taking back {tokens} tokens, more than rewind={self.kv.rewind}: tokens that have left the 16-bit "
                "ring return as decoded from their pages",
                stacklevel=2,
            )
            assert self.layout is not None
            rewind(self.buf, self.layout, self.lengths, tokens)
        self.lengths = [n - tokens for n in self.lengths]
        self.buf.length -= tokens
        self.columns -= tokens
        self._pages = [p[: n // self.kv.page] for p, n in zip(self._pages, self.lengths, strict=True)]
        self._collect()

    def nbytes(self) -> dict[str, int]:
        """Allocated bytes by part: {"pages", "ring", "state"}."""
        return self.buf.nbytes() if self.buf is not None else {"pages": 0, "ring": 0, "state": 0}

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Everything as contiguous tensors and plain values, unused pages left out."""
        if self.buf is None:
            return {}, {"columns": 0}
        used = list(dict.fromkeys(i for pages in self._pages for i in pages if i >= 0))
        place = {i: at for at, i in enumerate(used)}
        tensors = {n: getattr(self.buf, n).contiguous() for n in CacheBuffers.__dataclass_fields__ if n != "table"}
        tensors["pages"] = self.buf.pages[used]
        table = [[place.get(i, -1) for i in pages] for pages in self._pages]
        return tensors, {"columns": self.columns, "lengths": self.lengths, "table": table}

    def load(self, tensors: dict[str, Tensor], values: dict[str, object]) -> None:
        """Inverse of `state`; the caller has checked names, shapes and dtypes."""
        self.reset()
        if not tensors:
            return
        self.columns = int(values["columns"])  # type: ignore[call-overload]
        self.lengths = list(values["lengths"])  # type: ignore[call-overload]
        self._pages = [list(p) for p in values["table"]]  # type: ignore[attr-defined]
        empty = torch.empty(0, 0, dtype=torch.int32, device=tensors["length"].device)
        self.buf = CacheBuffers(table=empty, **tensors)
        self.layout = PageLayout(self.kv, self.buf.ring_k.shape[-1])
        self._collect()
