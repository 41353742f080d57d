"""The product of few rows with a 16-bit weight that stays as it is: one order of sums, the same bits everywhere."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from turboquant.kernels import ops
from turboquant.kernels.cpu import cache as cpu
from turboquant.kernels.cpu import head as native
from turboquant.kernels.linear import LinearSpec

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [(1, 16), (5, 48), (33, 112), (70, 896), (300, 208)]


def expected(x, w, bias):
    """csrc/dense.h in torch: 64 partial sums in fp32, the tree over them, the bias, one rounding."""
    k = w.shape[1]
    products = F.pad(x.float()[:, None] * w.float(), (0, -k % 64)).unflatten(-1, (-1, 4, 16))
    sums = torch.zeros(*products.shape[:2], 4, 16)
    for i in range(products.shape[2]):
        sums = sums + products[:, :, i]
    lanes = (sums[:, :, 0] + sums[:, :, 1]) + (sums[:, :, 2] + sums[:, :, 3])
    for h in (8, 4, 2, 1):
        lanes = lanes[..., :h] + lanes[..., h:]
    y = lanes[..., 0]
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_contract(isa, dtype, monkeypatch):
    monkeypatch.setenv("TURBOQUANT_CPU_ISA", isa)
    kinds = itertools.cycle([None, torch.float32, dtype])
    for (n, k), m in itertools.product(SHAPES, range(1, native.ROWS + 1)):
        w, x, kind = torch.randn(n, k).to(dtype), torch.randn(m, k + 16).to(dtype)[:, :k], next(kinds)
        bias = None if kind is None else torch.randn(n).to(kind)
        assert torch.equal(native.dense(x, w, bias), expected(x, w, bias)), (n, k, m, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_torch_and_the_same_for_any_number_of_threads(dtype):
    w, x = torch.randn(500, 896).to(dtype), torch.randn(1, 4, 896).to(dtype)
    want = native.dense(x, w, None)
    exact = x.double() @ w.double().T
    error = lambda y: (y.double() - exact).abs().max()  # noqa: E731
    assert error(want) <= 1.01 * error(F.linear(x.float(), w.float()).to(dtype))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.cat([native.dense(x[:, i : i + 1], w, None) for i in range(4)], 1), want)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_alone():
    w, x = torch.randn(40, 96).bfloat16(), torch.randn(3, 96).bfloat16()
    clean = native.dense(x, w, None)
    x[1, 5], w[7, 9] = torch.nan, torch.inf
    got = native.dense(x, w, None)
    assert got[1].isnan().all() and got[:, 7].isinf().sum() + got[:, 7].isnan().sum() == 3
    keep = [i for i in range(40) if i != 7]
    assert torch.equal(got[[0, 2]][:, keep], clean[[0, 2]][:, keep])


def test_more_rows_and_odd_layouts_run_in_torch():
    w, x = torch.randn(64, 96).bfloat16(), torch.randn(9, 96).bfloat16()
    assert torch.equal(native.dense(x, w, None), F.linear(x, w))
    turned = torch.randn(96, 64).bfloat16().T
    assert torch.equal(native.dense(x[:1], turned, None), F.linear(x[:1], turned))


def test_who_is_chosen():
    w = torch.randn(8, 48)
    kernel, why = ops.explain_dense(w.bfloat16())
    assert kernel == "cpu" and why.startswith("up to 4 rows, torch beyond; ")
    kernel, why = ops.explain_dense(w)
    assert kernel == "torch" and "16-bit weights, not float32" in why
    assert "47 inputs are not made of sixteens" in ops.explain_dense(w[:, :47].half())[1]
    with ops.use_backend("reference"):
        assert ops.explain_dense(w.bfloat16())[0] == "torch"
        x = torch.randn(1, 48).bfloat16()
        assert torch.equal(ops.dense(x, w.bfloat16(), None), F.linear(x, w.bfloat16()))
    assert "float rows" in native.refusal(LinearSpec(48, 8, 1, 48, 8, torch.bfloat16))
