"""The CUDA quantizer of rows against the reference.

Without a GPU its source runs with CUDA's threads as fibers of the CPU (emulation/); with one, on it.
"""

import ctypes

import pytest
import torch

from turboquant.kernels import fused
from turboquant.kernels.cuda import nvrtc, rows
from turboquant.kernels.fused import NormRule
from turboquant.kernels.linear import LinearSpec
from turboquant.maths.activations import Int8Rows, decode_int8, encode_int8
from turboquant.maths.rotation import rotate
from turboquant.recipe import ActivationRecipe

A8 = ActivationRecipe(8)
BF16, F16 = torch.bfloat16, torch.float16
RULES = [NormRule(1e-6), NormRule(1e-5, 1.0, True), NormRule(1e-6, 0.5)]
# Rotations of 128 to 16384 numbers, rows of one and of several blocks, more rows than blocks of the grid.
SMALL = [
    (896, 3),
    (256, 5),
    (1536, 9),
    (1024, 2),
    (2048, 1),
    (4096, 2),
    (8192, 1),
    (14336, 3),
    (384, 70),
    (2304, 1),
    (11008, 1),
]
LARGE = [(k, m) for k in (896, 2304, 4096, 5120, 8192, 11008, 14336, 28672) for m in (1, 16, 70, 600, 2048)]


@pytest.fixture
def emulated(monkeypatch, emulation):
    """The ops on CPU tensors, of one multiprocessor; the memory that they write to holds NaN before."""

    def launch(kernel, blocks, threads, shared, device, call, after=False):
        assert shared <= 227 * 1024
        kernel.run(ctypes.byref(call), blocks[0], threads)

    class Torch:
        """torch whose `empty` is not."""

        def __getattr__(self, name):
            return empty_rows if name == "empty" else getattr(torch, name)

    def empty_rows(*size, **options):
        size = size[0] if isinstance(size[0], torch.Size) else size
        return torch.full(size, 77 if options["dtype"] == torch.int8 else torch.nan, **options)

    monkeypatch.setattr(rows, "torch", Torch())
    monkeypatch.setattr(nvrtc, "functions", lambda name, source, *_: [emulation("quantize", source)])
    monkeypatch.setattr(nvrtc, "processors", lambda device: 1)
    monkeypatch.setattr(nvrtc, "launch", launch)


