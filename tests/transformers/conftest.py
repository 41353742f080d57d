"""Tiny random models of the architectures that matter, made in memory."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 96
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    initializer_range=0.25,  # so that attention attends: with the usual 0.02 no test of the cache could fail
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=False,
)
SLIDING = dict(sliding_window=20, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
MODELS = {
    "llama-mha": ("llama", dict(num_key_value_heads=4)),
    "llama-gqa": ("llama", {}),
    "llama-mqa": ("llama", dict(num_key_value_heads=1)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", dict(sliding_window=20)),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", SLIDING | dict(attn_logit_softcapping=4.0, query_pre_attn_scalar=5)),
    "gemma3": ("gemma3_text", SLIDING | dict(query_pre_attn_scalar=5)),
    "gpt-oss": ("gpt_oss", SLIDING | dict(num_local_experts=2, num_experts_per_tok=2)),
    "qwen3-next": (
        "qwen3_next",
        dict(
            layer_types=["linear_attention", "full_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            num_experts=2,
            num_experts_per_tok=2,  # all of them: no routing that a rounding could flip
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            decoder_sparse_step=1,
        ),
    ),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention", "full_attention"], block_auto_adjust_ff_dim=False)),
}
MOE = {
    "olmoe": ("olmoe", dict(hidden_size=64, num_experts=4, num_experts_per_tok=4)),
    "qwen3-moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=4)),
}  # every expert for every token: no routing that a rounding could flip
SOFTCAP_OR_SINKS = ("gemma2", "gpt-oss")


def build(name: str, seed: int = 0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = (MODELS | MOE)[name]
    config = AutoConfig.for_model(kind, **(BASE | options | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("sinks"):
                p.copy_(torch.linspace(-1, 3, p.numel()))
    return model


@pytest.fixture(scope="session")
def tiny():
    """(name, seed, **config changes) -> a fresh model with ordinary (eager) attention."""
    return build


@pytest.fixture
def saved(tmp_path, tiny):
    """(name, **config changes) -> (model, the folder it was saved to)."""

    def make(name, shard="50GB", **changes):
        model = tiny(name, **changes)
        model.save_pretrained(tmp_path / "float", max_shard_size=shard)
        return model, tmp_path / "float"

    return make


@pytest.fixture(params=MODELS)
def name(request):
    """Every architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def prompt():
    """(lengths, left) -> input_ids, attention_mask of a padded batch."""

    def make(lengths=(40, 23), left=True, seed=3):
        g = torch.Generator().manual_seed(seed)
        n = max(lengths)
        ids, mask = torch.zeros(len(lengths), n, dtype=torch.long), torch.zeros(len(lengths), n, dtype=torch.long)
        for i, k in enumerate(lengths):
            where = slice(n - k, n) if left else slice(0, k)
            ids[i, where] = torch.randint(2, VOCAB, (k,), generator=g)
            mask[i, where] = 1
        return dict(input_ids=ids, attention_mask=mask)

    return make
