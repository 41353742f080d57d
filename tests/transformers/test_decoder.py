"""Decoder layers in two native calls a step: found by trying, the bits of their modules, out of the way when asked."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.llama import modeling_llama

from turboquant import TurboQuantCache
from turboquant.integrations.transformers import quantize
from turboquant.integrations.transformers.decoder import decoder_rule, explain_decoders
from turboquant.kernels import ops
from turboquant.kernels.cpu import rows
from turboquant.kernels.cpu.cache import isas
from turboquant.kernels.cpu.step import DecoderStep
from turboquant.layers.convert import dequantize_model
from turboquant.layers.decoder import Formula, Step
from turboquant.layers.fuse import unfuse
from turboquant.layers.fused import Decoder

pytestmark = pytest.mark.skipif(not isas(), reason="the native module is not built")
FITS = {"llama-mha", "llama-gqa", "llama-mqa", "qwen2", "mistral"}
LAYERS = {"qwen3-next": 2, "lfm2": 0}  # layers of three that have an attention and an MLP under these names


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
    """How often each of the two calls ran, by itself or in a call of several layers."""
    seen = []
    for name in ("before", "after"):
        own = getattr(DecoderStep, name)

        def noted(self, *args, own=own, name=name):
            seen.append(name)
            return own(self, *args)

        monkeypatch.setattr(DecoderStep, name, noted)
    several = DecoderStep.in_turn

    def counted(steps, *args):
        seen.extend(["before", "after"] * len(steps))
        return several(steps, *args)

    monkeypatch.setattr(DecoderStep, "in_turn", staticmethod(counted))
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
    assert [r["kernel"] for r in rows] == ["cpu" if name in FITS else "none"] * LAYERS.get(name, 3)
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
    elif what == "norm in bf16":
        layer.input_layernorm.bfloat16()
    else:
        norm = what == "parametrized norm"
        parametrize.register_parametrization(
            *((layer.input_layernorm, "weight") if norm else (layer.self_attn.q_proj, "bias")), Twice()
        )


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


ALTERED = {
    "hook": "self_attn has hooks",
    "pre-hook": "up_proj has hooks",
    "forward": "post_attention_layernorm was given another class or forward",
    "adapter": "no packed weight",
    "norm in bf16": "its weight is torch.bfloat16",
    "parametrized norm": "parametrized",
    "parametrized bias": "no packed weight",
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_layer_that_was_altered_runs_its_modules(what, tiny, calls):
    dtype = torch.float32 if what == "norm in bf16" else torch.bfloat16  # fp32 in front of bf16 raises either way
    model = prepared(tiny, "qwen2", dtype=dtype)
    if what != "hook":  # whether it has run in two calls before, or not
        steps(model)
        assert len(calls) == 2 * 3 * 4
        calls.clear()
    altered(model, what)
    got = steps(model)
    assert len(calls) == 2 * 2 * 4
    rows = explain_decoders(model, dtype, "cpu")
    assert [r["kernel"] for r in rows] == ["cpu", "none", "cpu"] and ALTERED[what] in rows[1]["why"]
    if what != "forward":  # what `deepcopy` takes along is bound to the old module
        assert torch.equal(got, steps(by_modules(model)))


def test_gradients_inference_mode_and_a_backend_that_was_asked_for(tiny, calls):
    model, args = prepared(tiny), (torch.randn(2, 1, 48).bfloat16(), torch.ones(2, 1, 16).bfloat16())
    layer = model.model.layers[0]
    formula = Formula(layer.own[0])
    run = lambda x: Step(layer, formula).run(x, args[1], args[1])  # noqa: E731
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
    steps(model)
    assert len(calls) == 2 * 3 * 4  # and stay there, but record nothing
    assert {r["kernel"] for r in explain_decoders(model, torch.bfloat16, "cpu")} == {"cpu"}
    unfuse(model)
    assert [type(m) for m in model.model.layers] == own
    dequantize_model(model, torch.bfloat16)
    assert torch.isfinite(steps(model)).all()


@torch.no_grad()
def test_angles_of_other_shapes_are_left_to_the_modules(tiny, calls):
    model = prepared(tiny)
    layer, x = model.model.layers[0], torch.randn(2, 3, 48).bfloat16()
    step = Step(layer, Formula(layer.own[0]))
    for shape in ((1, 3, 16), (2, 3, 16)):
        assert isinstance(step.run(x, torch.ones(shape).bfloat16(), torch.ones(shape).bfloat16()), DecoderStep)
    for shape in ((1, 1, 16), (2, 1, 16), (1, 4, 16), (3, 3, 16), (1, 3, 8), (3, 16), (1, 1, 3, 16)):
        assert step.run(x, torch.ones(shape).bfloat16(), torch.ones(shape).bfloat16()) is None
    assert step.run(x, torch.ones(2, 3, 16).bfloat16(), torch.ones(1, 3, 16).bfloat16()) is None
    out = []
    for m in (model, by_modules(model)):
        cache = TurboQuantCache(m, "kv4")
        m(ids(20), past_key_values=cache)
        calls.clear()
        out.append(m(ids(3), past_key_values=cache, position_ids=torch.tensor([[21]])).logits)
        assert not calls
    assert torch.equal(*out)


def test_a_saved_model_is_the_same(tiny, calls):
    model, file = prepared(tiny), io.BytesIO()
    want = steps(model)
    model.model.layers[1].self_attn.q_proj.register_forward_hook(print)
    model.model.layers[2].train()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    first, second, third = again.model.layers
    assert third.training and second.self_attn.q_proj._forward_hooks and type(first) is not type(first.own[0])
    assert first.self_attn is first.own[0].self_attn
    second.self_attn.q_proj._forward_hooks.clear()
    calls.clear()
    assert torch.equal(steps(again.eval()), want) and len(calls) == 2 * 3 * 4


@pytest.mark.parametrize("what", ["attention", "layer", "rotary"])
def test_a_class_that_was_patched_runs_as_patched(what, tiny, calls, monkeypatch):
    model = prepared(tiny)
    plain = by_modules(model)
    want = steps(model)
    owner, name = {
        "attention": (modeling_llama.LlamaAttention, "forward"),
        "layer": (modeling_llama.LlamaDecoderLayer, "forward"),
        "rotary": (modeling_llama, "apply_rotary_pos_emb"),
    }[what]
    own = getattr(owner, name)

    def patched(*args, **kwargs):
        out = own(*args, **kwargs)
        return 2 * out if what == "layer" else (2 * out[0], out[1])

    calls.clear()
    with monkeypatch.context() as m:
        m.setattr(owner, name, patched)
        got = steps(model)
        assert torch.equal(got, steps(plain)) and not torch.equal(got, want) and not calls
        rows = explain_decoders(model, torch.bfloat16, "cpu")
        assert {r["kernel"] for r in rows} == {"none"} and all("when it was tried" in r["why"] for r in rows)
        copied = copy.deepcopy(model)
        assert torch.equal(got, steps(copied)) and not calls
    assert torch.equal(steps(model), want) and len(calls) == 2 * 3 * 4


def test_hooks_do_not_see_what_layers_are_tried_with(tiny):
    model, seen = tiny("llama-gqa").bfloat16(), []
    for m in model.model.layers.modules():
        m.register_forward_hook(lambda *a: seen.append(a))
        m.register_forward_pre_hook(lambda *a, **k: seen.append(a), with_kwargs=True)
    quantize(model, "w4a8")
    explain_decoders(model, torch.bfloat16, "cpu")
    assert not seen


@torch.no_grad()
def test_a_norm_of_other_bytes_at_the_same_place(tiny):
    layer, x, angles = prepared(tiny).model.layers[0], torch.ones(1, 1, 48).bfloat16(), torch.ones(1, 1, 16).bfloat16()
    step = Step(layer, Formula(layer.own[0]))
    assert isinstance(step.run(x, angles, angles), DecoderStep)
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.view(torch.float16)
    assert step.run(x, angles, angles) is None


def test_a_part_that_was_replaced_for_good_is_taken_in(tiny, calls):
    model = prepared(tiny)
    want, layer = steps(model), model.model.layers[1]
    own = layer.self_attn.v_proj
    altered(model, "adapter")
    steps(model)
    calls.clear()
    layer.self_attn.v_proj = own
    assert torch.equal(steps(model), want) and len(calls) == 2 * 3 * 4
    calls.clear()
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(2)
    got = steps(model)
    assert len(calls) == 2 * 3 * 4 and not torch.equal(got, want) and torch.equal(got, steps(by_modules(model)))

    class Other(type(layer.self_attn)):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    calls.clear()
    layer.self_attn = copy.copy(layer.self_attn)
    layer.self_attn.__class__ = Other
    got = steps(model)
    assert len(calls) == 2 * 2 * 4 and torch.equal(got, steps(by_modules(model)))
    assert "attention was LlamaAttention" in explain_decoders(model, torch.bfloat16, "cpu")[1]["why"]


REFUSED = {
    "twice": "adds up otherwise",
    "scaling": "asks attention for more than scaling",
    "turn": "makes queries, keys and values in another way",
    "order": "adds up otherwise",
}


@pytest.mark.parametrize("what", REFUSED)
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
                out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
                return hidden_states + (out + self.mlp(self.post_attention_layernorm(hidden_states + out)))
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
    assert REFUSED[what] in decoder_rule(layer)


@pytest.fixture
def sums(monkeypatch):
    """Additions made by norms, as a backend with such a kernel makes them; no layer runs in two calls."""
    seen, own = [], ops.fused

    def add_norm_quantize(x, y, weight, rule, recipe):
        seen.append(x.shape)
        total = x + y
        return total, *rows.norm_quantize(total, weight, rule, recipe)

    def fused(op, *args):
        return {"add_norm_quantize": add_norm_quantize, "decoder_step": None}.get(op) or own(op, *args)

    monkeypatch.setattr(ops, "fused", lambda op, *args: None if op == "decoder_step" else fused(op, *args))
    return seen


def test_additions_by_norms_have_the_bits_of_the_modules(tiny, sums):
    """With any cache or none; of three layers the last one's second addition has no quantized norm behind it."""
    model = prepared(tiny, "qwen2")
    plain = by_modules(model)
    with torch.no_grad():
        got, want = (m(ids(7)).logits for m in (model, plain))
    assert torch.equal(got, want) and len(sums) == 2 * 3 - 1
    sums.clear()
    assert torch.equal(steps(model), steps(plain)) and len(sums) == 5 * 5
    rows = explain_decoders(model, torch.bfloat16, "cpu")
    assert all(r["kernel"] == "none" and r["why"].endswith("the norms behind its additions make these") for r in rows)
    sums.clear()
    assert (
        torch.equal(steps(copy.deepcopy(model)), steps(plain)) and len(sums) == 3 * 5
    )  # a copy's layers know no other


