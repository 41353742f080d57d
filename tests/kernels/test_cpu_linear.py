"""The native product of int8 rows with packed weights: exact integers, one order of sums, the same bits everywhere."""

import copy
import itertools
import pickle

import pytest
import torch

from turboquant.kernels import ops
from turboquant.kernels.cpu import cache as cpu
from turboquant.kernels.cpu import product
from turboquant.kernels.linear import LinearSpec, LinearState, linear
from turboquant.layers.linear import QuantLinear
from turboquant.maths.activations import Int8Rows
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe, WeightRecipe, parse_recipe

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")
A8 = ActivationRecipe(8)
SHAPES = [(1, 8), (5, 48), (16, 128), (33, 896), (70, 576), (40, 296), (31, 1536), (100, 2432)]
ROWS = (1, 2, 3, 4, 5, 12, 13, 40)


def expected(w, rows, bias, dtype):
    """The contract of csrc/product.h in torch: integers in int64, then fp32 group by group."""
    coded, two = w.coded(), w.stages == 2
    code = (16 * coded.codes[0].long() + coded.codes[1].long()) if two else coded.codes[0].long()
    zero = 16 * coded.zero.long() + 8 if two else coded.zero.long()
    scale = coded.scale.float() / 16 if two else coded.scale.float()
    y = torch.zeros(len(rows.codes), len(code))
    for g in range(scale.shape[1]):
        part = slice(g * w.group, (g + 1) * w.group)
        y = y + (rows.codes[:, part].long() @ (code[:, part] - zero[:, g : g + 1]).T).float() * scale[:, g]
    y = y * rows.unit
    return (y if bias is None else y + bias.float()).to(dtype)


