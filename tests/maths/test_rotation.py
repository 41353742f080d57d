"""signs ∘ block Hadamard is orthogonal, its own transpose undoes it, and its signs never change."""

import hashlib

import pytest
import torch

from turboquant.maths.rotation import hadamard, hadamard_block, rotate, signs, unrotate

WIDTHS = (16, 64, 80, 96, 128, 256, 576, 896)
BLOCK = {64: 64, 80: 16, 96: 32, 128: 128, 256: 256, 576: 64, 896: 128}


@pytest.mark.parametrize("width", WIDTHS)
def test_orthogonal(width):
    eye = torch.eye(width)
    h, r = hadamard(eye), rotate(eye)
    for matrix in (h, r):
        torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(h, h.T, rtol=0, atol=0)
    torch.testing.assert_close(hadamard(h), eye, rtol=0, atol=1e-5)
    assert torch.equal(h.abs().gt(0).sum(0), torch.full((width,), hadamard_block(width)))


def test_block_rule():
    assert {w: hadamard_block(w) for w in BLOCK} == BLOCK


def test_hadamard_by_its_definition():
    """Sylvester's H_ij = (-1)^popcount(i & j) / sqrt(n)."""
    want = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]) / 32**0.5
    torch.testing.assert_close(hadamard(torch.eye(32)), want, rtol=0, atol=1e-6)
    two = hadamard(torch.eye(32), block=8)
    torch.testing.assert_close(two, torch.block_diag(*[want[:8, :8] * 2] * 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_and_norm(width):
    x = torch.randn(3, 5, width)
    y = rotate(x)
    torch.testing.assert_close(unrotate(y), x, rtol=0, atol=2e-6 * x.abs().max().item() * 4)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
    assert (y - x).norm() > 0.5 * x.norm(), "it rotates at all"


@pytest.mark.parametrize("width", [64, 96, 128])
def test_rows_do_not_depend_on_the_batch(width):
    x = torch.randn(7, 33, width)
    whole = rotate(x)
    for i in (0, 3, 6):
        for j in (0, 16, 32):
            assert torch.equal(rotate(x[i, j]), whole[i, j])
    strided = torch.randn(33, 7, width).transpose(0, 1)
    assert torch.equal(rotate(strided), rotate(strided.contiguous()))


# The signs are part of the byte format: a cache saved today must decode tomorrow. Bit i is 1 where sign i is +1.
GOLDEN = {
    16: "e34dc7f9c60efe5c",
    64: "2a141df05479912a",
    80: "1c46b851cd39c840",
    128: "175ff3d8026cb267",
    256: "b3693dc047edc01d",
}


def splitmix64(seed: int):
    """Steele, Lea and Flood (2014), as its authors published it."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


@pytest.mark.parametrize("width", WIDTHS)
def test_signs_are_splitmix64(width):
    draw = splitmix64(width)
    assert signs(width).tolist() == [1.0 if next(draw) & 1 else -1.0 for _ in range(width)]


@pytest.mark.parametrize("width", GOLDEN)
def test_golden_signs(width):
    bits = sum(1 << i for i, s in enumerate(signs(width).tolist()) if s > 0)
    assert hashlib.sha256(bits.to_bytes(width // 8, "little")).hexdigest()[:16] == GOLDEN[width]


def test_published_splitmix64_value():
    assert next(splitmix64(1234567)) == 6457827717110365317


@pytest.mark.parametrize(("width", "block"), [(64, 3), (64, 0), (96, 64)])
def test_bad_block(width, block):
    with pytest.raises(ValueError, match="block"):
        hadamard(torch.zeros(width), block)


def test_bad_width():
    with pytest.raises(ValueError, match="width"):
        hadamard_block(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_its_dtype_and_its_accuracy(dtype):
    """Within log2(block) roundings of the exact result."""
    x = torch.randn(20, 128).to(dtype)
    got, want = rotate(x), rotate(x.double())
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()
