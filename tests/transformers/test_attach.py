"""A cache that is attached, copied, asked for what it does not do: what happens, and what is said."""

import copy
import io

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from turboquant import TurboQuantCache, TurboQuantConfig
from turboquant.integrations.transformers import attach, quantize
from turboquant.layers.convert import norm_prior
from turboquant.recipe import RecipeError

SMALL = "page=16,ring=24,sinks=2,rewind=16"


def load(folder, recipe, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", quantization_config=TurboQuantConfig(recipe, **options)
    )


def test_one_cache_is_attached_at_a_time(tiny, prompt):
    model = tiny("llama-gqa")
    handle = attach(model, f"kv4:{SMALL}")
    with pytest.raises(RecipeError, match=r"a cache attached already; remove\(\) its handle"):
        attach(model, "kv8")
    handle.remove()
    attach(model, f"kv8:{SMALL}")
    with torch.no_grad():
        assert model(**prompt()).past_key_values.recipe.name.startswith("kv8")


def test_an_offloaded_cache_is_not_replaced_silently(tiny):
    model = tiny("llama-gqa")
    attach(model, "kv4")
    (hook,) = model._forward_pre_hooks.values()
    given = DynamicCache(config=model.config)
    assert hook(model, (), {"past_key_values": given})[1]["past_key_values"] is not given
    given = DynamicCache(config=model.config)
    given.offloading = True
    with pytest.warns(UserWarning, match="given a DynamicCache of its own: that cache is used"):
        assert hook(model, (), {"past_key_values": given})[1]["past_key_values"] is given


def test_an_attached_model_is_saved_whole(tiny, prompt):
    model = tiny("llama-gqa")
    quantize(model, f"w8a8kv4:{SMALL}")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        out, want = again(**prompt()), model(**prompt())
    assert isinstance(out.past_key_values, TurboQuantCache) and torch.equal(out.logits, want.logits)


def test_training_goes_without_a_cache(tiny, prompt):
    model = tiny("llama-gqa").train()
    attach(model, "kv4")
    out = model(**prompt(left=False))
    assert not isinstance(out.past_key_values, TurboQuantCache)
    out.logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_gradients_through_a_cache_are_refused(tiny, prompt):
    """They would lack what attention gives."""
    model = tiny("llama-gqa")
    attach(model, "kv4")
    out = model(**prompt())
    with pytest.raises(RuntimeError, match="a TurboQuantCache gives no gradients: call the model with use_cache=False"):
        out.logits.sum().backward()
    model(**prompt(), use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_a_copy_of_a_cache_goes_on_by_itself(name, tiny, prompt):
    """As for prompts that share a prefix."""
    model, ids = tiny(name), prompt((70,))["input_ids"]
    cache = TurboQuantCache(model, f"kv4:{SMALL}")
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        other = copy.deepcopy(cache)
        want = model(ids[:, 50:], past_key_values=cache).logits
        assert other.get_seq_length() == 50
        assert torch.equal(model(ids[:, 50:], past_key_values=other).logits, want)


def test_beams_in_less_than_a_page(tiny, prompt):
    model, ids = tiny("llama-gqa"), prompt((20,))
    found = [
        model.generate(**ids, past_key_values=c, max_new_tokens=20, num_beams=3, do_sample=False)
        for c in (TurboQuantCache(model, "kv4", max_tokens=60), None)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m[:, :, :, :1] * 0 - 0.5 + m, "only weaken a logit"),
        (lambda m: m.expand(1, 4, 8, 8), "a 2-D padding"),
    ],
)
def test_masks_that_are_no_masks_are_refused(change, says, tiny):
    model, ids = tiny("llama-gqa"), torch.arange(2, 10)[None]
    causal = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        want = model(ids, attention_mask=causal, past_key_values=TurboQuantCache(model, "kv4")).logits
        assert torch.equal(model(ids, past_key_values=TurboQuantCache(model, "kv4")).logits, want)
        with pytest.raises(ValueError, match=says):
            model(ids, attention_mask=change(causal), past_key_values=TurboQuantCache(model, "kv4"))


