"""The tail as vLLM's scheduler sees it: a sliding window whose first blocks (the sinks) are never dropped.

vLLM keeps the blocks of a running request that are in the window, and takes a prefix hit only where every one of them
is still cached; the manager here adds the first `sink_blocks` to both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class TailSpec(SlidingWindowSpec):
    """`sliding_window` newest tokens of a sequence and the blocks of its first tokens.

    Attributes:
        sink_blocks: blocks at the beginning of a sequence that stay.
    """

    sink_blocks: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks a request holds at a time."""
        most = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(most + self.sink_blocks, -(-max_model_len // self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Tails go with tails only."""
        return all(spec == self for spec in kv_cache_specs.values())


class TailManager(SlidingWindowManager):
    """Blocks of a TailSpec."""

    def __init__(self, kv_cache_spec: TailSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], total_computed_tokens: int,
        *args: Any, **kwargs: Any,
    ) -> int:  # fmt: skip
        """As of the base; cached sinks that nobody holds leave the free queue too."""
        n = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return n + self._get_num_evictable_blocks(new_computed_blocks[: min(self.sink_blocks, skipped)])

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:  # fmt: skip
        """As of the base, which puts null blocks where the window does not reach: there the sinks come back."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        total = num_local_computed_tokens + num_external_computed_tokens
        skipped = self.get_num_skipped_tokens(total) // self.block_size
        sinks = new_computed_blocks[: min(self.sink_blocks, skipped)]
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        super()._remove_blocks_in_range(request_id, max(first_block, self.sink_blocks), last_block)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any,
        kv_cache_spec: KVCacheSpec, drop_eagle_block: bool, alignment_tokens: int, *args: Any, **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:  # fmt: skip
        """A hit of the window that also finds the sinks, or none."""
        assert isinstance(kv_cache_spec, TailSpec)
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block,
            alignment_tokens, *args, **kwargs,
        )  # fmt: skip
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup, alignment_tokens=alignment_tokens,
        )  # fmt: skip
        for i in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: KVCacheSpec,
        *args: Any, **kwargs: Any,
    ) -> list[bool] | None:  # fmt: skip
        """As of the base; the sinks are always worth keeping."""
        assert isinstance(kv_cache_spec, TailSpec)
        mask = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs
        )
        if mask is not None:
            for i in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[i - start_block] = True
        return mask


def register() -> None:
    """Tell vLLM which manager a TailSpec has; idempotent."""
    KVCacheSpecRegistry._ensure_registered()  # it registers its own only while nothing is registered yet
    KVCacheSpecRegistry.register(TailSpec, TailManager, uniform_type_base_spec=TailSpec)


register()  # a spec that arrives from a worker by pickle finds its manager
