"""Norm or gate, rotation and rounding in one native pass; several products, or a whole MLP, in one native call."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from turboquant.kernels import cpu as kernels
from turboquant.kernels import fused
from turboquant.kernels.cpu import cache as cpu
from turboquant.kernels.cpu import rows as native
from turboquant.kernels.fused import NormRule
from turboquant.kernels.linear import LinearSpec, LinearState, Shared
from turboquant.maths.activations import decode_int8, encode_int8
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe, WeightRecipe

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")
A8 = ActivationRecipe(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = (NormRule(1e-6), NormRule(1e-5, 1.0, True), NormRule(1e-6, 0.0, True), NormRule(1e-6, 1.0))
OF = {
    torch.float32: 2**-20,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # a unit in the last place, and some for fp32


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def on_every_isa(monkeypatch, run):
    """run() on each instruction set; its tensors must be the same bits on all of them."""
    out = []
    for isa in cpu.isas():
        monkeypatch.setenv("TURBOQUANT_CPU_ISA", isa)
        out.append(run())
        for a, b in zip(out[-1], out[0], strict=True):
            assert torch.equal(a, b), isa
    return out[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m, k", [(1, 896), (7, 48), (40, 256)])
def test_norm(dtype, rule, m, k, monkeypatch):
    x, w = (torch.randn(m, k) * torch.logspace(-3, 1, m)[:, None]).to(dtype), torch.rand(k).to(dtype)

    def run():
        y, rows = native.norm_quantize(x, w, rule, A8)
        return y, rows.codes, rows.unit

    y, codes, unit = on_every_isa(monkeypatch, run)
    want = fused.rms_norm(x, w, rule)
    assert y.dtype == dtype and torch.allclose(
        y, want, rtol=OF[dtype] * (1 if rule.once else 2), atol=0
    )  # one or two roundings
    assert dtype == torch.float32 or (y != want).float().mean() < 0.02
    own = encode_int8(y)
    assert torch.equal(codes, own.codes) and torch.equal(unit, own.unit), "rows of the norm's rounded output"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(fused.ACTIVATIONS))
@pytest.mark.parametrize("m, k", [(1, 4864), (7, 48)])
def test_gate(dtype, activation, m, k, monkeypatch):
    both = (torch.randn(2, m, 2 * k) * 4).to(dtype)
    gate, up = both[0, :, :k], both[1, :, :k]  # rows apart, and dense

    def run():
        rows = native.gate_quantize(gate, up, activation, A8)
        return rows.codes, rows.unit

    codes, unit = on_every_isa(monkeypatch, run)
    want = encode_int8(fused.ACTIVATIONS[activation](gate) * up)
    assert torch.allclose(unit, want.unit, rtol=OF[dtype] / 4)
    assert (codes.int() - want.codes.int()).abs().max() <= 1 and (codes != want.codes).float().mean() < 0.02
    exact = F.silu(gate.double()) if activation == "silu" else F.gelu(gate.double(), approximate="tanh")
    exact = exact * up.double()
    assert relative(decode_int8(type(want)(codes, unit)), exact) <= 1.01 * relative(decode_int8(want), exact)


@pytest.mark.parametrize("activation", list(fused.ACTIVATIONS))
def test_activations_are_torchs_everywhere(activation):
    """Large, small, zero and not finite numbers, by the rows' units: one number a row against zeros."""
    values = [0.0, 1e-20, -1e-6, -0.3, 0.6, 0.7, -5.0, -20.0, 80.0, -60.0, 3e38, torch.inf, torch.nan]
    x = torch.zeros(len(values), 16)
    x[:, 3] = torch.tensor(values)
    up = torch.zeros_like(x)
    up[:, 3] = 1
    rows = native.gate_quantize(x, up, activation, A8)
    want = encode_int8(fused.ACTIVATIONS[activation](x) * up)
    assert torch.allclose(rows.unit, want.unit, rtol=1e-5, atol=1e-9, equal_nan=True)


def test_two_dtypes_are_refused():
    x, w = torch.randn(3, 64).bfloat16(), torch.rand(64)
    with pytest.raises(ValueError, match=r"its weight is torch.float32, not torch.bfloat16"):
        native.norm_quantize(x, w, RULES[0], A8)
    with pytest.raises(ValueError, match=r"one dtype, got torch.bfloat16 and torch.float32"):
        native.gate_quantize(x, x.float(), "silu", A8)
    for call in (
        lambda: native.norm_quantize(x.double(), w, RULES[0], A8),
        lambda: native.gate_quantize(w[None].double(), w[None], "silu", A8),
    ):
        with pytest.raises(ValueError, match=r"got torch.float64"):
            call()


