"""QuantLinear, QuantExperts and conversion: what they compute, keep, move and refuse."""

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from turboquant.kernels import reference
from turboquant.kernels.linear import LinearState
from turboquant.kernels.ops import use_backend
from turboquant.layers.convert import Plan, dequantize_model, quantize_model, quantized, targets
from turboquant.layers.linear import QuantExperts, QuantLinear
from turboquant.recipe import RecipeError, parse_recipe

RECIPES = ("w4a8", "w8a8", "w4a4", "a8", "a4", "w4", "w8", "w8a4:group=0,ahot=0")


def relative(got, want):
    return float((got - want).detach().norm() / want.detach().norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_output_is_near_the_float_layer_and_the_nearer_the_more_bits(make, recipe):
    layer, w = make(recipe)
    x = torch.randn(2, 20, 96)
    x[..., 3] *= 20
    error = relative(layer(x), F.linear(x, w, layer.bias))
    r = layer.recipe
    bits = min(r.weights.bits if r.weights else 8, r.activations.bits if r.activations else 8)
    assert 0 < error < (0.025 if bits == 8 else 0.25), error


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dict_round_trip_is_bit_identical(make, recipe):
    layer, _ = make(recipe)
    x = torch.randn(40, 96)
    layer(x)
    other, _ = make(recipe)
    other.load_state_dict(layer.state_dict())
    other.slot.forget()
    more = torch.randn(10, 96) * torch.linspace(0.1, 8, 96)
    assert torch.equal(layer(more), other(more))
    for key, t in layer.state_dict().items():
        assert torch.equal(t, other.state_dict()[key]), key


def test_specs_are_the_buffers(make):
    for recipe in RECIPES:
        layer, _ = make(recipe)
        specs = layer.slot.specs("weight", (48, 96), layer.recipe)
        assert {k: (tuple(b.shape), b.dtype) for k, b in layer.named_buffers()} == specs


def test_moves_keep_dtypes(make):
    layer, _ = make("w4a4")
    kinds = {k: b.dtype for k, b in layer.named_buffers()}
    for moved in (layer.half(), layer.bfloat16(), layer.double(), layer.to("cpu", torch.float16), layer.float()):
        assert {k: b.dtype for k, b in moved.named_buffers()} == kinds
    assert layer.bias.dtype == torch.float32
    meta = copy.deepcopy(layer).to("meta")
    assert all(b.is_meta for b in meta.buffers())


def test_a_copy_is_its_own(make):
    layer, _ = make("w4a4")
    twin = copy.deepcopy(layer)
    x = torch.randn(50, 96)
    x[:, 9] *= 40
    before = twin.weight_x_power.clone()
    layer(x)
    assert torch.equal(twin.weight_x_power, before) and not torch.equal(layer.weight_x_power, before)


def test_hot_columns_follow_the_tracker(make):
    """Inputs that change their large channels: once the tracker has seen it, they cost no more than before."""
    layer, w = make("w8a4", bias=False)
    errors = []
    for large in ([3, 50], [7, 80]):
        x = torch.randn(64, 96)
        x[:, large] *= 50
        for _ in range(16):
            y = layer(x)
        errors.append(relative(y, F.linear(x, w)))
        assert set(large) <= set(layer.weight_x_hot.tolist())
    assert max(errors) < 0.03, errors


def test_a_frozen_tracker_makes_outputs_independent_of_what_came_before(make):
    layer, _ = make("w4a4:freeze=32")
    layer(torch.randn(32, 96))
    x = torch.randn(5, 96)
    want = layer(x)
    layer(100 * torch.randn(60, 96))
    assert torch.equal(layer(x), want) and int(layer.weight_x_seen) == 32


def test_hot_buffers_are_changed_in_place(make):
    layer, _ = make("w4a4")
    layer(torch.randn(8, 96))
    where = [layer.weight_x_hot.data_ptr(), layer.weight_x_sigma.data_ptr(), layer.slot._hot.weight.data_ptr()]
    x = torch.randn(400, 96)
    x[:, [1, 2, 3, 4, 5, 6]] *= 90
    layer(x)
    now = [layer.weight_x_hot.data_ptr(), layer.weight_x_sigma.data_ptr(), layer.slot._hot.weight.data_ptr()]
    assert now == where and {1, 2, 3, 4, 5, 6} == set(layer.weight_x_hot.tolist())


class Experts(nn.Module):
    """Fused stacks as transformers holds them."""

    def __init__(self, transposed=False, bias=False):
        super().__init__()
        self.is_transposed, self.has_gate, self.act_fn = transposed, True, F.silu
        up, down = torch.randn(4, 64, 48) * 0.3, torch.randn(4, 48, 32) * 0.3
        turn = (lambda t: t.mT.contiguous()) if transposed else (lambda t: t)
        self.gate_up_proj, self.down_proj = nn.Parameter(turn(up)), nn.Parameter(turn(down))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 64))
            self.down_proj_bias = nn.Parameter(torch.randn(4, 48))

    def _apply_gate(self, y):
        gate, up = y.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for e, p in zip(index[t].tolist(), weights[t], strict=True):
                up, down = self.gate_up_proj[e], self.down_proj[e]
                up, down = (up.T, down.T) if self.is_transposed else (up, down)
                b1, b2 = (getattr(self, f"{n}_proj_bias", None) for n in ("gate_up", "down"))
                y = F.linear(x[t], up, None if b1 is None else b1[e])
                y = F.linear(self._apply_gate(y), down, None if b2 is None else b2[e])
                out[t] += p * y
        return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_experts(recipe, transposed, bias):
    model = nn.ModuleDict({"experts": Experts(transposed, bias)})
    x, index, p = torch.randn(12, 48), torch.randint(0, 4, (12, 2)), torch.rand(12, 2)
    index[:, 1] = (index[:, 0] + 1) % 4
    want = model.experts(x, index, p)
    rows = quantize_model(model, Plan(parse_recipe(recipe)))
    assert isinstance(model.experts, QuantExperts)
    assert [r["name"] for r in rows] == ["experts.gate_up_proj", "experts.down_proj"]
    error = relative(model.experts(x, index, p), want)
    eight = "4" not in recipe.split(":")[0]
    assert 0 < error < (0.03 if eight else 0.4), error
    dequantize_model(model)
    if model.experts.recipe.linear is None:
        plain = relative(model.experts(x, index, p), want)
        assert plain <= error * 1.2


