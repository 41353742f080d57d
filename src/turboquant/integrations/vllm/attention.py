"""Attention layers of vLLM with our cache: `install` gives a layer our backend and its companion, the tail.

The backend is set layer by layer, so every layer may have a recipe of its own, and layers without one keep what vLLM
chose. What cannot be served is refused here, when the model is built.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from turboquant.integrations.vllm import draft, metrics
from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.device import most_tokens
from turboquant.integrations.vllm.pages import FLOATS, TAIL, TurboQuantImpl, backend
from turboquant.integrations.vllm.tail import Tail
from turboquant.kernels import ops
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe, RecipeError

LAYERS = (Attention, MLAAttention)  # what install is to be called for
DTYPES = ("auto", "bfloat16", "float16")  # of vLLM's cache
_installed: "weakref.WeakSet[TurboQuantImpl]" = weakref.WeakSet()


class VllmError(ValueError):
    """vLLM was asked to serve what our cache cannot; the message says what and why."""


def install(layer: Any, prefix: str, kv: KVRecipe) -> None:
    """Give an attention layer of vLLM our cache; idempotent.

    Args:
        layer: under construction, with the backend that vLLM chose.
        prefix: its name.

    Raises:
        VllmError: what cannot be served, with the reason.
    """
    if _ours(layer):
        return
    config = get_current_vllm_config()
    if draft.drafts(prefix, layer, config):
        raise VllmError(
            f"{prefix}: draft models keep vLLM's cache; {kv.name!r} is for others, leave it out of the recipe"
        )
    why = refusal(layer, kv, config)
    if why is not None:
        raise VllmError(f"{prefix}: a {kv.name!r} cache cannot be served: {why}")
    layout = BlockLayout(kv, layer.head_size, layer.kv_cache_torch_dtype)
    padding = layout.row / PageLayout(kv, layer.head_size).page_bytes - 1
    if padding > 0.1:
        warnings.warn(
            f"pages of {kv.name!r} at head_dim {layer.head_size} are padded by {padding:.0%}, to hold {layout.tokens} "
            f"tokens of the tail in {layer.kv_cache_torch_dtype}: a larger page loses less",
            stacklevel=2,
        )
    tail = Tail(layout, layer.num_kv_heads, check)
    config.compilation_config.static_forward_context[prefix + TAIL] = tail
    layer.impl = TurboQuantImpl(layer, layer.impl, prefix, layout, tail)
    layer.attn_backend = backend(layout)
    layer.backend = AttentionBackendEnum.CUSTOM
    _installed.add(layer.impl)
    metrics.identify(config.parallel_config)
    metrics.source(rows)


def sweep(config: Any, kv_of: Callable[[str], KVRecipe | None]) -> None:
    """Install the cache of layers whose models do not tell them of any quantization (their quant_config is None), which
    are not asked for by name; called whenever another layer is asked for.
    """
    for name, layer in list(config.compilation_config.static_forward_context.items()):
        kv = kv_of(name) if isinstance(layer, LAYERS) and not draft.drafts(name, layer, config) else None
        if kv is not None:
            install(layer, name, kv)


def check(config: Any) -> None:
    """Called when the model and its draft model are complete, before vLLM asks for their backends.

    Raises:
        VllmError: a layer has a recipe and not our cache; the draft model cannot be served beside it.
    """
    kv_of = getattr(config.quant_config, "kv_of", lambda name: None)
    context = config.compilation_config.static_forward_context
    layers = {n: x for n, x in context.items() if isinstance(x, AttentionLayerBase)}
    theirs = {n: layers.pop(n) for n in list(layers) if draft.drafts(n, layers[n], config)}
    left = [n for n, x in layers.items() if isinstance(x, LAYERS) and kv_of(n) and not _ours(x)]
    if left:
        raise VllmError(f"{', '.join(left)}: this model builds them in a way in which they cannot get our cache")
    if getattr(config.speculative_config, "method", None) != "draft_model":
        return
    ours = {n: x for n, x in layers.items() if _ours(x)}
    left = [n for n, x in layers.items() if n not in ours and not isinstance(x, Tail)]
    if left:
        raise VllmError(f"{', '.join(left)}: with a draft model every layer must have our cache, this one keeps vLLM's")
    name, first = next(iter(ours.items()))
    unit = max(x.num_kv_heads * x.impl.layout.row for x in ours.values())
    same = [x for x in ours.values() if x.attn_backend is first.attn_backend]
    page = min(x.impl.layout.kv.page for x in ours.values())
    draft.serve(name, same, list(theirs.values()), unit, page, draft.second_runner(config))


def _ours(layer: Any) -> bool:
    return isinstance(getattr(layer, "impl", None), TurboQuantImpl)


def rows() -> list[metrics.Row]:
    """What the caches of this process are and have seen, for /metrics."""
    impls = [i for i in _installed if i.tail.kv_cache.numel()]  # vLLM has given them their blocks
    if not impls:
        return []
    nonfinite, alarms = torch.stack([torch.stack((i.nonfinite, i.alarms)) for i in impls]).T.tolist()  # read at once
    pages = [PageLayout(i.layout.kv, i.layout.head_dim) for i in impls]
    out: list[metrics.Row] = [
        ("cache_bits", {"part": "keys"}, sum(p.key_bits for p in pages) / len(pages)),
        ("cache_bits", {"part": "values"}, sum(p.value_bits for p in pages) / len(pages)),
        ("cache_bytes_per_token", {}, sum(i.num_kv_heads * i.layout.row / i.layout.kv.page for i in impls)),
        ("nonfinite_tokens", {}, max(nonfinite)),
        *(("drift_alarms", {"of": "cache", "layer": i.prefix}, n) for i, n in zip(impls, alarms, strict=True)),
    ]
    for op in ops.OPS:
        kernels = {k for i in impls for k in _kernels(op, i)}
        out += [("kernel_info", {"op": op, "kernel": k}, 1.0) for k in sorted(kernels)]
    return out


def _kernels(op: str, impl: TurboQuantImpl) -> set[str]:
    """What runs an op in a step, and in the longest chunk of a prompt that reaches it."""
    layout, attends = impl.layout, op == "cache_attention" and impl.tail.carrier is not None
    out = {"flash (prompts)"} if attends else set()  # prompt.py: vLLM's, over pages that Triton decodes
    for n in (1, most_tokens(layout) if attends else min(layout.kv.page, layout.kv.chunk)):
        chunk = ops.Chunk(layout.dtype, tokens=n, rows=impl.group * n)
        out.add(ops.choose(op, PageLayout(layout.kv, layout.head_dim), impl.tail.kv_cache.device, chunk)[0])
    return out


def refusal(layer: Any, kv: KVRecipe, config: Any) -> str | None:
    """Why a layer cannot have our cache, None if it can."""
    if not hasattr(AttentionBackend, "customize_spec"):
        return f"vLLM {vllm.__version__} has no AttentionBackend.customize_spec, which came with 0.28"
    if isinstance(layer, MLAAttention):
        return "multi-head latent attention keeps one latent vector a token, not keys and values of heads"
    if layer.attn_type != AttentionType.DECODER:
        return f"{AttentionType(layer.attn_type).value} attention keeps no growing cache"
    if type(layer) is not Attention:
        return f"{type(layer).__name__} attends in a way of its own"
    if layer.kv_sharing_target_layer_name is not None:
        return f"it reads the cache of {layer.kv_sharing_target_layer_name}"
    if layer.kv_cache_torch_dtype not in FLOATS or layer.kv_cache_dtype not in DTYPES:
        return f"kv_cache_dtype={layer.kv_cache_dtype!r} asks for another format; leave it at 'auto'"
    if layer.head_size != layer.head_size_v:
        return f"keys have {layer.head_size} channels and values {layer.head_size_v}"
    try:
        PageLayout(kv, layer.head_size)
    except RecipeError as e:
        return str(e)
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "ALiBi is added to logits that our kernels do not hand out"
    if layer.use_mm_prefix:
        return "image tokens attend to one another in both directions"
    if not hasattr(layer.impl, "scale") or not hasattr(layer.impl, "logits_soft_cap"):
        return f"{type(layer.impl).__name__} does not say its scale and soft cap"
    if layer.has_sink and getattr(layer.impl, "sinks", None) is None:
        return f"{type(layer.impl).__name__} does not hand out its sink logits"
    return _refused_by_config(config)


def _refused_by_config(config: Any) -> str | None:
    asked = config.cache_config.cache_dtype
    if asked not in DTYPES:  # vLLM's own of four bits leave some layers out
        return f"kv_cache_dtype={asked!r} asks for another format; leave it at 'auto'"
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism splits pages between ranks"
    if config.kv_transfer_config is not None:
        return "KV connectors do not carry the tail"
    method = getattr(config.speculative_config, "method", None)
    if method not in (None, "ngram", "draft_model"):
        return f"drafts by {method!r} are not tested with it; n-gram drafts and draft models are"
    if method == "draft_model" and (why := draft.refusal(config)):
        return why
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "the tail is a KV cache group of its own: --disable-hybrid-kv-cache-manager must not be given"
    return None
