"""Norms and MLPs that quantize what they return: found by trying, equal to what ran before, gone on request."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from turboquant.kernels import fused, ops
from turboquant.kernels.cpu.cache import isas
from turboquant.layers.convert import Plan, dequantize_model, quantize_model, quantized
from turboquant.layers.formulas import gate_rule, norm_rule
from turboquant.layers.fuse import explain_fused, fuse, unfuse
from turboquant.layers.fused import DenseHead, FusedMLP, FusedNorm
from turboquant.layers.linear import QuantLinear
from turboquant.recipe import parse_recipe

ODD = {"gpt-oss": (3, 0), "qwen3-next": (2, 3), "lfm2": (0, 0)}  # norms, MLPs fused; others have 6 and 3


# an install without a compiler has none and is supported; where there is one, tests/test_tiny.py fails without it
BUILT = pytest.mark.skipif(not isas(), reason="the native module is not built")


@pytest.fixture
def kernels(monkeypatch):
    """Backends that fuse, as on a GPU: the reference's ops, and how often each was called."""
    calls = []

    def fake(op, spec, device):
        def run(*args):
            calls.append(op)
            return getattr(fused, op)(*args)

        return run if spec.activation_bits == 8 and hasattr(fused, op) else None

    monkeypatch.setattr(ops, "fused", fake)
    return calls


@pytest.fixture
def ids():
    return torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def convert(model, recipe="w4a8"):
    quantize_model(model, Plan(parse_recipe(recipe)), model.get_output_embeddings())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_computes_what_it_computed(name, dtype, tiny, ids, kernels):
    model = tiny(name).to(dtype)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n:
                p.add_(torch.rand_like(p) - 0.5)
    keys, plain = set(model.state_dict()), copy.deepcopy(model)
    convert(model), convert(plain), unfuse(plain)
    assert not any(isinstance(m, FusedNorm | FusedMLP) for m in plain.modules())
    assert {k for k in model.state_dict() if not k.endswith(("_scale", "_zero"))} == keys
    want, before = logits(plain, ids), len(kernels)
    assert before == 0 and torch.equal(logits(model, ids), want)
    norms, mlps = ODD.get(name, (6, 3))
    assert (kernels.count("norm_quantize"), kernels.count("gate_quantize")) == (norms, mlps)


def test_rows_that_the_norm_made_are_what_its_readers_take(tiny, ids, kernels, monkeypatch):
    model = convert(tiny("llama-gqa"))

    def wrong(x, weight, rule, recipe):
        y, rows = fused.norm_quantize(x, weight, rule, recipe)
        return y, type(rows)(rows.codes * 0, rows.unit)

    want = logits(model, ids)
    monkeypatch.setattr(ops, "fused", lambda op, spec, device: wrong if op == "norm_quantize" else None)
    assert not torch.equal(logits(model, ids), want)


def test_no_kernel_no_fusing(tiny, ids, monkeypatch):
    """The formulas run, bit for bit, where the library has no kernel: the reference on a CPU."""
    model = convert(tiny("llama-gqa"))
    spec = model.model.layers[0].mlp.down_proj.slot.spec(torch.float32)
    with ops.use_backend("reference"):
        assert ops.fused("gate_quantize", spec, torch.device("cpu")) is None
        want = logits(model, ids)
        unfuse(model)
        assert torch.equal(logits(model, ids), want)


def test_gradients_take_the_ordinary_way(tiny, ids, kernels):
    model = convert(tiny("llama-gqa"))
    for p in model.parameters():
        p.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    x = torch.randn(1, 3, 48, requires_grad=True)
    model.model.layers[0].input_layernorm(x).sum().backward()
    assert kernels == [] and x.grad.abs().sum() > 0
    with torch.no_grad():
        model.model.layers[0].input_layernorm(x)
    assert kernels == ["norm_quantize"]


def test_an_adapter_on_the_down_product_gets_its_float_input(tiny, ids, kernels):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.seen = base, []

        def forward(self, x):
            self.seen.append(x)
            return self.base(x)

    model = convert(tiny("llama-gqa"))
    want = logits(model, ids)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Adapter(mlp.down_proj)
    kernels.clear()
    assert torch.equal(logits(model, ids), want) and kernels.count("gate_quantize") == 2
    assert mlp.down_proj.seen[0].shape == (2, 12, 64) and mlp.down_proj.seen[0].is_floating_point()


def test_unfuse_puts_the_models_own_modules_back(tiny, ids, kernels):
    model = tiny("llama-gqa")
    own = {n: m for n, m in model.named_modules() if not isinstance(m, nn.Linear)}
    with quantized(model, Plan(parse_recipe("w8a8")), model.lm_head):
        assert isinstance(model.model.layers[0].mlp, FusedMLP)
    assert {n: m for n, m in model.named_modules() if not isinstance(m, nn.Linear)} == own
    convert(model, "w8a8")
    model.double()
    twin = copy.deepcopy(model)
    dequantize_model(model, torch.float64)
    assert {n: m for n, m in model.named_modules() if not isinstance(m, nn.Linear)} == own
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear and logits(model, ids).dtype == torch.float64
    assert isinstance(twin.model.layers[0].mlp.down_proj, QuantLinear), "a copy is its own"
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float64


