"""The quick tour: one look at every floor of the house, in seconds. `make check` runs it."""

import shutil

import pytest
import torch

import turboquant
from turboquant.kernels import ops
from turboquant.layers.cache import LayerCache
from turboquant.maths import bounds
from turboquant.maths.codebook import lloyd_max
from turboquant.maths.quantizer import TurboQuantMSE
from turboquant.maths.rotation import rotate, unrotate
from turboquant.packed.bits import WIDTHS, pack, unpack
from turboquant.packed.page import PageLayout
from turboquant.recipe import EXAMPLES, RecipeError, parse_recipe


def test_recipe():
    assert [parse_recipe(e).name for e in EXAMPLES] == list(EXAMPLES)
    with pytest.raises(RecipeError, match="Did you mean 'kv4'"):
        parse_recipe("kv5x")


def test_maths():
    levels = lloyd_max(4)
    assert torch.equal(levels, -levels.flip(0)) and abs(levels[8].item() - 0.1284) < 1e-4
    x = torch.randn(500, 96)
    torch.testing.assert_close(unrotate(rotate(x)), x, rtol=0, atol=1e-5)
    x = x / x.norm(dim=-1, keepdim=True)
    q = TurboQuantMSE(96, 4)
    assert bounds.mse_lower(4) < (q.decode(q.encode(x)) - x).square().sum(-1).mean() <= bounds.mse_upper(4)


def test_bytes():
    for bits in WIDTHS:
        codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits), codes)
    for d, key_most, value_most in ((128, 4.65, 4.2), (64, 5.0, 4.35)):
        layout = PageLayout(parse_recipe("kv4").kv, d)
        assert layout.key_bits <= key_most and layout.value_bits <= value_most and layout.page_bytes % 16 == 0


def test_a_kernel_for_every_op():
    assert [row["op"] for row in ops.explain()] == list(ops.OPS)


@pytest.mark.parametrize("recipe", ["kv8:page=16,ring=0,rewind=0", "kv4:page=16,ring=24,rewind=16", "plain4"])
def test_layer_cache(recipe):
    """Two sequences over several pages, in chunks and as a whole: the same bytes, and attention nearly exact."""
    kv = parse_recipe(recipe).kv
    n = 3 * kv.page + 5
    q, k, v = torch.randn(2, 4, n, 64), torch.randn(2, 2, n, 64), torch.randn(2, 2, n, 64)
    whole, pieces = LayerCache(kv), LayerCache(kv)
    whole.step(q, k, v)
    out = [pieces.step(*(x[:, :, i : i + 9] for x in (q, k, v))) for i in range(0, n, 9)]
    for a, b in zip(whole._pages, pieces._pages, strict=True):
        assert len(a) == n // kv.page and torch.equal(whole.buf.pages[a], pieces.buf.pages[b])
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = (torch.cat(out, 2) - exact).norm() / exact.norm()
    assert 0 < error < (0.01 if kv.key_bits == 8 else 0.12)


def test_transformers():
    """A tiny random Llama generates from pages; where the ring covers everything, the stock cache's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, 64, (2, 30))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    want = model.generate(**inputs)
    exact = turboquant.TurboQuantCache(model, "kv2:page=16,ring=64,rewind=16")
    assert torch.equal(model.generate(**inputs, past_key_values=exact), want)
    packed = turboquant.TurboQuantCache(model, "kv4:page=16,ring=0,rewind=0")
    assert model.generate(**inputs, past_key_values=packed).shape == want.shape
    assert packed.nbytes()["pages"] > 0 and packed.bits()[0] > 4


def test_where_there_is_a_compiler_the_native_module_is_built():
    """Without it the install goes on as pure Python, and every test of the native backend would be skipped."""
    from turboquant.kernels.cpu import cache

    if shutil.which("c++") or shutil.which("g++"):
        assert cache.isas(), f"the native module is missing: {cache._missing}"
