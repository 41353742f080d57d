"""Attention over our pages and the tail, as vLLM calls it: metadata, implementation, backend.

One page is one block; everything else a request needs stands in the blocks of the tail (tail.py), so nothing here
outlives a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.device import Step, graphs, kept, run, serves
from turboquant.integrations.vllm.plan import Call
from turboquant.integrations.vllm.prompt import workspace
from turboquant.integrations.vllm.tail import Tail, expand, layouts, pool
from turboquant.kernels import ops
from turboquant.maths.tracker import DRIFT, ChannelStats, ChannelTracker
from turboquant.packed.buffers import STATES, CacheBuffers

TAIL = ".tail"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class TurboQuantImpl(AttentionImpl):
    """Attention over pages and tail.

    Attributes:
        nonfinite: () int64, tokens that arrived with a NaN or an infinity.
        alarms: () int64, pages of a KV head that drifted: coded with the statistics before them, their logits would
            err DRIFT times as much as with their own (`ChannelTracker.misfit`).
    """

    def __init__(self, layer: Any, was: Any, prefix: str, layout: BlockLayout, tail: Tail) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.scale, self.softcap = float(was.scale), float(was.logits_soft_cap or 0) or None
        self.window: int | None = layer.sliding_window
        self.sinks: Tensor | None = was.sinks if layer.has_sink else None
        self.kv_cache_dtype = layer.kv_cache_dtype
        self.prefix, self.layout, self.tail = prefix, layout, tail
        self.nonfinite, self.alarms = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        self.group = self.num_heads // self.num_kv_heads

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: "Pages | None",
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's tokens, and their way into the cache.

        Args:
            query: (T, Hq, d), key, value: (T, H, d), rotary embedding applied.
            kv_cache: (B, H, k, row) uint8, see `pool`.
            output: (T, Hq, d), written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("turboquant attention gives no quantized outputs")
        if self.nonfinite.device != query.device:
            self.nonfinite, self.alarms = self.nonfinite.to(query.device), self.alarms.to(query.device)
        if attn_metadata is None:  # vLLM measures memory
            if serves(self.layout, query.device):
                tokens = workspace(self.layout.kv, self.window, len(key))
                torch.empty(2, tokens, *key.shape[1:], dtype=key.dtype, device=key.device)
            return output.fill_(0)
        work = self._calls()
        if isinstance(work, Step):
            run(self, work, pool(kv_cache), attn_metadata.table, query, key, value, output)
        else:
            self.step(work, attn_metadata, query, key, value, kv_cache, output)
        return output

    def step(
        self,
        calls: Sequence[Call],
        metadata: "Pages",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        output: Tensor,
    ) -> None:
        """`forward`, given the calls of the step."""
        pages = pool(kv_cache)
        page = self.layout.page(pages.shape[2])
        args = (None, None, self.scale, self.window, self.softcap, self.sinks)
        for i, call in enumerate(calls):
            q, k, v = (x[call.tokens].transpose(1, 2) for x in (query, key, value))
            if not call.chained:
                buf = self.tail.gather(call, pages, metadata.of(i, call))
            out = ops.cache_attention(buf, page, q, k, v, *args)
            ops.cache_append(buf, page, q, k, v, None)
            self.tail.scatter(call, buf, k, v)
            self.nonfinite += buf.nonfinite.sum()
            buf.nonfinite.zero_()
            self._watch(call, buf)
            output[call.tokens] = out.transpose(1, 2).to(output.dtype)

    def _watch(self, call: Call, buf: CacheBuffers) -> None:
        """Count the pages that a call has completed and that drifted."""
        row, slot, _ = call.states
        kv = self.layout.kv
        if kv.codec != "live" or not len(row):
            return
        before, after = (ChannelStats.unstack(buf.tracker[row, s]) for s in ((slot - 1) % STATES, slot))
        misfit = ChannelTracker.misfit(before, after, kv.decay, kv.hot_channels(self.layout.head_dim))
        self.alarms += (misfit >= DRIFT).sum()

    def _calls(self) -> Any:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            raise NotImplementedError("turboquant attention takes a step whole, not in microbatches")
        return metadata[self.prefix + TAIL]


class Pages:
    """Metadata of a layer's pages: vLLM's block table (R, M) int32, -1 where it has none."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self._of: dict[int, Tensor] = {}

    def of(self, number: int, call: Any) -> Tensor:
        """(G, M) int32 of the rows of a step's call."""
        if number not in self._of:
            self._of[number] = self.table[call.rows, : call.columns].contiguous()
        return self._of[number]


class PagesBuilder(AttentionMetadataBuilder[Pages]):
    """Metadata of the pages."""

    layout: BlockLayout

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.most = vllm_config.scheduler_config.max_num_seqs
        self.table = torch.zeros(0, 0, dtype=torch.int32, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        return graphs(cls.layout, vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Pages:
        page = self.kv_cache_spec.tokens_per_state
        table = expand(common_attn_metadata.block_table_tensor, self.kv_cache_spec.block_size // page)
        self.table = kept(self.table, table, self.most, -1)
        return Pages(self.table[: len(table)])


@lru_cache(maxsize=256)
def backend(layout: BlockLayout) -> type[AttentionBackend]:
    """The backend of layers of a layout. vLLM tells backends apart by name."""
    name = f"TurboQuant[{layout.kv.name},{layout.head_dim},{layout.dtype}]"
    builder = type(name + "Builder", (PagesBuilder,), {"layout": layout})
    return type(name, (TurboQuantBackend,), {"layout": layout, "builder": builder})


class TurboQuantBackend(AttentionBackend):
    """What vLLM asks about our pages."""

    layout: BlockLayout
    builder: type[PagesBuilder]
    accept_output_buffer = True
    supported_dtypes = list(FLOATS)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        return TurboQuantImpl

    @classmethod
    def get_builder_cls(cls) -> Any:
        return cls.builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(cls.layout.kv.page)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """vLLM's spec of the layer with our page as the block."""
        page = cls.layout.kv.page
        if spec.block_size == 1:  # vLLM asks what a token takes
            return replace(spec, dtype=torch.uint8, state_content_bytes=cls.layout.row // page)
        return replace(
            spec, block_size=page, tokens_per_state=page, dtype=torch.uint8, state_content_bytes=cls.layout.row
        )

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return layouts()

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
