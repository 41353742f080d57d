"""Linear recipes through `from_pretrained`: loading, saving, every kind of layer, and what is refused."""

import gc
import json
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from turboquant import TurboQuantCache, TurboQuantConfig
from turboquant.integrations.transformers import quantize
from turboquant.layers.embedding import QuantEmbedding, row_factor
from turboquant.layers.fused import DenseHead
from turboquant.layers.linear import QuantExperts, QuantLinear
from turboquant.layers.moments import moments_without_data
from turboquant.recipe import RecipeError


@pytest.fixture
def ids():
    return torch.randint(2, 90, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def relative(got, want):
    return float((got - want).norm() / want.norm())


def load(folder, recipe="w8a8", **options):
    """With the attention that the tiny models run: SDPA of older transformers leaves out Gemma 2's soft-cap."""
    config = TurboQuantConfig(recipe, **options)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", quantization_config=config)


def floats(model):
    """Names of linear layers and stacks of experts that are not quantized."""
    out = [n for n, m in model.named_modules() if type(m) in (torch.nn.Linear, DenseHead)]
    return out + [n for n, p in model.named_parameters() if p.dim() == 3 and p.shape[0] > 1 and "conv" not in n]


def test_every_architecture_is_near_itself_and_comes_back_bit_for_bit(name, saved, tmp_path, ids):
    model, folder = saved(name)
    want, q = logits(model, ids), load(folder)
    assert floats(q) == ["lm_head"]
    got = logits(q, ids)
    assert 0 < relative(got, want) < 0.2
    q.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager")
    assert torch.equal(logits(again, ids), logits(q, ids))
    assert again.config.quantization_config.recipe == "w8a8" and floats(again) == ["lm_head"]


@pytest.mark.parametrize("kind", ["olmoe", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w4a8kv4"])
def test_stacks_of_experts_are_quantized(kind, recipe, saved, tmp_path, ids):
    model, folder = saved(kind)
    q = load(folder, recipe)
    assert floats(q) == ["lm_head"] and sum(isinstance(m, QuantExperts) for m in q.modules()) == 3
    error = relative(logits(q, ids), logits(model, ids))
    assert 0 < error < (0.2 if recipe == "w8a8" else 1.2), error
    q.save_pretrained(tmp_path / "packed")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager"), ids),
        logits(q, ids),
    )


@pytest.mark.parametrize("recipe", ["w4", "w8", "w4a8", "w4a4", "a8", "a4", "w8a8:group=0", "w4a4:freeze=16,agroup=16"])
def test_recipes_round_trip(recipe, saved, tmp_path, ids):
    model, folder = saved("llama-gqa")
    q = load(folder, recipe)
    logits(q, ids)
    q.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager")
    for other in (ids, ids.flip(1)):
        assert torch.equal(logits(again, other), logits(q, other)), "with the tracker's state"
    assert relative(logits(q, ids), logits(model, ids)) > 0


@pytest.mark.parametrize("recipe", ["w4a8", "w8a4"])
def test_quantizing_while_loading_gives_what_quantizing_afterwards_gives(recipe, saved, ids):
    from turboquant.layers.convert import Plan, quantize_model
    from turboquant.recipe import parse_recipe

    model, folder = saved("llama-gqa", shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3, "sharded"
    q = load(folder, recipe)
    quantize_model(model, Plan(parse_recipe(recipe)), model.lm_head)
    want = model.state_dict()
    assert set(want) == set(q.state_dict())
    for key, t in q.state_dict().items():
        assert torch.equal(t, want[key]) and t.dtype == want[key].dtype, key
    for m in q.modules():
        if isinstance(m, QuantLinear):
            assert m.weight.nbytes == m.in_features * m.out_features // 2 * m.recipe.weights.stages


def test_sharded_packed_checkpoint(saved, tmp_path, ids):
    _, folder = saved("llama-gqa")
    q = load(folder)
    q.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager"), ids),
        logits(q, ids),
    )


def test_bfloat16_and_the_cache_in_one(saved, tmp_path):
    _, folder = saved("qwen2")
    recipe = "w8a8kv4:page=16,ring=16,rewind=16"
    q = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=TurboQuantConfig(recipe))
    inputs = dict(input_ids=torch.randint(2, 90, (2, 40)), attention_mask=torch.ones(2, 40, dtype=torch.long))
    out = q.generate(**inputs, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, TurboQuantCache) and out.past_key_values.nbytes()["pages"] > 0
    q.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    same = again.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.equal(same, out.sequences)


@pytest.mark.parametrize("tied", [False, True])
def test_output_embeddings(tied, saved, tmp_path, ids):
    model, folder = saved("llama-gqa", tie_word_embeddings=tied)
    plain = load(folder, "w8a8")
    assert type(plain.lm_head) is DenseHead and plain.lm_head.weight.dtype.is_floating_point
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    q = load(folder, "w8a8:head=8")
    assert isinstance(q.lm_head, QuantLinear) and q.lm_head.recipe.name == "w8a8"
    assert torch.equal(q.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert relative(logits(q, ids), logits(model, ids)) < 0.2
    for n, m in (("tied", plain), ("head", q)):
        m.save_pretrained(tmp_path / n)
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / n, attn_implementation="eager"), ids), logits(m, ids)
        )