def test_models_with_attention_of_their_own_are_refused_at_once():
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(RecipeError, match="BloomForCausalLM computes attention in its own way"):
        attach(bloom.eval(), "kv4")
    with pytest.raises(RecipeError, match="model='smollm2' is not allowed: a model of transformers"):
        TurboQuantCache("smollm2")


def test_a_cache_does_not_take_a_recipe_of_layers_that_are_not_quantized(tiny, saved):
    for make in (TurboQuantCache, attach):
        with pytest.raises(RecipeError, match="'w4a8kv4' is of linear layers too, which a cache leaves alone"):
            make(tiny("llama-gqa"), "w4a8kv4")
    assert TurboQuantCache(load(saved("llama-gqa")[1], "w4a8"), "w4a8kv4").recipe.kv is not None


def test_a_quantized_model_is_not_quantized_again(saved):
    model = load(saved("llama-gqa")[1], "w4a8")
    for recipe in ("w8a8", "kv4"):
        with pytest.raises(RecipeError, match="quantized already"):
            quantize(model, recipe)
    assert model.config.quantization_config.recipe == "w4a8"
    model.dequantize()
    assert len(quantize(model, "w8a8")) == 21


def test_dequantized_layers_have_the_dtype_of_the_model(saved, prompt):
    model = load(saved("llama-gqa")[1], "w4a8").to(torch.bfloat16)
    model.dequantize()
    with torch.no_grad():
        assert model(**prompt()).logits.dtype == torch.bfloat16


def test_dequantized_experts_come_back_in_the_shape_they_had(saved, prompt, tmp_path):
    """gpt-oss has stacks (E, K, N)."""
    model = load(saved("gpt-oss")[1], "w8a8")
    model.dequantize()
    model.save_pretrained(tmp_path / "float")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float", attn_implementation="eager")
    ids = prompt((12,))["input_ids"]
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(again(ids).logits, want, rtol=1e-4, atol=1e-4)
        model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()})
        assert torch.equal(model(ids).logits, want)


def test_a_head_that_is_not_there_is_not_asked_for(saved):
    with pytest.raises(RecipeError, match="no output embeddings for head=8"):
        AutoModel.from_pretrained(saved("llama-gqa")[1], quantization_config=TurboQuantConfig("w4a8:head=8"))


@pytest.mark.parametrize(("name", "shift"), [("llama-gqa", 0.0), ("gemma3", 1.0)])
def test_trackers_start_from_the_norm_before(name, shift, saved):
    """Gemma multiplies by one more than the weight."""
    model, folder = saved(name)
    with torch.no_grad():
        weight = model.model.layers[1].input_layernorm.weight
        weight.copy_(torch.linspace(0.2, 3, len(weight)))
    model.save_pretrained(folder)
    torch.testing.assert_close(norm_prior(model, "model.layers.1.self_attn.q_proj"), weight.detach() + shift)
    started = load(folder, "a4").model.layers[1].self_attn.q_proj.weight_x_power
    want = (weight.detach() + shift).square()
    torch.testing.assert_close(started / started.mean(), want / want.mean())


def test_sequences_packed_into_a_row_do_not_see_each_other(tiny):
    """Without a cache, by their position_ids alone: the mask that says so is not skipped."""
    model, ids = tiny("llama-gqa"), torch.arange(2, 42)[None]
    at = torch.cat([torch.arange(15), torch.arange(25)])[None]
    with torch.no_grad():
        want = model(ids, position_ids=at, use_cache=False).logits
        alone = model(ids[:, 15:], use_cache=False).logits
        attach(model, "kv4")
        got = model(ids, position_ids=at, use_cache=False).logits
    torch.testing.assert_close(want[:, 15:], alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
