"""What a quantized layer keeps beside its buffers, and what it does with inputs and gradients of every kind."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from turboquant.layers.convert import Plan, check_names, quantize_model, targets
from turboquant.layers.fused import FusedMLP
from turboquant.maths.activations import HotTracker
from turboquant.maths.weights import encode_weight
from turboquant.recipe import RecipeError, parse_recipe

SIZES = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
RECIPES = ("w4", "w8", "w4a8", "w8a8", "w4a4", "w8a4", "a8", "a4")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_that_is_loaded_after_a_call_counts(seeded, recipe):
    one, two, x = seeded(recipe, 0), seeded(recipe, 1), torch.randn(5, 96)
    with torch.no_grad():
        two(x), one(torch.randn(7, 96) * torch.linspace(0.1, 9, 96))
        state = {k: t.clone() for k, t in one.state_dict().items()}
        want = one(x)
        nn.ModuleDict({"a": two}).load_state_dict({f"a.{k}": t for k, t in state.items()})
        assert torch.equal(two(x), want)


@pytest.mark.parametrize("recipe", ["w4a4", "w8a4", "a4"])
def test_channels_may_drift_outside_of_the_inference_mode_they_were_chosen_in(seeded, recipe):
    one, two = seeded(recipe), seeded(recipe)
    first, then = (torch.randn(64, 96) * scale for scale in (torch.linspace(0.1, 9, 96), torch.linspace(99, 0.1, 96)))
    with torch.inference_mode():
        one(first)
    with torch.no_grad():
        two(first)
        for _ in range(20):
            got, want = one(then), two(then)
        assert torch.equal(got, want)
        assert not torch.equal(one.slot._state(one.slot.tracker)["weight_x_hot"], seeded(recipe).weight_x_hot)


@pytest.mark.parametrize("recipe", RECIPES)
def test_biases_learn_from_inputs_that_do_not(seeded, recipe):
    layer = seeded(recipe)
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 5, 96)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 15.0))


def test_biases_of_an_mlp_learn_from_inputs_that_do_not():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SIZES, mlp_bias=True), attn_implementation="eager"
    ).eval()
    quantize_model(model, Plan(parse_recipe("w8a8")), model.lm_head)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, FusedMLP)
    for names in (("gate_proj", "up_proj", "down_proj"), ("down_proj",)):
        model.requires_grad_(False)
        for name in names:
            getattr(mlp, name).bias.requires_grad_(True).grad = None
        mlp(torch.randn(2, 3, 48)).sum().backward()
        assert all(getattr(mlp, name).bias.grad.abs().sum() > 0 for name in names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_input_of_one_dimension(seeded, recipe):
    layer, x = seeded(recipe), torch.randn(96)
    want = seeded(recipe)(x[None])
    assert torch.equal(layer(x), want[0])
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad.shape == (96,) and x.grad.abs().sum() > 0


@pytest.mark.parametrize("stages", [1, 2])
def test_weights_beyond_the_scales_are_refused(stages):
    with pytest.raises(ValueError, match="beyond fp16"):
        encode_weight(torch.randn(4, 32) * 1e7, 32, stages)
    encode_weight(torch.randn(4, 32) * 1e4, 32, stages)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(32, 32)})}) for _ in range(2))
        self.head = nn.Linear(32, 8)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["mlp"], []),
        (["layers.0"], [1]),
        (["layers.1.mlp"], [0]),
        (["layers.1.mlp.up"], [0]),
        (["up"], []),
        ([], [0, 1]),
    ],
)
def test_what_is_in_a_module_that_is_left_alone_is_too(skip, left):
    model = Model()
    plan = Plan(parse_recipe("w8a8"), skip=skip)
    check_names(model, plan, skip, model.head)
    assert [n for n, *_ in targets(model, plan, model.head)] == [f"layers.{i}.mlp.up" for i in left]
    assert len(quantize_model(model, plan, model.head)) == len(left)
    with pytest.raises(RecipeError, match="'ml', to be left as it is, names no module"):
        check_names(model, plan, ["ml"], model.head)


def test_overrides_are_of_linear_layers_alone():
    with pytest.raises(RecipeError, match="'w8a8kv4' for 'up' has more than weights or activations"):
        Plan(parse_recipe("w4"), overrides={"up": "w8a8kv4"})


def test_output_embeddings_that_a_model_lacks_are_not_asked_for():
    with pytest.raises(RecipeError, match="'w8:head=8': this model has no output embeddings"):
        check_names(Model(), Plan(parse_recipe("w8:head=8")))


def test_a_tracker_takes_the_scale_of_its_first_tokens():
    """What it starts from says how channels compare, whatever its unit."""
    prior, x = torch.linspace(1, 5, 32), 0.01 * torch.randn(64, 32)
    found = []
    for unit in (1.0, 1000.0):
        tracker = HotTracker(torch.ones(32), 2, prior * unit)
        tracker.update(x)
        found.append(tracker.power)
    torch.testing.assert_close(found[0], found[1])
    assert found[0].mean() < 0.01
