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
        capacity: None to grow as tokens come. A number reserves pages for so many tokens a sequence at the first step
            ("static"): from then on a step without `valid` allocates nothing but its output and reads nothing back
            from the device, so it can be captured in a CUDA graph (see `advance`). Pages behind a sliding window are
            kept.

    Attributes:
        lengths: real tokens of each sequence (padding does not count).
        columns: columns seen, padding included: what transformers calls the sequence length.

    `_reach` is the furthest position whose ring slot has been written: the ring holds the positions from
    `_reach - slots` on, however often `crop` has gone back since.
    """

    def __init__(self, kv: KVRecipe, window: int | None = None, capacity: int | None = None) -> None:
        self.kv, self.window, self.capacity = kv, window, capacity
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        self.buf: CacheBuffers | None = None
        self.layout: PageLayout | None = None
        self.lengths: list[int] = []
        self.columns = 0
        self._held: list[list[int]] = []  # host copy of the table: page ids of each sequence, -1 once released
        self._free: list[int] = []
        self._reach: list[int] = []
        self._released: list[int] = []  # pages of each sequence that have fallen out of the window
        self._padding: list[list[list[int]]] = []  # [first, last + 1) column runs of padding of each sequence

    @property
    def _pages(self) -> list[list[int]]:
        """Page ids of each sequence. Of a static cache its lengths tell: no step may keep a list that grows, for which
        torch.compile would compile it anew."""
        if self.capacity is None:
            return self._held
        own = self.capacity // self.kv.page
        return [list(range(row * own, row * own + n // self.kv.page)) for row, n in enumerate(self.lengths)]

    def _start(self, k: Tensor) -> None:
        b, h, _, d = k.shape
        self.layout = PageLayout(self.kv, d)
        own = (self.capacity or 0) // self.kv.page  # pages reserved for each sequence, one after the other
        specs = CacheBuffers.specs(self.layout, b, h, k.dtype, b * own, own)
        self.buf = CacheBuffers(**{n: torch.zeros(s, dtype=t, device=k.device) for n, (s, t) in specs.items()})
        if own:
            self.buf.table.copy_(torch.arange(b * own).view(b, own))
        self.lengths, self._reach, self._released = [0] * b, [0] * b, [0] * b
        self._held, self._padding = [[] for _ in range(b)], [[] for _ in range(b)]

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
            CacheError: shapes that do not fit the cache, or more tokens than its capacity.
        """
        self._check(q, k, v)
        if self.buf is None:
            self._start(k)
        assert self.buf is not None and self.layout is not None
        n = k.shape[2]
        if n == 0:
            return torch.empty_like(q)
        size = self.kv.chunk if row_exact or n <= self.kv.rewind + 1 else n
        out = []
        for i in range(0, n, size):
            qi, ki, vi, some, m = q, k, v, valid, mask
            if size < n:
                part = slice(i, i + size)
                qi, ki, vi = q[:, :, part], k[:, :, part], v[:, :, part]
                some = None if valid is None else valid[:, part]
                m = None if mask is None else mask[:, :, part, part]
            args = (qi, ki, vi, some, m, scaling, self.window, softcap, sink_logits)
            out.append(ops.cache_attention(self.buf, self.layout, *args))
            counts = [ki.shape[2]] * len(self.lengths) if some is None else some.sum(1).tolist()
            self._reserve(counts)
            ops.cache_append(self.buf, self.layout, qi, ki, vi, some)
            if some is not None:
                self._note_padding(some)
            self._came(counts, ki.shape[2])
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def _came(self, counts: list[int], columns: int) -> None:
        self.lengths = [a + c for a, c in zip(self.lengths, counts, strict=True)]
        self._reach = [max(r, a) for r, a in zip(self._reach, self.lengths, strict=True)]
        self.columns += columns
        self._release()

    def extend(self, tokens: int) -> None:
        """Make room for tokens of every sequence and count them: a call adds them that does what `step` does.

        Raises:
            CacheError: they are more than the capacity.
        """
        counts = [tokens] * len(self.lengths)
        self._reserve(counts)
        self._came(counts, tokens)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in every sequence: a captured step has been replayed, which no code here sees.

        During capture `step` counts its tokens, though the device has done nothing yet: `advance(-tokens)` undoes that.

        Raises:
            CacheError: the cache is not static, or empty, or its capacity is exceeded.
        """
        if self.capacity is None or self.buf is None:
            raise CacheError("advance is for a static cache (capacity=...) that has seen a step")
        self._reserve([tokens] * len(self.lengths))
        self.lengths = [n + tokens for n in self.lengths]
        self._reach = [max(r, n) if tokens > 0 else n for r, n in zip(self._reach, self.lengths, strict=True)]
        self.columns += tokens

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

    def _note_padding(self, valid: Tensor) -> None:
        for runs, row in zip(self._padding, valid.tolist(), strict=True):
            for column in (self.columns + i for i, real in enumerate(row) if not real):
                if runs and runs[-1][1] == column:
                    runs[-1][1] += 1
                else:
                    runs.append([column, column + 1])

    def _out_of_window(self, tokens: int) -> int:
        """Pages of a sequence of `tokens` that no query can reach any more, whatever `crop` takes back."""
        return 0 if self.window is None else max(0, tokens - self.window - self.kv.rewind) // self.kv.page

    def _reserve(self, counts: list[int]) -> None:
        """Give every page that the next `counts` tokens complete a place in the pool and the table.

        Pages that will be out of the window by then get -1 and are not stored.
        """
        assert self.buf is not None
        buf, size = self.buf, self.kv.page
        if self.capacity is not None:
            longest = max(n + c for n, c in zip(self.lengths, counts, strict=True))
            if longest > self.capacity:
                raise CacheError(f"{longest} tokens are more than the cache's capacity of {self.capacity}")
            return
        wanted = []
        for n, c, pages in zip(self.lengths, counts, self._pages, strict=True):
            dead = self._out_of_window(n + c)
            wanted.append([i >= dead for i in range(len(pages), (n + c) // size)])
        if not any(wanted):
            return
        need = sum(map(sum, wanted))
        if need > len(self._free):
            have = buf.pages.shape[0]
            grow = max(need - len(self._free), have // 8)
            buf.pages = torch.cat([buf.pages, buf.pages.new_empty(grow, *buf.pages.shape[1:])])
            self._free.extend(range(have, have + grow))
        for pages, want in zip(self._pages, wanted, strict=True):
            pages.extend(self._free.pop() if w else -1 for w in want)
        self._write_table()

    def _write_table(self) -> None:
        assert self.buf is not None
        width = max(map(len, self._pages), default=0)
        rows = [p + [-1] * (width - len(p)) for p in self._pages]
        self.buf.table = torch.tensor(rows, dtype=torch.int32, device=self.buf.table.device).view(len(rows), width)

    def _release(self) -> None:
        """Free the pages behind the sliding window."""
        if self.capacity is not None:
            return
        gone = False
        for row, pages in enumerate(self._pages):
            dead = min(self._out_of_window(self.lengths[row]), len(pages))
            for i in range(self._released[row], dead):
                gone, pages[i] = gone or pages[i] >= 0, -1
            self._released[row] = max(self._released[row], dead)
        if gone:
            self._collect()

    def _collect(self) -> None:
        assert self.buf is not None
        if self.capacity is not None:
            return
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
        self._reach, self._released = [self._reach[r] for r in rows], [self._released[r] for r in rows]
        self._padding = [[list(run) for run in self._padding[r]] for r in rows]
        if self.capacity is not None:  # every sequence has pages of its own
            own = self.capacity // self.kv.page
            self.buf.pages = self.buf.pages.unflatten(0, self.buf.table.shape).index_select(0, index).flatten(0, 1)
            self.buf.table = torch.arange(len(rows) * own, dtype=torch.int32, device=index.device).view(len(rows), own)
            return
        self._held = [list(self._held[r]) for r in rows]
        self._collect()

    def check_crop(self, columns: int) -> list[int]:
        """The real tokens of each sequence among its last `columns`.

        Raises:
            CacheError: as `crop`, which this refuses beforehand.
        """
        if not 0 <= columns <= self.columns:
            raise CacheError(f"cannot take back {columns} columns: the cache holds {self.columns}")
        start = self.columns - columns
        tokens = [columns - sum(max(0, b - max(a, start)) for a, b in runs) for runs in self._padding]
        for reach, n, t, pages in zip(self._reach, self.lengths, tokens, self._pages, strict=True):
            if reach - n + t > self.kv.rewind and -1 in pages:
                raise CacheError(
                    f"cannot take back {columns} tokens from a sliding-window layer that has released pages: at most "
                    f"rewind={self.kv.rewind} (a recipe option)"
                )
        return tokens

    def crop(self, columns: int) -> None:
        """Take back the last `columns` columns of every sequence, and the tokens that stood in them.

        Up to the recipe's `rewind` tokens behind the furthest one ever held, the cache is afterwards what it was before
        they came. Beyond, tokens that have left the ring come back as their codes decode (one warning says so).

        Raises:
            CacheError: more than there is, or beyond what a sliding-window layer still holds. Nothing is changed then.
        """
        if columns == 0 or self.buf is None:
            return
        tokens = self.check_crop(columns)
        new = [n - t for n, t in zip(self.lengths, tokens, strict=True)]
        if any(r - n > self.kv.rewind and t for r, n, t in zip(self._reach, new, tokens, strict=True)):
            warnings.warn(
                f"taking back {columns} tokens, more than rewind={self.kv.rewind} behind the furthest one: tokens that "
                "have left the 16-bit ring return as decoded from their pages",
                stacklevel=2,
            )
            assert self.layout is not None
            self._reach = rewind(self.buf, self.layout, self._reach, new, self._pages)
        self.truncate(new, self.columns - columns)

    def truncate(self, lengths: list[int], columns: int) -> None:
        """Forget what came behind `lengths` tokens of the sequences, in `columns` columns: at most `rewind` tokens
        behind the furthest ones ever held. Whatever broke off the step that added them, this may be repeated."""
        assert self.buf is not None
        self.lengths, self.columns = lengths, columns
        self.buf.length.copy_(torch.tensor(lengths))
        if self.capacity is None:
            self._held = [p[: n // self.kv.page] for p, n in zip(self._held, lengths, strict=True)]
        self._padding = [[[a, min(b, columns)] for a, b in runs if a < columns] for runs in self._padding]
        self._released = [min(r, len(p)) for r, p in zip(self._released, self._pages, strict=True)]
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
        values = {"columns": self.columns, "lengths": self.lengths, "table": table}
        return tensors, values | {"reach": self._reach, "padding": self._padding}

    def load(self, tensors: dict[str, Tensor], values: dict[str, object]) -> None:
        """Inverse of `state`; the caller has checked names, shapes and dtypes."""
        if self.capacity is not None:
            raise CacheError("a saved cache is loaded into one that grows, not into one of fixed capacity")
        self.reset()
        if not tensors:
            return
        self.columns = int(values["columns"])  # type: ignore[call-overload]
        self.lengths = list(values["lengths"])  # type: ignore[call-overload]
        self._held = [list(p) for p in values["table"]]  # type: ignore[attr-defined]
        self._reach, self._padding = list(values["reach"]), list(values["padding"])  # type: ignore[call-overload]
        self._released = [next((i for i, p in enumerate(pages) if p >= 0), len(pages)) for pages in self._pages]
        empty = torch.empty(0, 0, dtype=torch.int32, device=tensors["length"].device)
        self.buf = CacheBuffers(table=empty, **tensors)
        self.layout = PageLayout(self.kv, self.buf.ring_k.shape[-1])
        self._collect()
