"""A tiny Llama with random weights and a tokenizer of one token a character: no file, no network."""

import pytest


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {"<unk>": 0} | {c: i + 1 for i, c in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")


def make_llama(**changes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**options | changes)).eval()
    with torch.no_grad():  # larger weights: attention that depends on its keys, and key channels of unequal means
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
            layer.self_attn.v_proj.weight *= 12
            layer.self_attn.o_proj.weight *= 12
        model.lm_head.weight *= 20
    return model


@pytest.fixture(scope="session")
def tiny_llama():
    return make_llama()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """The same as a folder that from_pretrained reads."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path
