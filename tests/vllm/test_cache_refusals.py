"""What our cache cannot serve in vLLM is refused with the reason, layer by layer."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from turboquant.integrations.vllm.attention import VllmError, check, refusal, sweep
from turboquant.recipe import parse_recipe

KV = parse_recipe("kv4").kv


def config(**given):
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    made = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None, scheduler_config=scheduler)
    cache = SimpleNamespace(cache_dtype="auto")
    vars(made).update({"speculative_config": None, "cache_config": cache} | given)
    return made


def layer(kind=Attention, **given):
    made = object.__new__(kind)
    torch.nn.Module.__init__(made)
    values = {
        "attn_type": AttentionType.DECODER, "kv_sharing_target_layer_name": None, "kv_cache_dtype": "auto",
        "kv_cache_torch_dtype": torch.bfloat16, "head_size": 64, "head_size_v": 64, "use_mm_prefix": False,
        "has_sink": False, "impl": SimpleNamespace(scale=1.0, logits_soft_cap=None, alibi_slopes=None),
    }  # fmt: skip
    for name, value in (values | given).items():
        setattr(made, name, value)
    return made


def test_an_ordinary_layer_is_served():
    assert refusal(layer(), KV, config()) is None


@pytest.mark.parametrize(
    "made,words",
    [
        (layer(MLAAttention), "multi-head latent attention"),
        (layer(ChunkedLocalAttention), "ChunkedLocalAttention"),
        (layer(attn_type=AttentionType.ENCODER_ONLY), "encoder_only"),
        (layer(attn_type=AttentionType.ENCODER_DECODER), "encoder_decoder"),
        (layer(kv_sharing_target_layer_name="layers.0"), "layers.0"),
        (layer(kv_cache_dtype="fp8", kv_cache_torch_dtype=torch.uint8), "kv_cache_dtype='fp8'"),
        (layer(head_size_v=128), "values 128"),
        (layer(head_size=72, head_size_v=72), "head_dim=72"),
        (layer(impl=SimpleNamespace(scale=1.0, logits_soft_cap=0, alibi_slopes=[0.5])), "ALiBi"),
        (layer(use_mm_prefix=True), "image tokens"),
        (layer(has_sink=True), "sink logits"),
        (layer(impl=SimpleNamespace(scale=1.0)), "soft cap"),
    ],
)
def test_layers(made, words):
    assert words in refusal(made, KV, config())


@pytest.mark.parametrize(
    "given,words",
    [
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"cache_config": SimpleNamespace(cache_dtype="turboquant_4bit_nc")}, "turboquant_4bit_nc"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "drafts by 'eagle3'"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "first of several KV cache groups"),
        ({"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)}, "hybrid-kv-cache-manager"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2, prefill_context_parallel_size=1)},
            "context parallelism",
        ),
    ],
)
def test_configurations(given, words):
    assert words in refusal(layer(), KV, config(**given))


def test_drafts_by_ngrams_are_served():
    assert refusal(layer(), KV, config(speculative_config=SimpleNamespace(method="ngram"))) is None


def test_an_old_vllm(monkeypatch):
    monkeypatch.delattr(AttentionBackend, "customize_spec")
    assert "0.28" in refusal(layer(), KV, config())


def test_a_layer_that_was_never_asked_for_is_refused():
    layers = {"a": layer(), "b": layer()}
    made = config(compilation_config=SimpleNamespace(static_forward_context=layers))
    made.quant_config = SimpleNamespace(kv_of=lambda name: KV if name == "a" else None)
    with pytest.raises(VllmError, match=r"^a: "):
        check(made)
    made.quant_config = None  # not ours
    check(made)
    sweep(made, lambda name: None)
    assert all(isinstance(x.impl, SimpleNamespace) for x in layers.values())
