"""The tail as vLLM's scheduler sees it: a sliding window whose first blocks (the sinks) are never dropped.

vLLM keeps the blocks of a running request that are in the window, and takes a prefix hit only where every one of them
is still cached; the manager here adds the first `sink_blocks` to both. Of a long prompt only those tail blocks are
there at all from which a request may go on: at the end of a step, and every `interval` tokens for prefix hits within
the prompt. The others are null blocks: no step reads them.
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
        margin: tokens before the window that are there at the end of a step: a page, for a hit ends at a page, and what
            vLLM adds to a step for a draft model's tokens.
        interval: tokens between the points within a prompt where a prefix hit may end, 0 for none.
    """

    sink_blocks: int
    margin: int
    interval: int

    def wanted(self, block: int, end: int) -> bool:
        """Whether a step that ends with `end` tokens needs this tail block."""
        return (block + 1) * self.block_size > end - self.sliding_window - self.margin or self.pointed(block)

    def pointed(self, block: int) -> bool:
        """Whether a block holds sinks or what a point within the prompt needs."""
        ahead = -(block + 1) * self.block_size % self.interval if self.interval else self.sliding_window
        return block < self.sink_blocks or ahead < self.sliding_window - 1

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks a request holds at a time: its window, and what a step adds."""
        window = -(-self.sliding_window // self.block_size)
        points = -(-min(max_in_flight_tokens, max_model_len) // self.interval) if self.interval else 0
        most = 2 * window + -(-self.margin // self.block_size) + 2 + points * window + self.sink_blocks
        return min(most, -(-max_model_len // self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Tails go with tails only."""
        return all(spec == self for spec in kv_cache_specs.values())


class TailManager(SlidingWindowManager):
    """Blocks of a TailSpec."""

    kv_cache_spec: TailSpec

    def __init__(self, kv_cache_spec: TailSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._freed: dict[str, int] = {}  # blocks of a request before this one are null, but for the sinks

    def _wanted(self, first: int, tokens: int) -> list[bool]:
        """Which of the blocks from `first` to the end of `tokens` are wanted."""
        return [self.kv_cache_spec.wanted(i, tokens) for i in range(first, -(-tokens // self.block_size))]

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], total_computed_tokens: int,
        num_local_computed_tokens: int, num_tokens_main_model: int, apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:  # fmt: skip
        """Blocks that the next tokens take out of the pool, cached ones that nobody holds included."""
        have = len(self.req_to_blocks.get(request_id, ()))
        if request_id in self.num_cached_block:
            return sum(self._wanted(have, num_tokens))
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        new = sum(self._wanted(max(skipped, len(new_computed_blocks) + have), num_tokens))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            new = min(new, self.max_admission_blocks_per_request)
        first = max(0, skipped - have)
        reused = [*new_computed_blocks[: min(self.kv_cache_spec.sink_blocks, first)], *new_computed_blocks[first:]]
        return new + self._get_num_evictable_blocks(reused)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """The blocks up to `num_tokens`, null ones where none is wanted."""
        blocks = self.req_to_blocks[request_id]
        wanted = self._wanted(len(blocks), num_tokens)
        got = self.block_pool.get_new_blocks(sum(wanted))
        if self._record_new_block_ids:
            self.new_block_ids.extend(b.block_id for b in got)
        fresh = iter(got)
        new = [next(fresh) if w else self._null_block for w in wanted]
        blocks.extend(new)
        return new

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:  # fmt: skip
        """As of the base, which puts null blocks where the window does not reach: there the sinks come back."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        skipped = self.get_num_skipped_tokens(num_local_computed_tokens) // self.block_size
        sinks = new_computed_blocks[: min(self.kv_cache_spec.sink_blocks, skipped)]
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """Free the blocks that are out of the window; null ones may lie between them, so no early stop."""
        blocks = self.req_to_blocks.get(request_id, [])
        first = max(self.kv_cache_spec.sink_blocks, self._freed.get(request_id, first_block))
        last = min(last_block, len(blocks))
        gone = [i for i in range(last - 1, first - 1, -1) if not blocks[i].is_null]
        self.block_pool.free_blocks([blocks[i] for i in gone])
        for i in gone:
            blocks[i] = self._null_block
        self._freed[request_id] = max(first, last)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """As of the base."""
        self._freed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

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
        """As of the base, and the sinks and points."""
        assert isinstance(kv_cache_spec, TailSpec)
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        if mask is None:
            return None
        return [m or kv_cache_spec.pointed(i) for i, m in enumerate(mask, start_block)]


def register() -> None:
    """Tell vLLM which manager a TailSpec has; idempotent."""
    KVCacheSpecRegistry._ensure_registered()  # it registers its own only while nothing is registered yet
    KVCacheSpecRegistry.register(TailSpec, TailManager, uniform_type_base_spec=TailSpec)


register()  # a spec that arrives from a worker by pickle finds its manager