@pytest.mark.parametrize("kind, tied", [("llama-gqa", False), ("llama-gqa", True), ("gemma3", True), ("gemma3", False)])
def test_input_embeddings(kind, tied, saved, tmp_path, ids):
    """Rows as the packed weight decodes, times what the model's own embeddings multiply them by; saved, given back."""
    model, folder = saved(kind, tie_word_embeddings=tied)
    q = load(folder, "w8a8:head=8,embed=8")
    own, new = model.get_input_embeddings(), q.get_input_embeddings()
    assert isinstance(new, QuantEmbedding) and isinstance(q.lm_head, QuantLinear)
    assert new.factor == pytest.approx(model.config.hidden_size**0.5 if kind == "gemma3" else 1.0)
    want = torch.nn.functional.embedding(ids, new.slot.dequantized()) * new.factor
    assert torch.equal(new(ids), want) and 0 < relative(want, own(ids)) < 0.01
    assert relative(logits(q, ids), logits(model, ids)) < 0.2
    q.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager")
    assert torch.equal(logits(again, ids), logits(q, ids))
    want = logits(q, ids)
    q.dequantize()
    back = q.get_input_embeddings()
    assert type(back) is type(own) and torch.equal(back(ids), new(ids)) and relative(logits(q, ids), want) < 0.2


def test_input_embeddings_in_a_narrow_dtype(saved, ids):
    """Gemma rounds its factor to the dtype of the embeddings before it multiplies."""
    _, folder = saved("gemma3", tie_word_embeddings=False)
    q = load(folder, "w8:embed=8").to(torch.bfloat16)
    new = q.get_input_embeddings()
    rows = torch.nn.functional.embedding(ids, new.slot.dequantized().bfloat16())
    assert new(ids).dtype == torch.bfloat16 and torch.equal(new(ids), rows * torch.tensor(new.factor).bfloat16())
    assert float(torch.tensor(new.factor).bfloat16()) != new.factor