@pytest.mark.parametrize("what", ALTERED)
def test_additions_of_a_layer_that_was_altered(what, tiny, sums):
    dtype = torch.float32 if what == "norm in bf16" else torch.bfloat16
    model = prepared(tiny, "qwen2", dtype=dtype)
    steps(model)
    sums.clear()
    altered(model, what)
    got = steps(model)
    assert 0 < len(sums) < 5 * 5
    if what != "forward":
        assert torch.equal(got, steps(by_modules(model)))


def test_a_norm_that_is_ahead_is_forgotten(tiny, sums):
    """What an addition left for the next norm is for one call with that very sum: not where a hook replaces or changes
    it, or the norm has hooks of its own."""
    model = prepared(tiny, "qwen2")
    for change in (lambda x: x * 2, lambda x: x.mul_(2)):
        changed, plain = copy.deepcopy(model), by_modules(model)
        quantize_ahead(changed)
        for m in (changed, plain):
            m.model.layers[0].register_forward_hook(lambda module, args, out, change=change: change(out))
        with torch.no_grad():
            assert torch.equal(changed(ids(7)).logits, plain(ids(7)).logits)
    changed, plain = copy.deepcopy(model), by_modules(model)
    quantize_ahead(changed)
    for m in (changed, plain):
        m.model.layers[1].input_layernorm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with torch.no_grad():
        assert torch.equal(changed(ids(7)).logits, plain(ids(7)).logits)


