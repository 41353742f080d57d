"""CacheBuffers: the tensors of one layer's cache, as every backend sees them. A plain container, no behaviour.

B sequences, H key/value heads, d head_dim, P tokens a page. Token positions count the real tokens of a sequence from
0; padding has no position. Position p lives in ring slot p mod C; reader sample j (the RMS of the queries of one KV
head at position 8·j+7) in slot j mod J.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe

READER_STRIDE = 8  # every 8th token's queries are sampled for the reader power
STATES = 2  # tracker states kept at least: after the last page and after the one before (for crop)


def reader_slots(kv: KVRecipe) -> int:
    """J, the reader samples of a sequence that are kept: those of a page that completes, and of what `rewind` takes
    back.
    """
    return (kv.page + kv.rewind) // READER_STRIDE + 1


@dataclass
class CacheBuffers:
    """One layer's cache.

    Attributes:
        pages: (N, H, page_bytes) uint8, the page pool.
        table: (B, M) int32, page ids of each sequence in order; -1 where a sequence has no (or no longer a) page.
        ring_k, ring_v: (B, H, C, d) in the model's dtype.
        sink_k, sink_v: (B, H, S, d) in the model's dtype.
        readers: (B, H, J, d) in the model's dtype.
        tracker: (B, T, H, 3, d) fp32, T ≥ STATES; the state after page p in slot p mod T.
        length: (B,) int64 tokens of each sequence.
        nonfinite: (B,) int64 tokens that arrived with a NaN or an infinity.
    """

    pages: Tensor
    table: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    readers: Tensor
    tracker: Tensor
    length: Tensor
    nonfinite: Tensor

    @staticmethod
    def specs(
        layout: PageLayout,
        batch: int,
        kv_heads: int,
        dtype: torch.dtype,
        pages: int = 0,
        columns: int = 0,
        states: int = STATES,
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, for a pool of `pages`, a table of `columns` and `states` of the tracker."""
        kv, b, h, d = layout.kv, batch, kv_heads, layout.head_dim
        return {
            "pages": ((pages, h, layout.page_bytes), torch.uint8),
            "table": ((b, columns), torch.int32),
            "ring_k": ((b, h, kv.ring_slots, d), dtype),
            "ring_v": ((b, h, kv.ring_slots, d), dtype),
            "sink_k": ((b, h, kv.sinks, d), dtype),
            "sink_v": ((b, h, kv.sinks, d), dtype),
            "readers": ((b, h, reader_slots(kv), d), dtype),
            "tracker": ((b, states, h, 3, d), torch.float32),
            "length": ((b,), torch.int64),
            "nonfinite": ((b,), torch.int64),
        }

    def nbytes(self) -> dict[str, int]:
        """Allocated bytes: {"pages", "ring", "state"}; ring includes the sinks, state the readers and the tracker."""
        size = {f.name: getattr(self, f.name).nbytes for f in fields(self)}
        ring = sum(size[n] for n in ("ring_k", "ring_v", "sink_k", "sink_v"))
        pages = size["pages"] + size["table"]
        return {"pages": pages, "ring": ring, "state": sum(size.values()) - ring - pages}