def draw(k: int, m: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows with loud channels; every third is so quiet that a norm's eps counts."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k + m))
    x[:, :: k // 7] *= 40
    x[1::3] *= 1e-4
    return x.to(device, dtype)


def same(got: Int8Rows, x: torch.Tensor) -> None:
    """Rows of x: the reference's units up to sums in another order, and its codes but where a number lies on a rounding
    boundary."""
    want = encode_int8(x)
    torch.testing.assert_close(got.unit, want.unit, rtol=1e-6, atol=0)
    apart = got.codes != want.codes
    level = rotate(x.double())[apart] / want.unit.expand(x.shape)[apart]
    assert ((level - level.floor() - 0.5).abs() < 1e-3).all() and apart.float().mean() < 1e-3
    assert ((got.codes.int() - want.codes.int()).abs() <= 1).all()


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def check_norm(k: int, m: int, dtype: torch.dtype, rule: NormRule, device: str) -> None:
    x, w = draw(k, m, dtype, device), draw(k, 1, dtype, device)[0].abs() / 8
    y, got = rows.norm_quantize(x, w, rule, A8)
    same(got, y)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + rule.eps).sqrt() * (w.double() + rule.shift)
    assert rms(y - exact) <= 2 * rms(fused.rms_norm(x, w, rule) - exact)
    other = torch.cat([x.flip(-1) / 2, x], -1)[:, :k]  # rows lie otherwise than those of x
    total, z, sum_rows = rows.add_norm_quantize(x, other, w, rule, A8)
    assert torch.equal(total, x + other)
    alone, want = rows.norm_quantize(total, w, rule, A8)
    assert torch.equal(z, alone) and torch.equal(sum_rows.codes, want.codes) and torch.equal(sum_rows.unit, want.unit)


def check_gate(k: int, m: int, dtype: torch.dtype, activation: str, device: str) -> None:
    both = draw(2 * k, m, dtype, device)
    gate, up = both.chunk(2, -1)  # rows of twice the width, as one product leaves them
    exact = fused.ACTIVATIONS[activation](gate.double()) * up.double()
    own = encode_int8(fused.ACTIVATIONS[activation](gate) * up)
    got = rows.gate_quantize(gate, up, activation, A8)
    assert rms(decode_int8(got) - exact) <= 2 * rms(decode_int8(own) - exact)
    near = (got.codes.int() - own.codes.int()).abs() <= 1
    assert near.all(), (got.codes.int() - own.codes.int()).abs().max()


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_the_source_on_the_cpu(k, m, emulated):
    dtype = (BF16, F16)[m // 2 % 2]
    x = draw(k, m, dtype, "cpu")
    same(rows.quantize(x, A8), x)
    check_norm(k, m, dtype, RULES[m % 3], "cpu")
    check_gate(k, m, dtype, ("silu", "gelu_tanh")[m % 2], "cpu")


def test_rows_that_are_not_finite_and_rows_of_nothing(emulated):
    """As the reference has them: a unit of NaN and no codes; the rows beside them are not touched."""
    x = draw(1536, 8, BF16, "cpu")
    x[1, 5], x[3, 700], x[4, 9] = torch.nan, torch.inf, -torch.inf
    x[6] = 0
    got, want = rows.quantize(x, A8), encode_int8(x)
    torch.testing.assert_close(got.unit, want.unit, rtol=0, atol=0, equal_nan=True)
    assert got.unit.isnan().sum() == 3 and not got.codes[[1, 3, 4, 6]].any()
    same(Int8Rows(got.codes[[0, 2, 5, 7]], got.unit[[0, 2, 5, 7]]), x[[0, 2, 5, 7]])
    assert rows.quantize(x[:0], A8).codes.shape == (0, 1536)


def test_inputs_that_do_not_lie_in_rows(emulated):
    """Columns apart, rows that begin anywhere, more dimensions."""
    x = draw(1024, 4, BF16, "cpu")
    same(rows.quantize(x.T.contiguous().T, A8), x)
    odd = torch.zeros(4 * 1024 + 3, dtype=BF16)[3:].view(4, 1024)
    odd.copy_(x)
    same(rows.quantize(odd, A8), x)
    got = rows.quantize(x.view(2, 2, 1024), A8)
    assert got.codes.shape == (2, 2, 1024) and got.unit.shape == (2, 2, 1)
    same(Int8Rows(got.codes.flatten(0, 1), got.unit.flatten(0, 1)), x)


def test_operands_that_do_not_fit_are_refused(emulated):
    x, w = draw(256, 2, BF16, "cpu"), draw(256, 1, BF16, "cpu")[0]
    for run in (
        lambda: rows.quantize(x.float(), A8),
        lambda: rows.norm_quantize(x, w.float(), RULES[0], A8),
        lambda: rows.norm_quantize(x, w[:128], RULES[0], A8),
        lambda: rows.add_norm_quantize(x, x[:1], w, RULES[0], A8),
        lambda: rows.gate_quantize(x, x[:1], "silu", A8),
        lambda: rows.gate_quantize(x, x.half(), "silu", A8),
    ):
        with pytest.raises(ValueError, match="rows"):
            run()


@pytest.mark.parametrize("k", [128, 896, 1536, 4096, 11008, 14336, 18944, 28672, 32768])
def test_every_shape_fits_a_block(k):
    """All of a row is in it, and the GPU has the threads, registers and memory of all that are resident."""
    for mode in rows.REGISTERS:
        s = rows.shape_of(k, mode)
        assert s.threads <= 1024 and s.threads % 32 == 0 and s.threads * rows.EACH >= k
        assert s.resident * s.shared <= 227 * 1024 and s.resident * s.threads * 64 <= 65536


def test_what_is_not_served(monkeypatch):
    where, spec = torch.device("cuda", 0), lambda k, bits=8, dtype=BF16: LinearSpec(k, 128, 1, k, bits, dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    assert rows.supports("quantize", spec(896), where) is None
    assert "16-bit" in rows.supports("quantize", spec(896, dtype=torch.float32), where)
    assert "8 bit" in rows.supports("quantize", spec(896, bits=4), where)
    assert "8 bit" in rows.supports("quantize", None, where)
    for k in (576, 16384, 5 * 8192):
        assert "up to 32768 inputs rotated in blocks of 128 to 8192" in rows.supports("quantize", spec(k), where), k
    assert rows.supports("gate_quantize", spec(28672), where) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0" in rows.supports("quantize", spec(896), where)


@pytest.mark.cuda
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("k", "m"), SMALL + LARGE)
def test_on_the_gpu(k, m, dtype):
    x = draw(k, m, dtype, "cuda")
    same(rows.quantize(x, A8), x)
    check_norm(k, m, dtype, RULES[m % 3], "cuda")
    check_gate(k, m, dtype, ("silu", "gelu_tanh")[m % 2], "cuda")


@pytest.mark.cuda
@pytest.mark.hopper
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_chain_in_a_graph_has_the_bits_of_single_calls(m, replays_alike):
    """Nothing of torch's stands between them: up to 16 rows each kernel may start while the one before it runs."""
    w = draw(14336, 1, BF16, "cuda")[0]

    def chain(x: torch.Tensor, alone: bool) -> torch.Tensor:
        for _ in range(12):
            x, y, _ = rows.add_norm_quantize(x, x, w, RULES[0], A8)
            if alone:
                torch.cuda.synchronize()
            x, _ = rows.norm_quantize(y, w, RULES[0], A8)
            if alone:
                torch.cuda.synchronize()
        return x

    x = draw(14336, m, BF16, "cuda") / 8
    replays_alike(chain, x)


@pytest.mark.nvrtc
@pytest.mark.parametrize(("k", "mode"), [(4096, 0), (4096, 1), (14336, 2), (896, 2), (8192, 3)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_source_compiles(k, mode, dtype):
    source = rows.config(k, rows.shape_of(k, mode), mode, False, "silu", dtype == BF16)
    assert nvrtc.compile_source("quantize.cu", source, "sm_90a")[:4] == b"\x7fELF"
