"""What our cache cannot serve in vLLM is refused with the reason, layer by layer."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from turboquant.integrations.vllm import config as plugin_config
from turboquant.integrations.vllm import draft
from turboquant.integrations.vllm.attention import VllmError, check, refusal, sweep
from turboquant.recipe import parse_recipe

KV = parse_recipe("kv4").kv


DRAFT = SimpleNamespace(method="draft_model")
GPU = SimpleNamespace(device_type="cuda")
SECOND = {"device_config": GPU, "use_v2_model_runner": True}


def parallel(**given):
    kinds = ("decode_context", "prefill_context", "pipeline", "tensor")
    return SimpleNamespace(**(dict.fromkeys((f"{k}_parallel_size" for k in kinds), 1) | given))


def config(**given):
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    made = SimpleNamespace(parallel_config=parallel(), kv_transfer_config=None, scheduler_config=scheduler)
    cache = SimpleNamespace(cache_dtype="auto")
    device = SimpleNamespace(device_type="cpu")
    vars(made).update({"speculative_config": None, "cache_config": cache, "device_config": device} | given)
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


def test_a_quantization_method_of_vllms_own_is_not_replaced(monkeypatch):
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.setattr(plugin_config, "QUANTIZATION_METHODS", ["awq", "turboquant"])
    with pytest.raises(RuntimeError, match="'turboquant' itself"):
        plugin_config.register()


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
        ({"speculative_config": DRAFT, "device_config": GPU}, "VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"speculative_config": DRAFT, "use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        (
            {"speculative_config": DRAFT, "parallel_config": parallel(pipeline_parallel_size=2)},
            "pipeline parallelism",
        ),
        (
            {"speculative_config": DRAFT, "parallel_config": parallel(tensor_parallel_size=2)} | SECOND,
            "tensor parallelism on GPUs",
        ),
        (
            {"speculative_config": SimpleNamespace(method="draft_model", parallel_drafting=True, kv_cache_dtype="fp8")},
            "parallel_drafting and a kv_cache_dtype of their own",
        ),
        ({"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)}, "hybrid-kv-cache-manager"),
        ({"parallel_config": parallel(decode_context_parallel_size=2)}, "context parallelism"),
    ],
)
def test_configurations(given, words):
    assert words in refusal(layer(), KV, config(**given))


def test_drafts_are_served():
    for method in ("ngram", "draft_model"):
        drafts = {"speculative_config": SimpleNamespace(method=method)}
        two = drafts | {"parallel_config": parallel(tensor_parallel_size=2)}
        assert refusal(layer(), KV, config(**two)) is None
        assert refusal(layer(), KV, config(**drafts)) is None
        assert refusal(layer(), KV, config(**drafts, **SECOND)) is None


class Plain:
    """A builder of vLLM's."""

    def __init__(self, *layers):
        self.layer_names = layers

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return common_attn_metadata.block_table_tensor


def test_a_draft_model_gets_the_table_of_its_own_group_or_an_error():
    step = draft.Step("layers.0", 64, 64)
    kinds = [type("", (kind, Plain), {"step": step}) for kind in (draft.FirstBuilder, draft.DraftBuilder)]
    first, second, own = kinds[0]("layers.0"), kinds[0]("layers.1"), kinds[1]("draft_model.layers.0")
    tables = [torch.full((2, 3), i) for i in range(3)]
    kept, other, its = (SimpleNamespace(block_table_tensor=t, slot_mapping=t[0]) for t in tables)
    assert torch.equal(first.build(0, kept), tables[0]) and torch.equal(second.build(0, other), tables[1])
    assert torch.equal(own.build(0, its), tables[2])
    assert kept.block_table_tensor is tables[2] and kept.slot_mapping is its.slot_mapping
    assert other.block_table_tensor is tables[1]
    kept.block_table_tensor = tables[2][:1]  # of fewer requests
    assert torch.equal(own.build(0, kept, True), tables[2][:1])
    for skipped in (False, True):  # a vLLM that builds no metadata for the draft model's group in a step
        if skipped:
            first.build(0, kept := SimpleNamespace(block_table_tensor=tables[0], slot_mapping=tables[0][0]))
        with pytest.raises(RuntimeError, match="block table of another KV cache group"):
            own.build(0, kept if skipped else other, True)


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
