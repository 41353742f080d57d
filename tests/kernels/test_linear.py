"""Linear ops: the reference against plain products, every backend that runs here against it, and who is chosen."""

import importlib
import importlib.util
import platform
import sys
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from turboquant.kernels import ops
from turboquant.kernels.cpu import cache as cpu
from turboquant.kernels.linear import Hot, LinearSpec, LinearState, Shared, dequantize, linear, quantize
from turboquant.maths.rotation import rotate, unrotate
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe, WeightRecipe

A8, A4 = ActivationRecipe(8), ActivationRecipe(4)
SPEC = LinearSpec(64, 32, 1, 64, 8)


def relative(got, want):
    return float((got.float() - want).norm() / want.norm())


def hot_of(w, index):
    sigma = torch.rand(len(index)) + 0.5
    return Hot(index, sigma, w[:, index] * sigma)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", [None, A8, A4])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_reference_is_the_product_of_what_the_operands_stand_for(bits, activations, dtype, bias):
    x, w = torch.randn(2, 5, 64).to(dtype), torch.randn(32, 64)
    b = torch.randn(32).to(dtype) if bias else None
    stored = rotate(w) if activations and bits < 16 else w
    weight = PackedTensor.quantize(stored, WeightRecipe(bits)) if bits < 16 else w.to(dtype)
    decoded = weight.dequantize() if bits < 16 else weight.float()
    plain = unrotate(decoded) if activations and bits < 16 else decoded
    hot = hot_of(plain, torch.tensor([1, 40])) if activations is A4 else None
    seen = x.float() if activations is None else dequantize(quantize(x, activations, hot), hot)
    want = F.linear(seen, plain, None if b is None else b.float())
    got = linear(x, weight, b, activations, LinearState(hot))
    assert got.shape == (2, 5, 32) and got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2 * relative(F.linear(seen.to(dtype), plain.to(dtype), b), want)
    assert relative(got, want) <= tolerance


def test_no_rows():
    w = PackedTensor.quantize(torch.randn(32, 64), WeightRecipe(4))
    assert linear(torch.randn(0, 64), w, None, A8, LinearState()).shape == (0, 32)


def test_an_input_that_several_layers_read_is_quantized_once():
    shared, calls = Shared(), []
    make = lambda: calls.append(1) or object()  # noqa: E731
    x = torch.randn(3, 64)
    first = shared.take(x, A8, make)
    assert shared.take(x, A8, make) is first and len(calls) == 1
    assert shared.take(x.clone(), A8, make) is not first, "another tensor"
    shared.take(x, A8, make)
    x.mul_(2)
    assert len(calls) == 3 and shared.take(x, A8, make) and len(calls) == 4, "changed in place"
    assert shared.take(x, A4, make) and len(calls) == 5, "another recipe"
    del x
    assert shared._last is None, "nothing is kept of a tensor that is gone"


def test_sharing_changes_no_output():
    w = [PackedTensor.quantize(torch.randn(32, 64), WeightRecipe(4)) for _ in range(2)]
    shared = Shared()
    for _ in range(3):
        x = torch.randn(4, 64)
        for one in w:
            want = linear(x, one, None, A8, LinearState())
            assert torch.equal(linear(x, one, None, A8, LinearState(shared=shared)), want)


def test_explain_names_a_kernel_for_every_op_and_says_what_is_missing():
    rows = ops.explain_linear(SPEC)
    assert [r["op"] for r in rows] == list(ops.LINEAR_OPS) and all(r["kernel"] and r["why"] for r in rows)
    assert {r["kernel"] for r in rows} <= set(ops.BACKENDS)
    product = rows[-1]
    assert "cuda: tensors are on cpu" in product["why"]
    if cpu.isas():
        assert product["kernel"] == "cpu"
    if importlib.util.find_spec("auto_round_kernel") is None:
        product = ops.explain_linear(replace(SPEC, activation_bits=16))[-1]
        assert product["kernel"] == "reference" and "pip install 'turboquant[cpu]'" in product["why"]


