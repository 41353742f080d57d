"""Decoder layers in two native calls a step: found by trying, the bits of their modules, out of the way when asked."""

import copy

import pytest
import torch
from torch import nn

from turboquant import TurboQuantCache
from turboquant.integrations.transformers import quantize
from turboquant.integrations.transformers.decoder import decoder_rule, explain_decoders
from turboquant.kernels import ops
from turboquant.kernels.cpu.cache import isas
from turboquant.kernels.cpu.step import DecoderStep
from turboquant.layers.convert import dequantize_model
from turboquant.layers.decoder import Step
from turboquant.layers.fused import Decoder, unfuse

pytestmark = pytest.mark.skipif(not isas(), reason="the native module is not built")
FITS = {"llama-mha", "llama-gqa", "llama-mqa", "qwen2", "mistral"}


def prepared(tiny, name="llama-gqa", recipe="w4a8", dtype=torch.bfloat16, **changes):
    model = tiny(name, **changes)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n or "bias" in n:
                p.add_(torch.rand_like(p) - 0.5)
    model = model.to(dtype)
    quantize(model, recipe)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often each of the two calls ran."""
    seen = []
    for name in ("before", "after"):
        own = getattr(DecoderStep, name)

        def noted(self, *args, own=own, name=name):
            seen.append(name)
            return own(self, *args)

        monkeypatch.setattr(DecoderStep, name, noted)
    return seen


def ids(n, batch=2):
    return torch.randint(2, 90, (batch, n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def steps(model, sizes=(90, 1, 1, 3, 1), cache=None):
    """Logits of a prompt of two pages and steps after it."""
    cache = cache or TurboQuantCache(model, "kv4:ring=16,sinks=1,rewind=4")
    return torch.cat([model(ids(n), past_key_values=cache).logits for n in sizes], 1)


def by_modules(model):
    """The same model, whose modules run one after another."""
    plain = copy.deepcopy(model)
    for name, m in list(plain.named_modules()):
        if isinstance(m, Decoder):
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, m.own[0])
    assert not any(isinstance(m, Decoder) for m in plain.modules())
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_architecture_has_the_bits_of_its_modules(name, dtype, tiny, calls):
    model = prepared(tiny, name, dtype=dtype)
    rows = explain_decoders(model, dtype, "cpu")
    assert {r["kernel"] for r in rows} <= ({"cpu"} if name in FITS else {"none"})
    got = steps(model)
    assert len(calls) == (2 * 3 * 4 if name in FITS else 0)  # calls, layers, chunks of up to sixteen rows
    assert torch.equal(got, steps(by_modules(model)))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("recipe", ["w4a8", "w8a8"])
def test_every_instruction_set(isa, recipe, tiny, calls, monkeypatch):
    model = prepared(tiny, "qwen2", recipe, hidden_size=128, intermediate_size=256)
    want = steps(by_modules(model))
    monkeypatch.setenv("TURBOQUANT_CPU_ISA", isa)
    got = steps(model)
    assert calls and torch.equal(got, steps(by_modules(model)))
    assert (got.float() - want.float()).abs().max() < 0.1 * want.float().abs().max()


def test_generate_and_a_padded_batch(tiny, prompt, calls):
    model = prepared(tiny)
    plain = by_modules(model)
    out = [
        m.generate(**prompt(), past_key_values=TurboQuantCache(m, "kv4:ring=16"), max_new_tokens=12, do_sample=False)
        for m in (model, plain)
    ]
    assert len(calls) == 2 * 3 * 11 and torch.equal(*out)


def test_other_caches_and_no_cache_run_the_modules(tiny, calls):
    model = prepared(tiny)
    with torch.no_grad():
        want = model(ids(5)).logits
        model(ids(1), past_key_values=model(ids(5), use_cache=True).past_key_values)
    assert not calls and torch.isfinite(want).all()


def altered(model, what):
    layer = model.model.layers[1]
    if what == "hook":
        layer.self_attn.register_forward_hook(lambda *a: None)
    elif what == "pre-hook":
        layer.mlp.up_proj.register_forward_pre_hook(lambda *a: None)
    elif what == "forward":
        layer.post_attention_layernorm.forward = layer.post_attention_layernorm.forward
    elif what == "adapter":

        class Adapter(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                return self.base(x) + 0.5 * x.mean(-1, keepdim=True)

        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    else:
        layer.input_layernorm.float()


@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward", "adapter", "norm in fp32"])
def test_a_layer_that_was_altered_runs_its_modules(what, tiny, calls):
    model = prepared(tiny)
    if what != "hook":  # whether it has run in two calls before, or not
        steps(model)
        assert len(calls) == 2 * 3 * 4
        calls.clear()
    altered(model, what)
    try:
        got = steps(model)
    except RuntimeError:  # a norm in fp32 gives fp32 to layers of bf16 whichever way it runs
        assert what == "norm in fp32"
        return
    assert len(calls) == 2 * 2 * 4
    if what != "forward":  # what `deepcopy` takes along is bound to the old module
        assert torch.equal(got, steps(by_modules(model)))


def test_gradients_inference_mode_and_a_backend_that_was_asked_for(tiny, calls):
    model, args = prepared(tiny), (torch.randn(2, 1, 48).bfloat16(), torch.ones(2, 1, 16).bfloat16())
    layer = model.model.layers[0]
    run = lambda x: Step(layer).run(x, args[1], args[1])  # noqa: E731
    assert all(p.requires_grad for p in layer.input_layernorm.parameters()) and run(args[0]) is None
    with torch.no_grad():
        assert isinstance(run(args[0]), DecoderStep)
        assert run(args[0].float()) is None and run(args[0][:, :0]) is None  # another dtype, no rows
        assert run(torch.zeros(1, 17, 48).bfloat16()) is None  # more rows than are rounded within the calls
        with ops.use_backend("reference"):
            assert run(args[0]) is None
    with torch.inference_mode():
        assert run(torch.ones(2, 1, 48).bfloat16()) is None
    model.requires_grad_(False)
    assert isinstance(run(args[0]), DecoderStep) and run(args[0].clone().requires_grad_()) is None


def test_weights_that_were_written_or_replaced_count(tiny):
    model = prepared(tiny)
    first = steps(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_scale.mul_(2)
        model.model.layers[1].input_layernorm.weight.data = model.model.layers[1].input_layernorm.weight.data * 2
        model.model.layers[2].self_attn.q_proj.weight = model.model.layers[2].self_attn.q_proj.weight.clone() ^ 1
    second = steps(model)
    assert not torch.equal(first, second) and torch.equal(second, steps(by_modules(model)))


def test_recorded_outputs_and_the_models_own_layers(tiny, calls):
    model = tiny("llama-gqa").bfloat16()
    own = [type(m) for m in model.model.layers]
    quantize(model, "w4a8")
    assert all(
        isinstance(m, t) and type(m).__name__ == t.__name__ for m, t in zip(model.model.layers, own, strict=True)
    )
    cache = TurboQuantCache(model, "kv4")
    with torch.no_grad():
        out = model(ids(4), past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and not calls  # its hooks sit on attention
    unfuse(model)
    assert [type(m) for m in model.model.layers] == own
    dequantize_model(model, torch.bfloat16)
    assert torch.isfinite(steps(model)).all()


@pytest.mark.parametrize("what", ["twice", "scaling", "turn", "order"])
def test_another_formula_is_refused(what, tiny):
    model = prepared(tiny)
    layer = model.model.layers[0].own[0]
    assert decoder_rule(layer) is None
    base, attention = type(layer), type(layer.self_attn)

    class Layer(base):
        def forward(self, hidden_states, **kwargs):
            if what == "twice":
                return super().forward(hidden_states, **kwargs) * 2
            if what == "order":
                return super().forward(hidden_states, **kwargs).flip(0).flip(0) + 1e-3
            return super().forward(hidden_states, **kwargs)

    class Attention(attention):
        def forward(self, hidden_states, position_embeddings, *args, **kwargs):
            if what == "turn":
                position_embeddings = position_embeddings[::-1]
            if what == "scaling":
                twin = copy.copy(self)
                twin.scaling = 2 * self.scaling
                return attention.forward(twin, hidden_states, position_embeddings, *args, **kwargs)
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)

    layer.__class__, layer.self_attn.__class__ = Layer, Attention
    assert isinstance(decoder_rule(layer), str)
