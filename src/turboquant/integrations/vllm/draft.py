"""Draft models beside our cache: their layers keep vLLM's own, in the blocks of a KV cache group of their own.

vLLM's first model runner (of 0.32, on CPUs) keeps the metadata of the first KV cache group for the draft model, which
would so write its keys into our pages. It builds the metadata of one group after the other, the first one first; the
builder of the draft model's group, here, then puts its own block table and slots into what was kept. Before a draft is
computed it checks that they have arrived. The second one (V2, of GPUs) gives the draft model's builders the table of
their own group, so that only the size of its blocks is set here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

PREFIX = "draft_model."  # vLLM's, of the names of its layers


def drafts(name: str, layer: Any, config: Any) -> bool:
    """Whether a layer is a draft model's, given its name and the configuration of the model it drafts for."""
    model = getattr(config.speculative_config, "method", None) == "draft_model"
    return layer.is_draft_layer or (model and name.startswith(PREFIX))


def second_runner(config: Any) -> bool:
    """Whether vLLM's second model runner serves."""
    return bool(getattr(config, "use_v2_model_runner", False))


def refusal(config: Any) -> str | None:
    """Why a model with our cache cannot have a draft model, None if it can."""
    cpu, second = config.device_config.device_type == "cpu", second_runner(config)
    if cpu == second:
        return (
            f"draft models beside it are tested {'on CPUs' if cpu else 'on GPUs'} with vLLM's "
            f"{'first' if cpu else 'second'} model runner only (VLLM_USE_V2_MODEL_RUNNER={int(not cpu)}); "
            "use n-gram drafts"
        )
    spec = config.speculative_config
    untested = {
        "pipeline parallelism": config.parallel_config.pipeline_parallel_size > 1,
        "tensor parallelism on GPUs": not cpu and config.parallel_config.tensor_parallel_size > 1,
        "parallel_drafting": getattr(spec, "parallel_drafting", False),
        "a kv_cache_dtype of their own": getattr(spec, "kv_cache_dtype", None) is not None,
    }
    found = [name for name, asked in untested.items() if asked]
    return f"draft models beside it are not tested with {' and '.join(found)}" if found else None


@dataclass
class Step:
    """What the builders of a model and its draft model share over a step.

    Attributes:
        first: name of the model's first layer. unit: bytes of a block of ours. page: tokens of it, the fewest.
        kept: metadata of the first group, which the runner keeps for the draft model; None once they are right.
        table: (R, M) int32, block table of the draft model's group.
    """

    first: str
    unit: int
    page: int
    kept: CommonAttentionMetadata | None = None
    table: Tensor | None = None


class FirstBuilder:
    """Builder of the groups of the first layer's kind, the first group among them."""

    step: Step
    layer_names: list[str]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        if self.step.first in self.layer_names:
            self.step.kept = common_attn_metadata
        return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]


class DraftBuilder:
    """Builder of the draft model's group: called for the step, then for every token that is drafted.

    Raises:
        RuntimeError: this vLLM hands the draft model another block table than its own.
    """

    step: Step

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        step, m = self.step, common_attn_metadata
        if step.kept is not None and not fast_build:  # which it is for a drafted token
            step.table = m.block_table_tensor
            step.kept.block_table_tensor, step.kept.slot_mapping = m.block_table_tensor, m.slot_mapping
            step.kept = None
        elif step.table is None or m.block_table_tensor.data_ptr() != step.table.data_ptr():
            raise RuntimeError("this vLLM hands its draft model the block table of another KV cache group than its own")
        return super().build(common_prefix_len, m, fast_build)  # type: ignore[misc]


class DraftBackend:
    """Backend of the draft model's layers."""

    step: Step

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Blocks that fill a block of ours best, of up to a page of tokens, padded to it: those of vLLM's pool have one
        size. Where the smallest that the kernels take are larger, several of ours lie in one.
        """
        spec = super().customize_spec(spec)  # type: ignore[misc]
        sizes = cls.get_supported_kernel_block_sizes(spec)  # type: ignore[attr-defined]
        made = replace(spec, block_size=min(getattr(s, "base", s) for s in sizes))
        while any(hasattr(s, "base") for s in sizes) and 2 * made.block_size <= cls.step.page:
            twice = replace(made, block_size=2 * made.block_size)
            if twice.page_size_bytes > cls.step.unit:
                break
            made = twice
        return replace(made, page_size_padded=-(-made.page_size_bytes // cls.step.unit) * cls.step.unit)


def _with(backend: type[AttentionBackend], step: Step, builder: type | None, *parts: type) -> type[AttentionBackend]:
    """A backend whose builder is `builder`, if any, before its own, with the methods of `parts`."""
    more: dict[str, Any] = {"step": step}
    if builder is not None:
        was = backend.get_builder_cls()
        made = type(was.__name__, (builder, was), {"step": step})
        more["get_builder_cls"] = staticmethod(lambda: made)
    return type(backend.__name__, (*parts, backend), more)


def serve(name: str, first: Sequence[Any], theirs: Sequence[Any], unit: int, page: int, second: bool) -> None:
    """Give a model's layers and its draft model's the backends of this file; idempotent.

    Args:
        name: of the model's first layer. first: those of its backend. theirs: the draft model's.
        unit, page: as of Step. second: as of `second_runner`.
    """
    if hasattr(theirs[0].attn_backend, "step"):
        return
    step = Step(name, unit, page)
    kinds: list[tuple[Sequence[Any], type | None, tuple[type, ...]]] = [
        (theirs, None if second else DraftBuilder, (DraftBackend,)),
        *([] if second else [(first, FirstBuilder, ())]),
    ]
    for layers, builder, parts in kinds:
        made = {b: _with(b, step, builder, *parts) for b in {x.attn_backend for x in layers}}
        for layer in layers:
            layer.attn_backend = made[layer.attn_backend]