def test_other_layouts():
    turned = torch.randn(64, 6).T
    a, b = (
        native.gate_quantize(turned[:3], turned[3:], "silu", A8),
        native.gate_quantize(turned[:3].contiguous(), turned[3:].contiguous(), "silu", A8),
    )
    assert torch.equal(a.codes, b.codes) and torch.equal(a.unit, b.unit)
    y, _ = native.norm_quantize(turned, torch.ones(64), RULES[0], A8)
    assert torch.allclose(y, fused.rms_norm(turned, torch.ones(64), RULES[0]), rtol=1e-5)


def weights(sizes, k, bits, group, dtype):
    made = [PackedTensor.quantize(torch.randn(n, k), WeightRecipe(bits, group=group, clip=0)) for n in sizes]
    return [(w, torch.randn(w.shape[0]).to(dtype) if i % 2 else None) for i, w in enumerate(made)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("known", [False, True])
def test_several_products_are_each_by_itself(dtype, m, known, monkeypatch):
    pairs = weights((70, 16, 33), 96, 4, 32, dtype) + weights((40,), 96, 8, 0, dtype) + weights((9,), 96, 4, 0, dtype)
    x = torch.randn(2, m, 96).to(dtype)
    state = LinearState(shared=Shared())
    if known:
        state.shared.put(x, A8, encode_int8(x))
    got = on_every_isa(monkeypatch, lambda: kernels.linears(x, pairs, A8, state))
    for y, (w, bias) in zip(got, pairs, strict=True):
        assert y.shape == (2, m, w.shape[0]) and torch.equal(y, kernels.linear(x, w, bias, A8, LinearState()))


def test_tensors_that_are_not_on_the_cpu_are_refused():
    ((w, _),) = weights((16,), 96, 4, 32, torch.float32)
    for name in ("codes", "scale", "zero"):
        away = replace(w, **{name: getattr(w, name).to("meta")})
        with pytest.raises(ValueError, match="on the CPU, not on meta"):
            kernels.linears(torch.randn(3, 96), [(w, None), (away, None)], A8, LinearState())
    with pytest.raises(ValueError, match="on the CPU, not on meta"):
        kernels.linear(torch.randn(3, 96), w, torch.randn(16).to("meta"), A8, LinearState())


def test_widths_that_are_not_made_of_sixteens_are_refused():
    for op in ("mlp", "norm_quantize", "gate_quantize"):
        assert "sixteens" in kernels.supports(op, LinearSpec(24, 48, 1, 24, 8), torch.device("cpu"))
    assert kernels.supports("linears", LinearSpec(24, 48, 1, 24, 8), torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("joint", [False, True])
def test_an_mlp_is_its_parts(dtype, m, joint, monkeypatch):
    """Also once a weight has changed where it lies, and once one of its tensors is another."""
    pairs = weights((128,) if joint else (64, 64), 96, 4, 32, dtype) + weights((48,), 64, 8, 32, dtype)
    x, state, before = torch.randn(m, 96).to(dtype), LinearState(), None

    def change(pair, what):
        w, bias = pair
        if what == "codes":
            w.codes.bitwise_not_()
        elif what == "scale":
            w = replace(w, scale=w.scale.flip(0))
        elif what == "bias":
            bias = torch.randn(w.shape[0]).to(dtype)
        return w, bias

    for what in ("nothing", "codes", "scale", "bias"):
        for i in range(len(pairs)):
            pairs[i] = change(pairs[i], what)
            (got,) = on_every_isa(monkeypatch, lambda: [kernels.mlp(x, pairs[:-1], pairs[-1], "silu", A8, state)])
            parts = [kernels.linear(x, w, bias, A8, LinearState()) for w, bias in pairs[:-1]]
            gate, up = parts[0].chunk(2, -1) if joint else parts
            rows = native.gate_quantize(gate, up, "silu", A8)
            want = kernels.product.multiply(kernels.product.Packed(pairs[-1]), rows, dtype)[0]
            assert torch.equal(got, want), (what, i)
            assert what == "nothing" or not torch.equal(got, before), (what, i)
            before = got
    with pytest.raises(ValueError, match="width of down"):
        kernels.mlp(x, pairs[:-1], weights((48,), 32, 8, 32, dtype)[0], "silu", A8, LinearState())