def small():
    return nn.ModuleDict(
        {
            "a": nn.ModuleDict({"q_proj": nn.Linear(64, 32), "o_proj": nn.Linear(32, 64, bias=False)}),
            "b": nn.ModuleDict({"q_proj": nn.Linear(64, 32), "conv": nn.Conv1d(4, 4, 3)}),
            "head": nn.Linear(64, 100, bias=False),
        }
    ).eval()


def test_plan_skips_and_overrides():
    plan = Plan(parse_recipe("w4a8kv4"), skip=["b.q_proj"], overrides={r"a\.o_": "w8", r"\.o_proj": "none"})
    found = {n: r.name for n, _, r in targets(small(), plan, None)}
    assert found == {"a.q_proj": "w4a8", "a.o_proj": "w8", "head": "w4a8"}
    model = small()
    found = {
        n for n, _, _ in targets(model, Plan(parse_recipe("w4"), skip=["q_proj"], overrides={"o_": "none"}), model.head)
    }
    assert found == set()
    found = {n: r.name for n, _, r in targets(model, Plan(parse_recipe("w4a4:head=8"), skip=["q_proj"]), model.head)}
    assert found == {"a.o_proj": "w4a4:head=8", "head": "w8"}


def test_plan_refuses_what_it_cannot_mean():
    for overrides, words in (({"(": "w4"}, "regular expression"), ({"a": "kv4"}, "kv4"), ({"a": "w5"}, "w5")):
        with pytest.raises(RecipeError, match=words):
            Plan(parse_recipe("w4"), overrides=overrides)


def test_a_layer_that_cannot_be_packed_is_named():
    with pytest.raises(RecipeError, match=r"^odd: .*\(N, 30\).*modules_to_not_convert"):
        list(targets(nn.ModuleDict({"odd": nn.Linear(30, 16)}), Plan(parse_recipe("w4"))))


def test_embeddings_that_cannot_be_packed_are_named():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 12), "head": nn.Linear(12, 16)})
    model.get_input_embeddings = lambda: model.embed
    for recipe, name in (("w8:embed=8", "embed"), ("w8:head=8", "head")):
        with pytest.raises(RecipeError, match=rf"^{name}: .*\(N, 12\).*modules_to_not_convert"):
            list(targets(model, Plan(parse_recipe(recipe)), model.head))