@torch.no_grad()
def test_what_is_ahead_is_the_norm_of_now(tiny, sums):
    """One call finds it; then, or once the sum, the norm or the weight was written or replaced, it is computed."""
    norm = prepared(tiny, "qwen2").model.layers[1].input_layernorm

    def made():
        total = norm.add_ahead(*torch.randn(2, 3, 48).bfloat16())
        return total, norm.ahead._held[2]

    total, held = made()
    assert norm(total) is held and norm(total) is not held and torch.equal(norm(total), held)
    assert norm.ahead._held is None
    total, held = made()
    assert norm(total.clone()) is not held and norm(total) is not held  # a call with another tensor forgets it too
    changes = (
        lambda total, held: held.mul_(2),
        lambda total, held: total.mul_(2),
        lambda total, held: norm.weight.mul_(2),
        lambda total, held: setattr(norm, "weight", nn.Parameter(norm.weight * 2)),
        lambda total, held: setattr(norm.weight, "data", norm.weight * 2),
    )
    for change in changes:
        total, held = made()
        change(total, held)
        assert norm(total) is not held and torch.equal(norm(total), norm(total.clone()))
    total, held = made()
    with ops.use_backend("reference"):
        assert norm(total) is not held
    total, held = made()
    with torch.enable_grad():
        assert norm(total).requires_grad
    total, held = made()
    assert copy.deepcopy(norm).ahead._held is None


