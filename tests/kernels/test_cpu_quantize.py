"""quantize_rows against maths/: the same bits, for every instruction set, dtype, width and number of threads."""

import pytest
import torch

from turboquant.kernels.cpu import cache as cpu
from turboquant.kernels.cpu.rows import quantize_rows
from turboquant.maths.rotation import hadamard, hadamard_block, signs

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")


def expected(x, block):
    y = hadamard(x.float() * signs(x.shape[1]), block)
    scale = (y.abs().amax(1) / 127).clamp_min(1e-30)
    return (y / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, k", [(1, 896), (5, 4864), (33, 128), (2, 48), (0, 64)])
def test_bits_of_maths(isa, dtype, m, k, monkeypatch):
    monkeypatch.setenv("TURBOQUANT_CPU_ISA", isa)
    x = (torch.randn(m, k) * torch.logspace(-3, 1, k) + torch.randn(k)).to(dtype)
    for block in {hadamard_block(k), 16}:
        codes, scale = quantize_rows(x, block)
        want, want_scale = expected(x, block)
        assert torch.equal(scale, want_scale) and torch.equal(codes, want)
        assert not m or codes.abs().amax(1).eq(127).all()


def test_rows_that_are_zero_tiny_or_not_finite():
    x = torch.randn(6, 256)
    x[0], x[1], x[2] = 0, x[1] * 1e-37, x[2] * 1e30
    x[3, 7], x[4, 200] = torch.nan, -torch.inf
    codes, scale = quantize_rows(x, 256)
    want, want_scale = expected(x, 256)
    good = [0, 1, 2, 5]
    assert torch.equal(codes[good], want[good]) and torch.equal(scale[good], want_scale[good])
    assert scale[3:5].isnan().all() and not codes[3:5].any() and not codes[0].any()


def test_strides_and_threads():
    wide = torch.randn(64, 640, dtype=torch.bfloat16)
    for x in (wide[::2, 128:384], wide.t()[:, :32], wide[:, :256].detach().requires_grad_()):
        before = torch.get_num_threads()
        try:
            results = []
            for n in (1, 2):
                torch.set_num_threads(n)
                results.append(quantize_rows(x, 32))
        finally:
            torch.set_num_threads(before)
        want = expected(x.detach(), 32)
        for got in results:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "x, block",
    [
        (torch.ones(2, 64), 8),
        (torch.ones(2, 64), 48),
        (torch.ones(2, 96), 64),
        (torch.ones(64), 64),
        (torch.ones(2, 64, dtype=torch.float64), 64),
    ],
)
def test_what_it_cannot_do_is_refused(x, block):
    with pytest.raises(ValueError, match=r"must be"):
        quantize_rows(x, block)
