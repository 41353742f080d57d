"""The CUDA and Triton kernels of linear layers against the reference; need a GPU."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from turboquant.kernels import ops
from turboquant.kernels.linear import LinearSpec
from turboquant.layers.linear import QuantLinear
from turboquant.maths.activations import decode_int8, encode_int8
from turboquant.recipe import parse_recipe

pytestmark = pytest.mark.cuda


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("width", [96, 576, 896, 1536, 4096, 14336])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", ["nothing", "norm", "once", "gate", "gelu"])
def test_fused_quantize(width, dtype, before):
    pytest.importorskip("triton")
    from turboquant.kernels.triton.rows import fused_quantize

    x = torch.randn(5, width, device="cuda").to(dtype)
    x[:, 3] *= 40
    options, want = {}, x.float()
    if before == "norm":
        w = torch.rand(width, device="cuda").add(0.5).to(dtype)
        options, want = {"norm": w}, F.rms_norm(x.float(), (width,), None, 1e-6).to(dtype).float() * w.float()
    if before == "once":
        w, kept = torch.rand(width, device="cuda").add(0.5).to(dtype), torch.full_like(x, torch.nan)
        options = {"norm": w, "shift": 1.0, "once": True, "keep": kept}
        want = (F.rms_norm(x.float(), (width,), None, 1e-6) * (1 + w.float())).to(dtype).float()
    if before == "gate":
        g = torch.randn_like(x)
        options, want = {"gate": g}, F.silu(g.float()).to(dtype).float() * x.float()
    if before == "gelu":
        g = torch.randn_like(x)
        options = {"gate": g, "activation": "gelu_tanh"}
        want = F.gelu(g.float(), approximate="tanh").to(dtype).float() * x.float()
    own = relative(decode_int8(encode_int8(want.to(dtype))), want)
    assert 0 < relative(decode_int8(fused_quantize(x, **options)), want) <= 2 * own
    if before == "once":
        torch.testing.assert_close(kept.float(), want, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 40, 3000])
def test_fused_ops_agree_with_the_ordinary_ones(rows):
    """What a model computes with and without them: outputs in the tolerance of the dtype."""
    pytest.importorskip("triton")
    from turboquant.kernels import fused
    from turboquant.kernels.triton import rows as kernel
    from turboquant.recipe import ActivationRecipe

    a8, x, w = ActivationRecipe(8), *(torch.randn(n, 4096, device="cuda").bfloat16() for n in (rows, 1))
    exact = fused.rms_norm(x.float(), w[0].float(), fused.NormRule(1e-6))
    plain, _ = fused.norm_quantize(x, w[0], fused.NormRule(1e-6), a8)
    for _ in range(3):  # launched behind one another, where the next one is set up before the last has ended
        y, q = kernel.norm_quantize(x, w[0], fused.NormRule(1e-6), a8)
        assert relative(y, exact) <= 2 * relative(plain, exact)
        assert relative(decode_int8(q), y.float()) <= 2 * relative(decode_int8(encode_int8(y)), y.float())
    up = torch.randn_like(x)
    exact, plain = F.silu(x.float()) * up.float(), F.silu(x) * up
    q, own = kernel.gate_quantize(x, up, "silu", a8), decode_int8(encode_int8(plain))
    assert relative(decode_int8(q), exact) <= 2 * relative(own, exact)


@pytest.mark.parametrize("name", ["w4a8", "w4a8:group=0", "w8a8", "w8a8:group=0", "w4", "w8", "w4a4"])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_linear(name, rows):
    pytest.importorskip("humming")
    recipe = parse_recipe(name).linear
    layer = QuantLinear(512, 384, True, recipe, "cuda", torch.bfloat16)
    layer.slot.load(torch.randn(384, 512, device="cuda") * 0.05)
    layer.bias.data.normal_()
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        if layer.slot.tracked:
            layer.slot.start()
            layer.slot.follow(x)
        with ops.use_backend("reference"):
            want = layer.slot(x.float(), layer.bias.float())
        got = layer.slot(x, layer.bias)
    assert ops.choose("linear", layer.slot.spec(x.dtype), x.device)[0] == "cuda"
    plain = F.linear(x, layer.slot.dequantized().bfloat16(), layer.bias)
    exact = F.linear(x.float(), layer.slot.dequantized(), layer.bias.float())
    assert relative(got, want) <= 2 * relative(plain, exact)


@pytest.mark.hopper
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 128])
def test_few_rows_run_on_the_bytes_that_humming_holds(group, bits):
    """Which `prepare` finds out, and says so where it is not the case."""
    pytest.importorskip("humming")
    from turboquant.kernels.cuda import product
    from turboquant.packed.tensor import PackedTensor
    from turboquant.recipe import WeightRecipe

    linear = importlib.import_module("turboquant.kernels.cuda.linear")
    weight = PackedTensor.quantize(torch.randn(384, 1024, device="cuda"), WeightRecipe(bits, group=group))
    assert product.refusal(384, 1024, weight.group, bits // 4, weight.scale.device) is None
    ready = linear.prepare(weight, 8, torch.bfloat16)
    assert ready.few == linear.FEW
    spec = LinearSpec(1024, 384, bits // 4, weight.group, 8, torch.bfloat16)
    assert f"csrc/product.cu up to {linear.FEW} rows" in ops.explain_linear(spec, "cuda")[-1]["why"]
    x = encode_int8(torch.randn(linear.FEW + 1, 1024, device="cuda"))
    few = linear.multiply(ready, weight, x.codes[:-1], x.unit[:-1])
    more = linear.multiply(ready, weight, x.codes, x.unit)[:-1]
    exact = (x.codes[:-1] * x.unit[:-1]) @ weight.dequantize().T
    plain = (x.codes[:-1] * x.unit[:-1]).bfloat16() @ weight.dequantize().bfloat16().T
    assert all(relative(y, exact) <= 2 * relative(plain, exact) for y in (few, more))


def test_a_gpu_holds_a_weight_once():
    """The saved codes wait on the host; saving, decoding and another dtype bring back the same bits."""
    pytest.importorskip("humming")
    layer = QuantLinear(512, 384, False, parse_recipe("w4a8").linear, "cuda", torch.bfloat16)
    layer.slot.load(torch.randn(384, 512, device="cuda") * 0.05)
    want, decoded = {k: t.clone() for k, t in layer.state_dict().items()}, layer.slot.dequantized()
    before = layer.slot.nbytes(torch.device("cuda"))
    x = torch.randn(3, 512, device="cuda")
    with torch.no_grad():
        y = layer(x.bfloat16())
        assert not layer.weight.is_cuda and layer.slot.nbytes(torch.device("cuda")) < 1.2 * before
        assert torch.equal(layer(x.bfloat16()), y)
        assert torch.equal(layer.slot.dequantized(), decoded)
        assert relative(layer(x.half()), y) < 0.02, "another dtype is prepared anew"
        with ops.use_backend("reference"):
            assert relative(layer(x.bfloat16()), y) < 0.02
    for key, t in layer.state_dict().items():
        assert torch.equal(t.cuda(), want[key]), key
    assert layer.cuda().weight.is_cuda