@torch.no_grad()
def test_additions_where_norms_cannot_make_them(tiny, sums):
    """A norm whose weight is elsewhere, operands that do not fit, inference mode with tensors made outside of it."""
    model = prepared(tiny, "qwen2")
    norm, (x, y) = model.model.layers[1].input_layernorm, torch.randn(2, 3, 48).bfloat16()
    weight, norm.weight = norm.weight, nn.Parameter(norm.weight.to("meta"))
    assert torch.equal(norm.add_ahead(x, y), x + y)
    norm.weight = weight
    assert torch.equal(norm.add(x, y[:1])[0], x + y[:1])
    with torch.inference_mode():
        assert torch.equal(norm.add_ahead(x, y), x + y)
        model(inputs_embeds=torch.randn(1, 3, 48).bfloat16())
    assert not sums


def test_a_model_whose_norms_are_ahead_is_one_graph(tiny):
    model = prepared(tiny, "qwen2", dtype=torch.float32)
    with torch.no_grad(), ops.use_backend("reference"):
        want = model(ids(5)).logits
        torch.compiler.reset()
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids(5)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def quantize_ahead(model):
    """Make a copy's layers know the norm behind them again."""
    for layer, behind in pairwise(model.model.layers):
        layer.follower = (behind.input_layernorm,)


def test_no_additions_by_norms_where_gradients_or_inference_mode_are(tiny, sums):
    model = prepared(tiny, "qwen2")
    assert all(p.requires_grad for p in model.model.layers[0].input_layernorm.parameters())
    model(ids(5)).logits.float().sum().backward()
    with torch.inference_mode():
        model(ids(5))
    model.train()
    with torch.no_grad():
        model(ids(5))
    assert not sums