def test_what_is_not_known_stays(tiny):
    class Odd(type(tiny("llama-gqa").model.norm)):
        def forward(self, x):
            return super().forward(x) * 1.001

    model = tiny("llama-gqa")
    block = model.model.layers[0]
    block.input_layernorm = Odd(48)
    block.post_attention_layernorm.register_forward_hook(lambda *a: None)
    block.mlp.act_fn = nn.Tanh()
    model.model.layers[1].input_layernorm = nn.LayerNorm(48)
    assert "none of the formulas" in norm_rule(block.input_layernorm)
    assert "no formula known" in gate_rule(block.mlp)
    convert(model), unfuse(model)
    why = {r["name"]: r["why"] for r in fuse(model) if not r["fused"]}
    assert {n.removeprefix("model.layers.") for n in why} == {
        "0.input_layernorm", "0.post_attention_layernorm", "0.mlp", "1.input_layernorm"
    }  # fmt: skip
    assert "hooks" in why["model.layers.0.post_attention_layernorm"]
    rows = {r["name"]: r for r in explain_fused(model, torch.bfloat16, "cpu")}
    assert len(rows) == 9 and {n for n, r in rows.items() if r["kernel"] == "none"} >= set(why)
    assert "hooks" in rows["model.layers.0.post_attention_layernorm"]["why"]
    with ops.use_backend("reference"):
        rows = {r["name"]: r for r in explain_fused(model, torch.bfloat16, "cpu")}
    assert "reference" in rows["model.layers.2.mlp"]["why"]
    assert all(r["kernel"] == "none" for r in rows.values())


@BUILT
def test_a_norm_in_another_dtype_is_not_said_to_be_fused(tiny):
    model = convert(tiny("llama-gqa").bfloat16())
    model.model.layers[0].input_layernorm.float()
    rows = {r["name"]: r for r in explain_fused(model, torch.bfloat16, "cpu")}
    other, norm = (rows[f"model.layers.{i}.input_layernorm"] for i in (1, 0))
    assert other["kernel"] == "cpu" and norm["kernel"] == "none" and "its weight is torch.float32" in norm["why"]
    norm, x = model.model.layers[0].input_layernorm, torch.randn(2, 3, model.config.hidden_size).bfloat16()
    assert isinstance(norm, FusedNorm) and torch.equal(norm(x), norm.own[0](x)), "the model's own operations run"


@pytest.mark.parametrize("recipe", ["w4", "w4a4", "a4"])
def test_only_for_inputs_of_8_bit(recipe, tiny):
    assert not any(isinstance(m, FusedNorm | FusedMLP) for m in convert(tiny("llama-gqa"), recipe).modules())


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_the_head_that_stays_has_a_product_of_its_own(name, tiny, ids, monkeypatch):
    """Same names, same parameters (tied ones stay tied), torch's values but for the order of sums; gone on request."""
    model = tiny(name).bfloat16()
    head, embedding, keys = model.lm_head, model.get_input_embeddings(), list(model.state_dict())
    tied = head.weight is embedding.weight
    convert(model)
    ours = model.get_output_embeddings()
    assert type(ours) is DenseHead and ours.weight is head.weight and (ours.weight is embedding.weight) == tied
    assert [k for k in model.state_dict() if not k.endswith(("_scale", "_zero"))] == keys
    rows = [r for r in explain_fused(model, torch.bfloat16, "cpu") if r["op"] == "dense"]
    assert [r["name"] for r in rows] == ["lm_head"]
    calls, real = [], ops.dense
    monkeypatch.setattr(ops, "dense", lambda *a: calls.append(a) or real(*a))
    x = torch.randn(1, 1, ours.in_features).bfloat16()
    with torch.no_grad():
        got, want = ours(x), head(x)
    assert len(calls) == 1 and torch.allclose(got, want, rtol=2**-7, atol=1e-5)
    x.requires_grad_(True)
    ours(x).sum().backward()
    assert len(calls) == 1 and x.grad is not None, "gradients are torch's"
    ours.weight = nn.Parameter(ours.weight * 2)
    unfuse(model)
    assert model.lm_head is head and torch.equal(head(x), 2 * want)


def test_a_head_with_hooks_and_a_quantized_head_stay(tiny):
    model = tiny("llama-gqa")
    model.lm_head.register_forward_hook(lambda *a: None)
    assert type(convert(model).lm_head) is nn.Linear
    assert type(convert(tiny("llama-gqa"), "w4a8:head=8").lm_head) is QuantLinear


@BUILT
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_fuses_norms_and_whole_mlps(name, dtype, tiny, ids):
    """In one call what the modules compute one after another, for a prompt and for a step: no farther than twice what
    plain torch is from the same weights and whole inputs in fp32."""
    model = convert(tiny(name).to(dtype), "w8a8")
    plain = copy.deepcopy(model)
    unfuse(plain)
    rows = explain_fused(model, dtype, "cpu")
    assert {(r["op"], r["kernel"]) for r in rows} >= {("norm_quantize", "cpu"), ("mlp", "cpu")}
    assert all(m.together is None for m in plain.modules() if isinstance(m, QuantLinear))
    exact = copy.deepcopy(plain).float()
    dequantize_model(exact, torch.float32)
    want = logits(exact, ids)

    @torch.no_grad()
    def errors(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache).logits
        return [(y.float() - w).norm() / w.norm() for y, w in ((logits(model, ids), want), (step, want[:, -1:]))]

    with ops.use_backend("reference"):
        floors = errors(plain)
    assert all(e <= 2 * floor < 0.3 for e, floor in zip(errors(model), floors, strict=True))