def operands(n, k, bits, group, m):
    w = PackedTensor.quantize(torch.randn(n, k), WeightRecipe(bits, group=group, clip=0))
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return w, Int8Rows(codes, torch.rand(m, 1) + 0.1)


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs start as NaN, so that what is not written shows."""
    empty = torch.empty
    nan = lambda *a, **kw: t.fill_(torch.nan) if (t := empty(*a, **kw)).is_floating_point() else t.fill_(99)  # noqa: E731
    monkeypatch.setattr(product.torch, "empty", nan)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("group", [128, 32, 16, 0])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_of_the_contract(isa, bits, group, monkeypatch, poisoned):
    monkeypatch.setenv("TURBOQUANT_CPU_ISA", isa)
    kinds = itertools.cycle([(torch.float32, None), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
    for (n, k), m in itertools.product(SHAPES, ROWS):
        w, rows = operands(n, k, bits, group, m)
        dtype, kind = next(kinds)
        bias = None if kind is None else torch.randn(n).to(kind)
        got = product.multiply(product.Packed((w, bias)), rows, dtype)[0]
        assert torch.equal(got, expected(w, rows, bias, dtype)), (n, k, m, dtype)


def test_rows_that_lie_apart():
    """Turned, every second one, every second number: as their copy."""
    w = operands(40, 128, 4, 128, 1)[0]
    packed, wide = product.Packed((w, None)), torch.randn(256, 256)
    for x in (wide[:128, :6].T, wide[::2, :128][:5], wide[:3, ::2], wide[:1, :128].expand(4, 128)):
        assert torch.equal(*(product.multiply(packed, y, torch.float32)[0] for y in (x, x.clone().contiguous())))


@pytest.mark.parametrize("bits", [4, 8])
def test_extremes_do_not_overflow(bits):
    """Largest codes against largest rows, one group over a wide row; every instruction set."""
    n, k = 20, 16384
    for sign in (-128, 127):
        full = torch.full((bits // 4, n, k // 2), 255, dtype=torch.uint8)
        w = PackedTensor(full, torch.ones(n, 1, dtype=torch.float16), torch.zeros(n, 1, dtype=torch.uint8))
        for m in (1, 6):
            rows = Int8Rows(torch.full((m, k), sign, dtype=torch.int8), torch.ones(m, 1))
            want = expected(w, rows, None, torch.float32)
            for isa in cpu.isas():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("TURBOQUANT_CPU_ISA", isa)
                    assert torch.equal(product.multiply(product.Packed((w, None)), rows, torch.float32)[0], want)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_alone_is_the_row_of_a_batch_for_any_number_of_threads(bits):
    w, _ = operands(200, 896, bits, 128, 1)
    packed, x = product.Packed((w, None)), torch.randn(37, 896, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = torch.cat([product.multiply(packed, row[None], x.dtype)[0] for row in x])
        for threads, m in itertools.product((1, 2, 3), (2, 4, 5, 12, 37)):
            torch.set_num_threads(threads)
            assert torch.equal(product.multiply(packed, x[:m], x.dtype)[0], want[:m])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "w4a4", "w8a4", "w4a8:group=0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_layers_lie_as_near_to_fp32_as_torch_in_their_dtype(recipe, dtype, m):
    layer = QuantLinear(96, 50, True, parse_recipe(recipe))
    layer.slot.load(torch.randn(50, 96))
    layer.bias.data = torch.randn(50)
    if layer.slot.tracked:
        layer.slot.start()
    x = (torch.randn(2, m, 96) * torch.linspace(0.1, 5, 96)).to(dtype)
    layer.eval()(x)
    slot = layer.slot
    state = LinearState(slot._hot)
    with torch.no_grad():
        with ops.use_backend("cpu"):
            got = ops.linear(x, slot.packed(), layer.bias, slot.recipe.activations, state, slot.spec(dtype))
        want = linear(x.double().float(), slot.packed(), layer.bias, slot.recipe.activations, LinearState(slot._hot))
        plain = linear(x, slot.packed(), layer.bias, slot.recipe.activations, LinearState(slot._hot))
    assert got.dtype == dtype and got.shape == (2, m, 50)
    floor = 1e-5 * want.abs().max()
    assert (got.float() - want).abs().max() <= 2 * (plain.float() - want).abs().max() + floor


def test_rows_that_are_not_finite_stay_alone():
    w, _ = operands(40, 96, 4, 32, 1)
    x = torch.randn(6, 96)
    clean = product.multiply(product.Packed((w, None)), x, x.dtype)[0]
    x[1, 5], x[4, 9] = torch.nan, torch.inf
    got = product.multiply(product.Packed((w, None)), x, x.dtype)[0]
    assert got[[1, 4]].isnan().all() and torch.equal(got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_rounding_inside_the_product_is_rounding_before_it():
    w, _ = operands(64, 576, 4, 64, 1)
    x = torch.randn(30, 640, dtype=torch.bfloat16)[::2, :576]
    spec = LinearSpec(576, 64, 1, 64, 8, torch.bfloat16)
    many = ops.linear(x.repeat(3, 1), w, None, A8, LinearState(), spec)
    one = product.multiply(product.Packed((w, None)), x, x.dtype)[0]
    assert torch.equal(many, one.repeat(3, 1))


def test_nothing_of_the_weight_is_copied_and_new_weights_are_seen():
    layer = QuantLinear(128, 64, False, parse_recipe("w4a8")).eval()
    layer.slot.load(torch.randn(64, 128))
    x = torch.randn(3, 128)
    with ops.use_backend("cpu"):
        first = layer(x)
        packed = layer.slot.states[None].prepared["cpu"]
        held = {t.data_ptr() for t in packed.tensors}
        assert held == {b.data_ptr() for b in layer.buffers()}
        assert not [v for v in vars(packed).values() if isinstance(v, torch.Tensor)]
        layer.weight = layer.weight.flip(1).clone()  # another tensor under the same name, without a word to the slot
        assert not torch.equal(layer(x), first)
        for name in ("weight_scale", "weight_zero"):
            before = layer(x)
            setattr(layer, name, getattr(layer, name).flip(0).clone() + (name == "weight_zero"))
            assert not torch.equal(layer(x), before), name
        twin = copy.deepcopy(layer)
        layer.weight.zero_()
        assert not torch.equal(twin(x), layer(x))
    assert pickle.loads(pickle.dumps(packed)).key is None


def test_what_it_cannot_serve_is_refused():
    refusals = {
        LinearSpec(64, 32, 0, 0, 8): "not packed",
        LinearSpec(64, 32, 1, 64, 8, torch.float64): "float64",
        LinearSpec(131072, 32, 1, 131072, 8): "overflow",
    }
    for spec, words in refusals.items():
        with ops.use_backend("cpu"), pytest.raises(ops.BackendError, match=words):
            ops.choose("linear", spec, torch.device("cpu"))
    assert ops.choose("linear", LinearSpec(64, 33, 1, 64, 8), torch.device("cpu"))[0] == "cpu"
    with pytest.raises(ValueError, match="bias"):
        product.Packed((operands(8, 32, 4, 32, 1)[0], torch.ones(8).double()))
