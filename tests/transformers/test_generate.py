"""Ways to generate: beams, assistants, chunked prefill, row_exact, memory, and refusals."""

import pytest
import torch

from turboquant.integrations.transformers import TurboQuantCache, TurboQuantConfig, attach
from turboquant.layers.cache import CacheError
from turboquant.packed.page import PageLayout
from turboquant.recipe import RecipeError, parse_recipe

ALL = "kv2:page=16,ring=256,rewind=16"
SMALL = "page=16,ring=24,sinks=2,rewind=16"


def greedy(model, inputs, cache=None, n=40, **options):
    with torch.no_grad():
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=n, do_sample=False, **options)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt-oss"])
def test_beam_search_inside_the_ring_is_the_stock_cache(name, tiny, prompt):
    model = tiny(name)
    want = greedy(model, prompt(), num_beams=3)
    assert not torch.equal(want, greedy(model, prompt())), "beams differ from greedy"
    assert torch.equal(greedy(model, prompt(), TurboQuantCache(model, ALL), num_beams=3), want)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_beam_search_over_page_boundaries(name, tiny, prompt):
    """Reading pages that beams share: the score of what it found is the one the exact model gives it."""
    model = tiny(name)
    cache = TurboQuantCache(model, f"kv8:{SMALL}")
    out = greedy(
        model, prompt(), cache, num_beams=3, return_dict_in_generate=True, output_scores=True, length_penalty=0.0
    )
    assert all(c.cache.lengths == [79] * 3 + [62] * 3 for c in cache.ours)
    ids = out.sequences
    mask = torch.cat([prompt()["attention_mask"], torch.ones(2, 40, dtype=torch.long)], 1)
    with torch.no_grad():
        logs = model(ids, attention_mask=mask, use_cache=False).logits[:, 39:-1].log_softmax(-1)
    exact = logs.gather(-1, ids[:, 40:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, exact, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_a_cache_of_fixed_capacity_generates_the_same(name, tiny, prompt):
    model, recipe = tiny(name), f"kv4:{SMALL}"
    fixed = TurboQuantCache(model, recipe, max_tokens=100)
    want = greedy(model, prompt(), TurboQuantCache(model, recipe))
    assert torch.equal(greedy(model, prompt(), fixed), want)
    assert {c.cache.buf.table.shape for c in fixed.ours} == {(2, 6)}
    length = fixed.get_seq_length()
    fixed.advance(-1)  # as after the capture of a step
    assert fixed.get_seq_length() == length - 1 and {c.cache.lengths[0] for c in fixed.ours} == {length - 1}
    with pytest.raises(CacheError, match="static"):
        TurboQuantCache(model, recipe).advance(1)
    with pytest.raises(CacheError, match="more than the cache's capacity of 60"):
        greedy(model, prompt(), TurboQuantCache(model, recipe, max_tokens=60))
    with pytest.raises(RecipeError, match="max_tokens=0"):
        TurboQuantCache(model, recipe, max_tokens=0)


def repetitive(prompt):
    """A prompt that a lookup can continue, with surprises."""
    ids = prompt((12,))["input_ids"].repeat(1, 4)
    ids[0, 17], ids[0, 30] = 5, 9
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("recipe", [f"kv4:{SMALL}", f"kv2:{SMALL}", "kv4:page=16,ring=0,sinks=0,rewind=8", ALL])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_prompt_lookup_is_plain_greedy(name, recipe, tiny, prompt, monkeypatch):
    """Every row reads what a decode step reads, and rejected tokens leave no trace: the same tokens."""
    model, inputs = tiny(name), repetitive(prompt)
    plain, assisted = TurboQuantCache(model, recipe), TurboQuantCache(model, recipe)
    plain.row_exact = assisted.row_exact = True  # the first step of assisted decoding holds prompt and candidates
    crops = []
    crop = TurboQuantCache.crop
    monkeypatch.setattr(TurboQuantCache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
    want = greedy(model, inputs, plain, 60)
    got = greedy(model, inputs, assisted, 60, prompt_lookup_num_tokens=6)
    assert torch.equal(got, want)
    assert sum(c != 0 for c in crops) > 3, "candidates were rejected"


@pytest.mark.parametrize("recipe", [f"kv4:{SMALL}", ALL])
def test_assistant_model_is_plain_greedy(recipe, tiny, prompt):
    model, assistant, inputs = tiny("llama-gqa"), tiny("llama-gqa", num_hidden_layers=2), repetitive(prompt)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    caches = [TurboQuantCache(model, recipe) for _ in range(2)]
    for c in caches:
        c.row_exact = True
    want = greedy(model, inputs, caches[0], 50)
    assert torch.equal(greedy(model, inputs, caches[1], 50, assistant_model=assistant), want)


def test_verify_steps_need_no_row_exact(tiny, prompt):
    """Chunks of up to rewind+1 tokens read exactly what single steps read, with row_exact off."""
    model = tiny("llama-gqa")
    ids = prompt((90,))["input_ids"]
    one, many = TurboQuantCache(model, f"kv2:{SMALL}"), TurboQuantCache(model, f"kv2:{SMALL}")
    with torch.no_grad():
        for c in (one, many):
            model(ids[:, :40], past_key_values=c)
        a = torch.cat([model(ids[:, i : i + 1], past_key_values=one).logits for i in range(40, 90)], 1)
        b = torch.cat([model(ids[:, i : i + 10], past_key_values=many).logits for i in range(40, 90, 10)], 1)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_row_exact(tiny, prompt):
    model = tiny("llama-gqa").double()  # in fp32 a key differs between chunks by a rounding, and a code at a tie by one
    ids = prompt((90,))["input_ids"]

    def logits(row_exact, step):
        cache = TurboQuantCache(model, "kv2:page=16,ring=0,sinks=0,rewind=0")
        cache.row_exact = row_exact
        assert cache.row_exact is row_exact
        with torch.no_grad():
            return torch.cat([model(ids[:, i : i + step], past_key_values=cache).logits for i in range(0, 90, step)], 1)

    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits(True, 90), logits(False, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(False, 90), exact, rtol=1e-4, atol=1e-4)
    assert (logits(True, 90) - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt-oss"])
def test_chunked_prefill(name, tiny, prompt):
    model = tiny(name)
    want = greedy(model, prompt())
    for size in (8, 17):
        cache = TurboQuantCache(model, ALL)
        assert torch.equal(greedy(model, prompt(), cache, prefill_chunk_size=size), want)


def test_continue_a_conversation(tiny, prompt):
    """generate, append, generate with the same cache: as one long greedy run would read it."""
    model, inputs = tiny("llama-gqa"), prompt((40,))
    cache = TurboQuantCache(model, ALL)
    first = greedy(model, inputs, cache, 20)
    longer = torch.cat([first, torch.tensor([[7, 8, 9]])], 1)
    second = greedy(model, dict(input_ids=longer, attention_mask=torch.ones_like(longer)), cache, 20)
    want = greedy(model, dict(input_ids=longer, attention_mask=torch.ones_like(longer)), None, 20)
    assert torch.equal(second, want)


def test_repeating_and_selecting_sequences(tiny, prompt):
    """Each sequence three times in a row, then some of them: the next logits are those of the sequences meant."""
    model, next_token = tiny("llama-gqa"), torch.tensor([[5]])
    cache = TurboQuantCache(model, f"kv4:{SMALL}")
    mask = torch.cat([prompt()["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    ids = prompt()["input_ids"]
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
        model(next_token.repeat(2, 1), attention_mask=mask, past_key_values=cache)
        cache.crop(-1)
        cache.batch_repeat_interleave(3)
        assert cache.ours[0].cache.lengths == [40] * 3 + [23] * 3
        cache.batch_select_indices(torch.tensor([4, 0]))
        cache.batch_select_indices(torch.tensor([True, True]))
        got = model(next_token.repeat(2, 1), attention_mask=mask[[1, 0]], past_key_values=cache).logits
        want = model(torch.cat([ids, next_token.repeat(2, 1)], 1), attention_mask=mask, use_cache=False).logits[:, -1:]
    assert cache.ours[0].cache.lengths == [24, 41]
    error = lambda i, j: (got[i] - want[j]).norm().item()  # noqa: E731
    assert error(0, 1) < 0.5 * error(0, 0) and error(1, 0) < 0.5 * error(1, 1)


def test_a_crop_that_is_refused_changes_no_layer(tiny, prompt):
    """The first layer could take the tokens back, the second has released the pages."""
    model = tiny("gemma3", layer_types=["full_attention", "sliding_attention", "full_attention"])
    cache = TurboQuantCache(model, f"kv4:{SMALL}")
    with torch.no_grad():
        model(**prompt((80, 80)), past_key_values=cache)
    with pytest.raises(CacheError, match="released pages"):
        cache.crop(-30)
    assert [c.cache.lengths for c in cache.ours] == [[80, 80]] * 3 and cache.get_seq_length() == 80


def test_crop_of_tokens_to_keep_is_the_older_meaning(tiny, prompt):
    """transformers before 5.18 names the length to keep."""
    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, f"kv4:{SMALL}")
    with torch.no_grad():
        model(**prompt((40, 40)), past_key_values=cache)
    cache.crop(36)
    assert cache.get_seq_length() == 36
    cache.crop(-3)
    assert cache.get_seq_length() == 33
    cache.crop(40)
    cache.crop(0)
    assert cache.get_seq_length() == 33


def test_memory(tiny, prompt):
    """The ring stays as it is while pages grow; no other tensor is kept."""
    model, recipe = tiny("llama-gqa"), f"kv4:{SMALL}"
    kv = parse_recipe(recipe).kv
    layout = PageLayout(kv, 16)
    cache = TurboQuantCache(model, recipe)
    with pytest.raises(CacheError, match="empty"):
        cache.bits()
    assert cache.nbytes() == {"pages": 0, "ring": 0, "state": 0, "total": 0}
    ids, sizes = prompt((400,) * 2)["input_ids"], []
    with torch.no_grad():
        for at in range(0, 400, 80):
            model(ids[:, at : at + 80], past_key_values=cache)
            sizes.append(cache.nbytes())
    assert len({s["ring"] for s in sizes}) == len({s["state"] for s in sizes}) == 1
    layers, rows, heads = 3, 2, 2
    assert sizes[0]["ring"] == layers * rows * heads * 2 * (kv.ring_slots + kv.sinks) * 16 * 4
    pages = layers * rows * (400 // kv.page)
    assert sizes[-1]["pages"] <= pages * (heads * layout.page_bytes + 4) * 9 / 8 + layers * heads * layout.page_bytes
    assert sizes[-1]["pages"] >= pages * heads * layout.page_bytes
    assert sizes[-1]["total"] == sum(sizes[-1][n] for n in ("pages", "ring", "state"))
    assert cache.bits() == (layout.key_bits, layout.value_bits)
    for layer in cache.ours:
        held = [x for o in (layer, layer.cache) for x in vars(o).values() if torch.is_tensor(x)]
        assert not held and layer.keys is None and layer.values is None


def test_nonfinite_tokens_are_counted(tiny, prompt):
    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, f"kv4:{SMALL}")
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
        assert cache.nonfinite_tokens == 0
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
        model(prompt((1, 1))["input_ids"], past_key_values=cache)
    assert cache.nonfinite_tokens >= 2


def test_another_model_is_refused(tiny, prompt):
    cache = TurboQuantCache(tiny("llama-gqa"), "kv4")
    other = tiny("llama-gqa", seed=1)
    TurboQuantCache(other, "kv4")
    with pytest.raises(ValueError, match=r"made for another model \(llama\)"):
        greedy(other, prompt(), cache)
    assert cache.get_seq_length() == 0


def test_training_is_refused(tiny, prompt):
    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, "kv4")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train()(**prompt(), past_key_values=cache)


def test_shared_keys_and_values_are_refused(tiny):
    from turboquant.integrations.transformers.attention import attention_forward

    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, "kv4")
    module = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    pending, _ = cache.update(k, k, 0)
    attention_forward(module, q, pending, pending, None)
    with pytest.raises(ValueError, match="shares keys and values between layers"):
        attention_forward(module, q, pending, pending, None)


def test_mask_that_is_not_the_chunks(tiny):
    from turboquant.integrations.transformers.attention import attention_forward

    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, "kv4")
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    pending, _ = cache.update(k, k, 0)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 3, 9\).*2-D padding mask"):
        attention_forward(model.model.layers[0].self_attn, q, pending, pending, torch.ones(1, 1, 3, 9).bool())


def test_offloading_is_refused(tiny):
    with pytest.raises(CacheError, match="cannot be offloaded"):
        TurboQuantCache(tiny("llama-gqa"), "kv4").ours[0].offload()


def test_reset_makes_it_new(tiny, prompt):
    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, f"kv4:{SMALL}")
    first = greedy(model, prompt(), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(model, prompt(), cache), first)


def quantized(model, inputs, **options):
    return greedy(model, inputs, n=30, return_dict_in_generate=True, **options).past_key_values


def test_attach_and_remove(tiny, prompt):
    model = tiny("gemma3")
    want = greedy(model, prompt())
    handle = attach(model, ALL)
    cache = quantized(model, prompt())
    assert isinstance(cache, TurboQuantCache) and cache.recipe.name == parse_recipe(ALL).name
    assert torch.equal(greedy(model, prompt()), want), "a fresh cache for each call"
    with torch.no_grad():
        assert isinstance(model(**prompt()).past_key_values, TurboQuantCache)
        assert model(**prompt(), use_cache=False).past_key_values is None
    mine = TurboQuantCache(model, f"kv8:{SMALL}")
    assert quantized_same(model, prompt(), mine)
    handle.remove()
    assert not isinstance(quantized(model, prompt()), TurboQuantCache)
    assert torch.equal(greedy(model, prompt()), want)


def quantized_same(model, inputs, cache):
    """A cache that is given is used."""
    out = greedy(model, inputs, cache, 5, return_dict_in_generate=True)
    return out.past_key_values is cache and cache.get_seq_length() > 0


def test_attach_refuses_at_once(tiny):
    from turboquant.recipe import RecipeError

    with pytest.raises(RecipeError, match="head_dim=24"):
        attach(tiny("llama-gqa", head_dim=24), "kv4")
    with pytest.raises(RecipeError, match="unknown recipe"):
        attach(tiny("llama-gqa"), "kv5x")


def test_attached_model_warns_about_a_cache_it_does_not_replace(tiny, prompt):
    from transformers import DynamicCache

    model = tiny("llama-gqa")
    attach(model, "kv4")
    stock = DynamicCache(config=model.config)
    ids = prompt((20,))["input_ids"]
    with torch.no_grad():
        key = torch.zeros(1, 2, 1, 16)
        for i in range(3):
            stock.update(key, key, i)
        with pytest.warns(UserWarning, match="was given a DynamicCache of its own"):
            model(ids, past_key_values=stock)
    assert stock.get_seq_length() == 21


def test_quantization_config_round_trip(tiny, prompt, tmp_path):
    """from_pretrained with the config, generate, save_pretrained, from_pretrained without it."""
    from transformers import AutoModelForCausalLM

    recipe = parse_recipe(f"kv4:{SMALL}").name
    tiny("llama-gqa").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=TurboQuantConfig(recipe))
    cache = quantized(model, prompt())
    assert isinstance(cache, TurboQuantCache) and cache.recipe.name == recipe
    want = greedy(model, prompt())
    model.save_pretrained(tmp_path / "quantized")
    assert recipe in (tmp_path / "quantized" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert again.config.quantization_config.recipe == recipe
    assert isinstance(quantized(again, prompt()), TurboQuantCache)
    assert torch.equal(greedy(again, prompt()), want)


def test_quantization_config_says_what_is_wrong():
    from turboquant.recipe import RecipeError

    assert TurboQuantConfig().recipe == "kv4"
    with pytest.raises(RecipeError, match="Did you mean 'kv4'"):
        TurboQuantConfig("kv5x")
    with pytest.raises(ValueError, match=r"takes recipe=\.\.\., .* got also \['bits'\]"):
        TurboQuantConfig("kv4", bits=4)


def test_a_replaced_cache_is_not_gone_on_with(tiny, prompt):
    """The caller's own DynamicCache stays empty: going on with it would lose the history without a word."""
    from transformers import DynamicCache

    from turboquant.integrations.transformers import attach

    model = tiny("llama-gqa")
    handle = attach(model, f"kv4:{SMALL}")
    ids, mine = prompt()["input_ids"], DynamicCache(config=model.config)
    out = model(ids, past_key_values=mine)
    with pytest.raises(CacheError, match="which stays empty"):
        model(ids[:, -1:], past_key_values=mine)
    model(ids[:, -1:], past_key_values=out.past_key_values)
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 1
    handle.remove()