def test_an_unknown_stack_of_experts_is_never_skipped_silently():
    class OddExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 32, 16))

    model = nn.ModuleDict({"mlp": OddExperts()})
    with pytest.raises(RecipeError, match=r"mlp\.w1 is a stack of weights"):
        quantize_model(model, Plan(parse_recipe("w4")))
    assert quantize_model(model, Plan(parse_recipe("w4"), skip=["mlp"])) == []


def test_quantize_model_reports_true_bits_and_errors():
    model, seen = small(), []
    rows = quantize_model(model, Plan(parse_recipe("w8a8")), progress=lambda *a: seen.append(a))
    assert seen[-1] == ("layers", 4, 4)
    for r in rows:
        k = r["shape"][1]
        assert r["bits"] == pytest.approx(parse_recipe("w8").weights.bits_per_weight(k))
        assert 0.001 < r["error"] < 0.01 and r["bytes"] < r["bytes_before"] / 2
    assert sum(r["bytes"] for r in rows) == sum(
        b.nbytes for m in model.modules() if isinstance(m, QuantLinear) for b in m.buffers()
    )


def test_within_the_context_only():
    model = small()
    kept = {n: m for n, m in model.named_modules()}
    x = torch.randn(3, 64)
    want = model.a.q_proj(x)
    with quantized(model, Plan(parse_recipe("w4a8"))):
        assert isinstance(model.a.q_proj, QuantLinear) and not torch.equal(model.a.q_proj(x), want)
    assert {n: m for n, m in model.named_modules()} == kept and torch.equal(model.a.q_proj(x), want)


def test_dequantize_gives_plain_layers_of_the_same_weights():
    model = small()
    x = torch.randn(3, 64)
    quantize_model(model, Plan(parse_recipe("w4a8")))
    weight = model.a.q_proj.slot.dequantized()
    near = model.a.q_proj(x)
    dequantize_model(model)
    assert type(model.a.q_proj) is nn.Linear and torch.equal(model.a.q_proj.weight, weight)
    assert relative(near, model.a.q_proj(x)) < 0.02


