"""One bit order: written down as bytes, and undone exactly."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant.packed import bits as module
from turboquant.packed.bits import WIDTHS, pack, packed_bytes, unpack

GOLDEN = {  # little-endian in a row, written out by hand
    2: ([0, 1, 2, 3, 3, 2, 1, 0], [0b11_10_01_00, 0b00_01_10_11]),
    3: ([1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    4: ([1, 2, 3, 15, 0, 8, 9, 4], [0x21, 0xF3, 0x80, 0x49]),
    8: ([0, 1, 127, 128, 254, 255, 7, 9], [0, 1, 127, 128, 254, 255, 7, 9]),
}


def by_hand(codes, bits):
    """The definition: the row as one long little-endian number."""
    return list(sum(c << (bits * i) for i, c in enumerate(codes)).to_bytes(len(codes) * bits // 8, "little"))


def test_doctest():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden(bits):
    codes, data = GOLDEN[bits]
    assert by_hand(codes, bits) == data, "the golden bytes follow the definition"
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == data
    assert unpack(torch.tensor(data, dtype=torch.uint8), bits).tolist() == codes


@given(st.sampled_from(WIDTHS), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**30))
def test_round_trip(bits, eights, rows, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 2, 8 * eights), dtype=torch.uint8, generator=g)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8 and data.shape == (rows, 2, packed_bytes(8 * eights, bits))
    assert torch.equal(unpack(data, bits), codes)
    assert data[-1, 1].tolist() == by_hand(codes[-1, 1].tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_means_something(bits):
    data = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)
    assert torch.equal(pack(unpack(data, bits), bits), data)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_input(bits):
    codes = torch.randint(0, 2**bits, (16, 4), dtype=torch.uint8).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_unknown_width(bits):
    zero = torch.zeros(8, dtype=torch.uint8)
    for call in (lambda: pack(zero, bits), lambda: unpack(zero, bits), lambda: packed_bytes(8, bits)):
        with pytest.raises(ValueError, match=f"bits must be one of .*, got {bits}"):
            call()


def test_rows_end_on_a_byte():
    with pytest.raises(ValueError, match="multiple of 8 codes, got 12"):
        pack(torch.zeros(12, dtype=torch.uint8), 4)