def test_input_embeddings_take_and_refuse_the_ids_that_the_models_own_do(saved, ids):
    model, folder = saved("llama-gqa")
    new = load(folder, "w8:embed=8").get_input_embeddings()
    for some in (ids.int(), ids[0], ids[0, 0], ids[:, :0], ids[:, :, None]):
        assert new(some).shape == model.get_input_embeddings()(some).shape
        assert torch.equal(new(some), new(ids.view(-1))[: some.numel()].view(new(some).shape))
    for bad in (-1, len(model.get_input_embeddings().weight)):
        with pytest.raises(IndexError):
            new(torch.tensor([[bad]]))
    with pytest.raises(RuntimeError, match="indices"):  # would be a mask
        new(torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("recipe", ["w8:head=8,embed=8", "w8:head=8", "w8:embed=8"])
def test_packed_embeddings_keep_their_size(recipe, saved, tmp_path, ids):
    model, folder = saved("llama-gqa", tie_word_embeddings=False)
    q, have = load(folder, recipe), model.config.vocab_size
    q.save_pretrained(tmp_path / "q")
    quantize(model, recipe)
    name = "model.embed_tokens" if "embed" in recipe else "lm_head"
    for m in (q, model, AutoModelForCausalLM.from_pretrained(tmp_path / "q")):
        before = logits(m, ids)
        for wrong in ({"new_num_tokens": have + 1}, {"pad_to_multiple_of": 7 if have % 7 else 11}):
            with pytest.raises(RecipeError, match=f"{name} is packed and keeps its {have} tokens"):
                m.resize_token_embeddings(**wrong)
        assert m.resize_token_embeddings(have) is m.get_input_embeddings() and torch.equal(logits(m, ids), before)
    q.dequantize()
    assert q.resize_token_embeddings(have + 1).weight.shape[0] == have + 1


def test_a_model_with_packed_embeddings_goes_when_it_is_let_go(saved):
    model = load(saved("llama-gqa", tie_word_embeddings=False)[1], "w8:head=8,embed=8")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_models_that_have_no_input_embeddings():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    small = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, conv_dim=(32,))
    small |= dict(conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    model = Wav2Vec2Model(Wav2Vec2Config(**small))
    with pytest.raises(RecipeError, match="'w8:embed=8': this model has no input embeddings for embed=8"):
        quantize(model, "w8:embed=8")
    assert len(quantize(model, "w8")) == 7


def test_input_embeddings_that_cannot_be_packed(saved):
    _, folder = saved("llama-gqa", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="embed=8 alone would make a second copy; add head=8, or leave embed=8 out"):
        load(folder, "w8:embed=8")
    for left in ({"modules_to_not_convert": ["lm_head"]}, {"overrides": {"lm_head": "none"}}):
        with pytest.raises(RecipeError, match="second copy; lm_head is left as it is, so leave embed=8 out too"):
            load(folder, "w8:head=8,embed=8", **left)

    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    with pytest.raises(RecipeError, match="input embeddings' too, of which embed=8 would make a copy"):
        quantize(t5, "w8:head=8,embed=8")

    class Hashed(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + ids[..., None]

    with pytest.raises(RecipeError, match="Hashed do more than look up rows"):
        row_factor(Hashed(8, 16))


def test_modules_and_overrides(saved, tmp_path, ids):
    _, folder = saved("llama-gqa")
    overrides = {r"layers\.0\..*down_proj": "w8a8", r"v_proj": "none"}
    q = load(folder, "w4a8", modules_to_not_convert=["layers.2.mlp.up_proj"], overrides=overrides)
    assert floats(q) == [
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.2.self_attn.v_proj",
        "model.layers.2.mlp.up_proj", "lm_head",
    ]  # fmt: skip
    assert (
        q.model.layers[0].mlp.down_proj.recipe.name == "w8a8" and q.model.layers[1].mlp.down_proj.recipe.name == "w4a8"
    )
    q.save_pretrained(tmp_path / "packed")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager"), ids),
        logits(q, ids),
    )


def test_dequantize(saved, ids):
    _, folder = saved("phi3")
    q = load(folder, "w8a8")
    near = logits(q, ids)
    q = q.dequantize()
    assert not any(isinstance(m, QuantLinear) for m in q.modules()) and relative(near, logits(q, ids)) < 0.2
    assert not hasattr(q.config, "quantization_config")


def test_dequantize_after_saving_takes_the_cache_away_too(saved, ids, tmp_path):
    _, folder = saved("llama-gqa")
    q = load(folder, "w8a8kv4")
    assert isinstance(q(ids).past_key_values, TurboQuantCache)
    q.save_pretrained(tmp_path)
    q = q.dequantize()
    assert not any(isinstance(m, QuantLinear) for m in q.modules())
    assert type(q(ids).past_key_values) is DynamicCache


@pytest.mark.parametrize("recipe", ["w4a8kv4", "w8:head=8"])
@pytest.mark.parametrize("feedback", ["random", "self:{}/words.json"])
def test_error_feedback_while_loading(recipe, feedback, saved, tmp_path, ids):
    """The bytes that a loaded model gets by the same moments; what is saved needs no feedback to be read."""
    model, folder = saved("llama-gqa")
    feedback = feedback.format(tmp_path)
    q = load(folder, recipe, feedback=feedback)
    rows = quantize(model, recipe, moments_without_data(model, feedback))
    want, plain = model.state_dict(), load(folder, recipe).state_dict()
    assert len(rows) == 21 + ("head" in recipe)
    got = q.state_dict()
    assert got.keys() == want.keys() == plain.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert any(not torch.equal(got[k], plain[k]) for k in got if k.endswith("q_proj.weight"))
    q.save_pretrained(tmp_path / "packed")
    assert "feedback" not in json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager")
    assert torch.equal(logits(again, ids), logits(q, ids))


def test_adapters_read_the_unquantized_input(saved, ids):
    """LoRA on top: the adapter's share of the output is exactly that of its float input."""
    from peft import LoraConfig, get_peft_model

    _, folder = saved("llama-gqa")
    q = load(folder, "w4a4:freeze=1")
    base = logits(q, ids)
    model = get_peft_model(q, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert relative(logits(model, ids), base) > 0
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 48)
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        share = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(share, x @ a.T @ b.T * layer.scaling["default"], rtol=1e-4, atol=1e-4)


def test_adapters_learn(saved, ids):
    """Gradients reach the adapters of the first layer through quantized ones, and a few steps lower the loss."""
    from peft import LoraConfig, get_peft_model

    _, folder = saved("llama-gqa")
    q = load(folder, "w4a8")
    assert q.hf_quantizer.is_trainable
    model = get_peft_model(q, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    steps = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        first = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
        assert first.abs().sum() > 0
        steps.step(), steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.slow
def test_gguf_is_quantized_after_loading(smollm2_gguf):
    """transformers does not combine GGUF files with a quantization_config; `quantize_model` takes the loaded model."""
    from turboquant.evaluate.models import load as load_model
    from turboquant.layers.convert import Plan, quantize_model
    from turboquant.recipe import parse_recipe

    model, tokenizer = load_model(smollm2_gguf)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    want = logits(model, ids)
    rows = quantize_model(model, Plan(parse_recipe("w8a8")), model.get_output_embeddings())
    assert len(rows) == 30 * 7 and relative(logits(model, ids), want) < 0.05