def test_error_feedback_reaches_the_layer():
    mix = torch.randn(64, 64)
    x = torch.randn(500, 64) @ mix
    moment = x.T @ x / len(x)
    errors, plan = [], Plan(parse_recipe("w4a8"), skip=["o_proj", "b.q_proj", "head"])
    for moments in (None, {"a.q_proj": moment}):
        torch.manual_seed(1)
        model = small()
        want = model.a.q_proj(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (row,) = quantize_model(model, plan, moments=moments)
        assert row["feedback"] == (moments is not None)
        errors.append(relative(model.a.q_proj(x), want))
    assert errors[1] < 0.85 * errors[0], errors


def test_weights_without_error_feedback_are_named():
    """Once, for all that have no moments: output embeddings, stacks of experts. Layers that stay floats are none."""
    model = nn.ModuleDict({"experts": Experts(), "dense": small()})
    plan = Plan(parse_recipe("w4a8:head=8"), overrides={"o_proj": "a8"})
    moments = {f"dense.{n}.q_proj": torch.eye(64) for n in "ab"} | {"dense.a.o_proj": torch.eye(32)}
    with pytest.warns(UserWarning, match="without error feedback") as seen:
        rows = quantize_model(model, plan, model.dense.head, moments)
    assert {r["name"] for r in rows if r["feedback"]} == {"dense.a.q_proj", "dense.b.q_proj"} and len(rows) == 6
    (said,) = [str(w.message) for w in seen]
    assert said.startswith("3 of 5 weights")
    assert said.endswith(": experts.gate_up_proj, experts.down_proj, dense.head")


@pytest.mark.parametrize("recipe", ["w4a8", "w4a4"])
def test_native_products_stand_between_compiled_graphs(make, recipe):
    """The compiler does not look into them: addresses that they were given stay valid."""
    layer, _ = make(recipe)
    x = torch.randn(3, 96)
    with torch.no_grad(), use_backend("cpu"):
        want = layer(x)
        compiled = torch.compile(layer, backend="eager")
        assert all(torch.equal(compiled(x), want) for _ in range(3))
    torch.compiler.reset()  # the broken graph is kept by the code that all layers share


@pytest.mark.parametrize("recipe", ["w4a8", "w4a4", "w4"])
def test_the_linear_of_gpus_is_one_operator_of_a_compiled_model(make, recipe, monkeypatch):
    """With a product that needs no GPU."""
    linear = importlib.import_module("turboquant.kernels.cuda.linear")
    layer, _ = make(recipe)

    def product(rows, input_scale=1.0):
        return F.linear(rows * input_scale, decoded)

    product.torch_dtype = torch.float32
    decoded, recipe, hot = layer.slot.packed().dequantize(), layer.slot.recipe.activations, layer.slot.state().hot
    monkeypatch.setattr(linear, "prepare", lambda weight, bits, dtype: linear.Prepared([product], 0))
    state = LinearState(hot)
    run = lambda x, bias: linear.linear(x, layer.slot.packed(), bias, recipe, state)  # noqa: E731
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x, bias = torch.randn(3, 96), torch.randn(48)
    with torch.no_grad():
        with pytest.raises(Exception, match="call the model once with inputs in"):
            compiled(x, bias)
        want = run(x, bias)
        assert torch.equal(compiled(x, bias), want) and torch.equal(compiled(x, bias + 1), run(x, bias + 1))
        state = copy.deepcopy(state)  # a copied model's first call has a number of its own
        run(x, bias)
        assert torch.equal(compiled(x, bias), want)
        plain = reference.linear(x, layer.slot.packed(), bias, recipe, state)
    torch.testing.assert_close(want, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["w4a8", "w8", "w4a4", "a8"])
def test_compiles_as_one_graph(make, recipe):
    """After one ordinary call, which chooses the kernel; trackers stand still then."""
    layer, _ = make(recipe)
    x = torch.randn(3, 96)
    with torch.no_grad():
        with pytest.raises(Exception, match="once before it is compiled"):
            torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)(x)
        with use_backend("reference"):  # auto-round-lib's calls cannot be traced
            layer(x)
            seen = layer.state_dict()
            want = layer.slot(x, layer.bias)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        got = compiled(x)
        with use_backend("triton"), pytest.raises(Exception, match=r"'triton' was asked for.*runs on 'reference'"):
            compiled(x)
    with pytest.raises(Exception, match="compute no gradients"):
        compiled(x.clone().requires_grad_())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, seen[key]) for key, t in layer.state_dict().items())


def test_codes_that_a_backend_holds_in_its_own_layout_are_stowed_away(make, monkeypatch):
    """As on a GPU, with a weight that says it is on one: once the whole weight is prepared, never before."""

    class OnGPU(torch.Tensor):
        is_cuda = True

        def cpu(self):
            return self.as_subclass(torch.Tensor).clone()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for make_slots in (1, 4):
        if make_slots == 1:
            module, _ = make("w4a8")
            slot = module.slot
        else:
            model = nn.ModuleDict({"experts": Experts()})
            quantize_model(model, Plan(parse_recipe("w4a8")))
            module = model.experts
            slot = module.slots["gate_up_proj"]
        saved = module._buffers[slot.name].clone()
        module._buffers[slot.name] = saved.as_subclass(OnGPU)
        want = {k: t.clone().as_subclass(torch.Tensor) for k, t in module.state_dict().items()}
        x = torch.randn(5, slot.shape[-1])
        for e in range(make_slots):
            assert isinstance(module._buffers[slot.name], OnGPU)
            expert = None if make_slots == 1 else e
            slot(x, None, expert)
            slot.states[expert].prepared["cuda"] = [torch.zeros(2000)]
            slot(x, None, expert)
        assert type(module._buffers[slot.name]) is torch.Tensor
        assert slot.nbytes(x.device, read=True) == make_slots * 8000
        assert all(torch.equal(t, want[k]) for k, t in module.state_dict().items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_the_float_layer_with_the_decoded_weight(make, recipe):
    layer, _ = make(recipe)
    layer.bias.requires_grad_(True)
    x, g = torch.randn(2, 5, 96, requires_grad=True), torch.randn(2, 5, 48)
    with torch.no_grad():
        want = layer(x)
    y = layer(x)
    assert torch.equal(y, want)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ layer.slot.dequantized())
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))