def test_a_backend_that_was_asked_for_runs_or_says_why_not():
    x, w = torch.randn(3, 64), PackedTensor.quantize(torch.randn(32, 64), WeightRecipe(4))
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="cuda: tensors are on cpu"):
        ops.linear(x, w, None, A8, LinearState(), SPEC)
    with ops.use_backend("reference"):
        assert torch.equal(ops.linear(x, w, None, A8, LinearState(), SPEC), linear(x, w, None, A8, LinearState()))


HAS_LIBRARY = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="auto-round-lib has wheels for x86-64 alone",
)
BUILT = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "activations",
    [pytest.param(None, marks=HAS_LIBRARY), pytest.param(A8, marks=BUILT), pytest.param(A4, marks=BUILT)],
)
@pytest.mark.parametrize("shape", [(32, 64), (576, 1536), (96, 896)])
def test_cpu_backend(bits, activations, shape):
    """auto-round-lib (rows of 16 bit) and the native product against the reference: no farther than twice what int8
    rows lose anyway."""
    n, k = shape
    w = PackedTensor.quantize(torch.randn(n, k), WeightRecipe(bits))
    spec = LinearSpec(k, n, w.stages, w.group, activations.bits if activations else 16)
    hot = hot_of(torch.randn(n, k), torch.tensor([2, 30])) if activations is A4 else None
    for dtype in (torch.float32, torch.bfloat16):
        x, b = torch.randn(2, 3, k).to(dtype), torch.randn(n).to(dtype)
        want = linear(x, w, b, activations, LinearState(hot))
        with ops.use_backend("cpu"):
            got = ops.linear(x, w, b, activations, LinearState(hot), spec)
        assert got.dtype == dtype and got.shape == want.shape
        lost = relative(dequantize(quantize(x, A8)), x.float())
        assert relative(got, want.float()) <= 2 * lost


def test_the_native_rows_are_used_where_they_are_built(monkeypatch):
    """The hook for `quantize_rows`: called with rows and block, its codes and units are what the product gets."""
    from turboquant.maths.activations import encode_int8

    module = importlib.import_module("turboquant.kernels.cpu.linear")
    monkeypatch.setattr(cpu, "_native", cpu._native or object())
    seen = []

    def native(x, block):
        seen.append((tuple(x.shape), block))
        rows = encode_int8(x)
        return rows.codes, rows.unit[:, 0]

    monkeypatch.setattr(module.rows, "quantize_rows", native)
    assert module.supports("quantize", SPEC, torch.device("cpu")) is None
    x = torch.randn(2, 3, 96)
    got, want = module.quantize(x, A8), encode_int8(x)
    assert seen == [((6, 96), 32)] and torch.equal(got.codes, want.codes) and torch.equal(got.unit, want.unit)
    module.quantize(x, A4)
    module.quantize(x.double(), A8)
    assert len(seen) == 1
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "_missing", "no compiler", raising=False)
    assert "native module" in module.supports("quantize", SPEC, torch.device("cpu"))
    module.quantize(x, A8)
    assert len(seen) == 1


def test_threads_share_a_model_and_not_their_rows():
    """Two threads, each with inputs of its own, through layers that share rows: everybody gets the rows of his own."""
    shared, recipe = Shared(), ActivationRecipe(8)
    xs = [torch.full((20, 16), float(i + 1)) for i in range(2)]
    wrong, before = [0, 0], sys.getswitchinterval()

    def run(i):
        for _ in range(4000):
            x = xs[i].clone()
            for _ in range(3):
                wrong[i] += shared.take(x, recipe, lambda: i) != i

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        [t.start() for t in threads], [t.join() for t in threads]
    finally:
        sys.setswitchinterval(before)
    assert wrong == [0, 0]


def test_backends_asked_for_in_two_threads_are_gone_with_them():
    inside, go = threading.Event(), threading.Event()

    def hold():
        with ops.use_backend("cpu"):
            inside.set()
            go.wait(10)

    thread = threading.Thread(target=hold)
    with ops.use_backend("reference"):
        thread.start()
        assert inside.wait(10)
        with ops.use_backend("cpu"), ops.use_backend("reference"):
            pass
    go.set()
    thread.join()
    assert ops._compiled_forced == "auto"
    with ops.use_backend("cpu"):
        with ops.use_backend("reference"), ops.use_backend("cpu"):
            pass
        assert ops._compiled_forced == "cpu"
