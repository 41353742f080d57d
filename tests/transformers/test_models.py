"""Every architecture: exact where the ring covers everything, close at 8 bit, and sensitive to what it reads."""

import pytest
import torch

from turboquant.integrations.transformers import TurboQuantCache
from turboquant.recipe import RecipeError

ALL = "kv2:page=16,ring=256,rewind=16"  # 2 bit, and never read


def greedy(model, inputs, cache=None, n=40, **options):
    with torch.no_grad():
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=n, do_sample=False, **options)


def chunks(model, ids, cache, sizes, **kwargs):
    """Logits of ids fed in pieces."""
    out, at = [], 0
    with torch.no_grad():
        for n in sizes:
            out.append(model(input_ids=ids[:, at : at + n], past_key_values=cache, use_cache=True, **kwargs).logits)
            at += n
    return torch.cat(out, 1)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_generate_inside_the_ring_is_the_stock_cache(name, tiny, prompt):
    """Left-padded batch of unequal lengths, greedy, over several pages and, where there is one, past the window."""
    model = tiny(name)
    want = greedy(model, prompt())
    assert len(set(want[0, 40:].tolist())) > 3, "the model says something"
    cache = TurboQuantCache(model, ALL)
    assert torch.equal(greedy(model, prompt(), cache), want)
    assert cache.get_seq_length() == want.shape[1] - 1
    assert all(layer.cache.lengths == [79, 62] for layer in cache.ours)


SIZES = (37, 1, 1, 20, 1, 9, 1)


def test_logits_inside_the_ring(name, tiny, prompt):
    model = tiny(name)
    ids = prompt((sum(SIZES),) * 2)["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    got = chunks(model, ids, TurboQuantCache(model, ALL), SIZES)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_logits_from_pages(name, tiny, prompt):
    """A ring of two tokens: close at 8 bit, farther with fewer; so pages are read, and by every layer of ours."""
    model = tiny(name)
    ids = prompt((sum(SIZES),) * 2)["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    errors = []
    for bits in (8, 4, 2):
        got = chunks(model, ids, TurboQuantCache(model, f"kv{bits}:page=16,ring=2,sinks=0,rewind=2"), SIZES)
        assert got.isfinite().all()
        errors.append(relative(got[:, 37:], want[:, 37:]))
    assert 0 < errors[0] < 0.1 and errors[0] < errors[1] < errors[2] and errors[2] > 3 * errors[0], errors


def test_without_a_cache_it_is_ordinary_attention(name, tiny, prompt):
    """The attention implementation is set on the model; calls without our cache must not notice."""
    model = tiny(name)
    inputs = prompt()
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        tokens = greedy(model, inputs)
        TurboQuantCache(model, "kv4")
        assert model.config._attn_implementation == "turboquant"
        got = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-4)
    assert torch.equal(greedy(model, inputs), tokens), "with the stock cache"


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype, tiny, prompt):
    """Logits are off by no more than twice what the stock model in that dtype is off."""
    model = tiny(name)
    ids = prompt((60,) * 2)["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        model.to(dtype)
        stock = relative(model(ids, use_cache=False).logits.float(), want)
    got = relative(chunks(model, ids, TurboQuantCache(model, ALL), (30, 1, 1, 28)).float(), want)
    assert got <= 2 * stock, (got, stock)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma3", "gpt-oss"])
def test_right_padding_and_unequal_lengths(name, tiny, prompt):
    """A right-padded prompt, then decoding with a hole in the columns: each sequence as if alone."""
    model, recipe = tiny(name), "kv4:page=16,ring=24,sinks=2,rewind=16"
    lengths = (40, 23)
    inputs = prompt(lengths, left=False)
    more = torch.randint(2, 90, (2, 12))
    cache = TurboQuantCache(model, recipe)
    mask, position = inputs["attention_mask"], (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        first = model(inputs["input_ids"], attention_mask=mask, position_ids=position, past_key_values=cache).logits
        rest = []
        for i in range(more.shape[1]):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            at = mask.sum(1, keepdim=True) - 1
            rest.append(model(more[:, i : i + 1], attention_mask=mask, position_ids=at, past_key_values=cache).logits)
        rest = torch.cat(rest, 1)
    for row, n in enumerate(lengths):
        alone = TurboQuantCache(model, recipe)
        ids = torch.cat([inputs["input_ids"][row : row + 1, :n], more[row : row + 1]], 1)
        want = chunks(model, ids, alone, (n, *[1] * 12))
        torch.testing.assert_close(first[row : row + 1, :n], want[:, :n], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(rest[row : row + 1], want[:, n:], rtol=1e-3, atol=1e-3)
        assert cache.ours[0].cache.lengths[row] == alone.ours[0].cache.lengths[0] == n + 12


def test_window_of_each_layer(tiny):
    cache = TurboQuantCache(tiny("gemma3"), "kv4")
    assert [layer.cache.window for layer in cache.ours] == [20, None, 20]
    assert [layer.is_sliding for layer in cache.ours] == [True, False, True]
    assert [x.cache.window for x in TurboQuantCache(tiny("mistral"), "kv4").ours] == [20] * 3


def test_hybrid_layers_are_left_as_they_are(tiny):
    for name in ("qwen3-next", "lfm2"):
        cache = TurboQuantCache(tiny(name), "kv4")
        assert len(cache.ours) == 2 and len(cache.layers) == 3


def test_head_dim_that_the_codec_cannot_take(tiny):
    with pytest.raises(RecipeError, match="head_dim=24"):
        TurboQuantCache(tiny("llama-gqa", head_dim=24), "kv4")


def test_recipe_that_is_unknown_or_leaves_the_cache_alone(tiny):
    from turboquant.recipe import Recipe

    model = tiny("llama-gqa")
    with pytest.raises(RecipeError, match=r"Did you mean 'kv4'"):
        TurboQuantCache(model, "kv5x")
    with pytest.raises(RecipeError, match="leaves the cache alone"):
        TurboQuantCache(model, Recipe())
    assert model.config._attn_implementation == "eager", "refused before anything was changed"
