"""Layers that read one input run in one call: with the bits they have alone, and never those of another input."""

import copy
import pickle

import pytest
import torch

from turboquant.kernels import cpu as kernels
from turboquant.kernels import ops
from turboquant.kernels.cpu import cache as cpu
from turboquant.layers.linear import QuantLinear
from turboquant.layers.together import Together
from turboquant.recipe import parse_recipe

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")


@pytest.fixture
def layers():
    made = []
    for n in (48, 16, 32):
        layer = QuantLinear(64, n, n == 16, parse_recipe("w4a8")).eval()
        layer.slot.load(torch.randn(n, 64))
        if layer.bias is not None:
            layer.bias.data = torch.randn(n)
        made.append(layer)
    return made


@pytest.fixture
def calls(monkeypatch):
    """How many weights each native call took."""
    seen, real = [], kernels.linears
    run = lambda x, pairs, *rest: seen.append(len(pairs)) or real(x, pairs, *rest)  # noqa: E731
    monkeypatch.setattr(ops, "fused", lambda op, spec, device: run if op == "linears" else None)
    return seen


def tie(layers):
    together = Together(layers)
    for layer in layers:
        layer.together = together
    return layers


@torch.no_grad()
def outputs(layers, x):
    return [layer(x) for layer in layers]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_with_the_bits_of_each(layers, calls, dtype):
    x = torch.randn(2, 3, 64).to(dtype)
    alone = outputs(layers, x)
    tie(layers)
    assert same(outputs(layers, x), alone) and calls == [3]
    assert same(outputs(layers, x), alone) and calls == [3, 3], "each output is given once"
    assert same(outputs(layers[::-1], x), alone[::-1]) and calls == [3] * 3


def test_another_or_a_changed_input_or_weight_is_computed_anew(layers, calls):
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    twins = copy.deepcopy(layers)
    tie(layers)
    with torch.no_grad():
        layers[0](x)
        assert torch.equal(layers[1](y), twins[1](y)) and torch.equal(layers[2](x), twins[2](x)) and calls == [3] * 3
        layers[0](x)
        x.mul_(2)
        assert torch.equal(layers[1](x), twins[1](x)) and calls == [3] * 4
        layers[0](y)
        layers[1].weight.bitwise_not_(), twins[1].weight.bitwise_not_()
        assert torch.equal(layers[1](y), twins[1](y)) and calls == [3] * 6
        layers[0](y)
        layers[2].weight, twins[2].weight = layers[2].weight.flip(0), twins[2].weight.flip(0)
        assert torch.equal(layers[2](y), twins[2](y)) and calls == [3] * 7
        layers[0](y)
        layers[1].bias.add_(1), twins[1].bias.add_(1)
        assert torch.equal(layers[1](y), twins[1](y)) and calls == [3] * 8, "that of layer 0 was left from before"
        layers[0](y)
        layers[2].weight_scale.mul_(2), twins[2].weight_scale.mul_(2)
        assert torch.equal(layers[2](y), twins[2](y)) and calls == [3] * 9


def test_weights_that_are_elsewhere_are_not_read(layers, calls):
    """As accelerate's cpu_offload has them: on meta but while their own layer runs."""
    x = torch.randn(3, 64)
    alone = outputs(layers, x)
    tie(layers)
    kept = [dict(layer._buffers) for layer in layers]
    away = [{name: t.to("meta") for name, t in buffers.items()} for buffers in kept]
    for layer, buffers in zip(layers, away, strict=True):
        layer._buffers.update(buffers)
    for layer, here, meta, want in zip(layers, kept, away, alone, strict=True):
        layer._buffers.update(here)
        assert torch.equal(outputs([layer], x)[0], want)
        layer._buffers.update(meta)
    assert calls == []


def test_nothing_is_kept_longer_than_its_input(layers, calls):
    tie(layers)
    x = torch.randn(3, 64)
    with torch.no_grad():
        layers[0](x)
    assert layers[0].together.kept._last is not None
    del x
    assert layers[0].together.kept._last is None


def test_gradients_and_inference_mode_take_the_ordinary_way(layers, calls):
    tie(layers)
    x = torch.randn(3, 64, requires_grad=True)
    sum(layer(x).sum() for layer in layers).backward()
    with torch.inference_mode():
        z = torch.randn(3, 64)
        [layer(z) for layer in layers]
    assert calls == [] and x.grad.abs().sum() > 0


def test_another_backend_is_not_given_what_this_one_made(layers):
    x = torch.randn(3, 64)
    twins = copy.deepcopy(layers)
    tie(layers)
    with torch.no_grad():
        layers[0](x)
        with ops.use_backend("reference"):
            assert torch.equal(layers[1](x), twins[1](x))


def test_copies_are_their_own(layers):
    tie(layers)
    x = torch.randn(3, 64)
    want = outputs(layers, x)
    with torch.no_grad():
        layers[0](x)
    for twins in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert twins[0].together is twins[2].together is not layers[0].together
        assert twins[0].together.layers == twins and same(outputs(twins, x), want)
