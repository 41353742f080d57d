"""The 16-bit tail of a layer: a companion layer whose KV cache vLLM manages, and its way into CacheBuffers and back."""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf

from turboquant.integrations.vllm import metrics
from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.device import Step, Steps, graphs, obstacle, serves
from turboquant.integrations.vllm.plan import NULL, Call, plan
from turboquant.integrations.vllm.spec import TailSpec
from turboquant.packed.buffers import CacheBuffers

INTERVAL = 512  # tokens between the points of a prompt where a prefix hit may end


def interval(cache: Any, page: int) -> int:
    """Tokens between those points, 0 without prefix caching: vLLM's prefix_cache_retention_interval; a page for None.

    For 0, vLLM's default, it is INTERVAL: what prompts share turns out later, when blocks are to be there.
    """
    if not cache.enable_prefix_caching:
        return 0
    asked = cache.prefix_cache_retention_interval
    return page if asked is None else asked or -(-INTERVAL // page) * page


def pool(kv_cache: Tensor) -> Tensor:
    """vLLM's view of a layer's blocks (B, H, k, row), k of ours in each of its, perhaps padded to a common size ->
    (B·k, H, bytes), our blocks one after the other without gaps.

    Raises:
        ValueError: the padding cannot be shared out between the heads.
    """
    n, h, k, _ = kv_cache.shape
    stride = kv_cache.stride(0)
    if stride % (16 * h * k):
        raise ValueError(f"blocks of {stride} bytes do not give {h} heads {k} whole 16-byte rows each")
    row = stride // (h * k)
    return kv_cache.as_strided((n * k, h, row), (h * row, row, 1))


def expand(table: Tensor, k: int) -> Tensor:
    """Block table (R, M) of vLLM's blocks -> (R, M·k) of ours; null stays null."""
    if k == 1:
        return table
    ids = table.unsqueeze(-1)
    return torch.where(ids == NULL, NULL, ids * k + torch.arange(k, device=table.device, dtype=table.dtype)).flatten(1)


class Tail(AttentionLayerBase):
    """The companion "NAME.tail" of an attention layer NAME.

    Attributes:
        kv_cache: (B, H, k, row) uint8, every block of the pool, bound by vLLM.
        carrier: what steps on the device (device.py) go through; None where the calls of `plan` run.
    """

    def __init__(self, layout: BlockLayout, kv_heads: int, check: Callable[[Any], None] | None = None) -> None:
        self.layout, self.kv_heads, self.check = layout, kv_heads, check
        self.kv_cache = torch.empty(0)
        self.carrier: Any = None

    def get_attn_backend(self) -> type[AttentionBackend]:
        return tail_backend(self.layout)

    def get_kv_cache_spec(self, vllm_config: Any) -> TailSpec:
        if self.check is not None:  # the model is complete now
            self.check(vllm_config)
        layout, drafts = self.layout, vllm_config.speculative_config
        return TailSpec(
            block_size=layout.tokens,
            num_kv_heads=self.kv_heads,
            head_size=layout.head_dim,
            dtype=torch.uint8,
            state_content_bytes=layout.row,
            tokens_per_state=layout.tokens,
            sliding_window=layout.window,
            sink_blocks=layout.sink_blocks,
            margin=layout.kv.page + (drafts.num_speculative_tokens if drafts else 0),
            interval=interval(vllm_config.cache_config, layout.kv.page),
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        blocks = pool(kv_cache)
        self.views = self.layout.views(blocks)
        if serves(self.layout, kv_cache.device):
            from turboquant.kernels.triton.carry import Carrier  # needs Triton

            self.carrier = Carrier(self.layout.page(blocks.shape[2]), self.layout.tokens, blocks, self.views)
        self.heads = torch.arange(kv_cache.shape[1], device=kv_cache.device)[None, :, None]

    def _places(self, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(block, place), each (G, n) -> indices (G, H, n) of a part (N, H, ·, d)."""
        return at[0][:, None], self.heads, at[1][:, None]

    def gather(self, call: Call, pages: Tensor, table: Tensor) -> CacheBuffers:
        """The buffers of a call's rows as they are before it.

        Args:
            pages: (N, H, row) uint8, the page pool.
            table: (G, M) int32, page ids of the rows.
        """
        buf, v, at = self.layout.buffers(pages, table, call.start), self.views, call.before
        if at is None:
            return buf
        ring, sinks = self._places(at.ring), self._places(at.sinks)
        buf.ring_k, buf.ring_v = v["k"][ring], v["v"][ring]
        buf.sink_k, buf.sink_v = v["k"][sinks], v["v"][sinks]
        buf.readers = v["readers"][self._places(at.readers)]
        row, slot, blocks = at.tracker
        if len(row):
            state = v["tracker"][blocks[:, None], self.heads]  # (·, H, page/T, share)
            buf.tracker[row, slot] = state.flatten(2)[..., : 3 * self.layout.head_dim].unflatten(-1, (3, -1))
        return buf

    def scatter(self, call: Call, buf: CacheBuffers, k: Tensor, v: Tensor) -> None:
        """Store what a call has added: k, v (G, H, n, d), the new reader samples, the states after completed pages."""
        part = self.views
        (row, at), (block, place) = call.new
        part["k"][block, :, place] = k[row, :, at].to(self.layout.dtype)
        part["v"][block, :, place] = v[row, :, at].to(self.layout.dtype)
        (row, at), (block, place) = call.samples
        part["readers"][block, :, place] = buf.readers[row, :, at]
        row, at, blocks = call.states
        if len(row):
            share = part["tracker"].shape[2]
            state = buf.tracker[row, at].flatten(2)  # (·, H, 3·d)
            state = torch.nn.functional.pad(state, (0, share * blocks.shape[1] - state.shape[2])).unflatten(
                -1, (-1, share)
            )
            row, share_of = (blocks != NULL).nonzero().unbind(1)
            part["tracker"][blocks[row, share_of]] = state[row, :, share_of]


class TailBuilder(AttentionMetadataBuilder[Any]):
    """Metadata of the tail: the calls of the step."""

    layout: BlockLayout

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # the host's lengths are exact but where drafts are accepted on the device while the next step is scheduled
        self.exact = not (vllm_config.scheduler_config.async_scheduling and vllm_config.speculative_config)
        self.steps: Steps | None = None
        if device.type != "cuda":
            return
        why = obstacle(self.layout, device)
        if why is None:
            self.steps = Steps(self.layout, kv_cache_spec.interval, vllm_config.scheduler_config.max_num_seqs, device)
        else:
            warnings.warn(f"turboquant's cache is attended to eagerly, outside of CUDA graphs: {why}", stacklevel=2)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        return graphs(cls.layout, vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> list[Call] | Step:
        m = common_attn_metadata
        metrics.publish(m.block_table_tensor)
        if m.causal is not True:
            raise NotImplementedError("turboquant caches serve causal attention only")
        known = m.seq_lens_cpu_upper_bound
        k = self.kv_cache_spec.block_size // self.layout.tokens
        if self.steps is not None:
            host = known.tolist() if known is not None and self.exact else None
            return self.steps.build(m, expand(m.block_table_tensor, k), host)
        lengths = known if known is not None and self.exact else m.seq_lens.cpu()
        counts = m.query_start_loc_cpu.diff().tolist()
        starts = [n - c for n, c in zip(lengths.tolist(), counts, strict=True)]
        return plan(self.layout, starts, counts, expand(m.block_table_tensor, k))


@lru_cache(maxsize=256)
def tail_backend(layout: BlockLayout) -> type[AttentionBackend]:
    """The backend of the tails of a layout. vLLM tells backends apart by name."""
    name = f"TurboQuantTail[{layout.kv.name},{layout.head_dim},{layout.dtype}]"
    builder = type(name + "Builder", (TailBuilder,), {"layout": layout})
    return type(name, (TailBackend,), {"builder": builder, "layout": layout})


class TailBackend(AttentionBackend):
    """What vLLM asks about the tail; nothing attends to it by itself."""

    builder: type[TailBuilder]
    layout: BlockLayout

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the tail is read by the layer it belongs to")

    @classmethod
    def get_builder_cls(cls) -> Any:
        return cls.builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(cls.layout.tokens)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return layouts()


def layouts() -> tuple[Any, ...]:
    """Layouts of vLLM's pool in which the blocks of one layer follow one another."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return KVCacheLayout.LBHNC, KVCacheLayout.LBNHC
