"""The one bit order: pack and unpack 2, 3, 4 and 8 bit codes. Nothing else in the library knows it.

Little-endian within a row: code i of a row occupies bits i·b ... i·b+b-1 of the row, bit 0 being the lowest bit of the
row's first byte. So at 4 bit, codes 0 and 1 share byte 0, code 0 in its low nibble.

>>> pack(torch.tensor([1, 2, 3, 15, 0, 0, 0, 8], dtype=torch.uint8), 4).tolist()
[33, 243, 0, 128]
>>> unpack(pack(torch.tensor([7, 0, 5, 1, 2, 3, 4, 6], dtype=torch.uint8), 3), 3).tolist()
[7, 0, 5, 1, 2, 3, 4, 6]
"""

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {WIDTHS}, got {bits}")


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes; `count` must be a multiple of 8 so that every width ends on a byte."""
    _check(bits)
    if count % 8:
        raise ValueError(f"a row must hold a multiple of 8 codes, got {count}")
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) uint8 codes < 2^bits -> (..., n·bits/8) uint8 bytes."""
    packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes
    if bits == 3:  # 8 codes are 3 bytes
        g = codes.unflatten(-1, (-1, 8)).int()
        word = sum((g[..., i] << (3 * i) for i in range(8)), torch.zeros_like(g[..., 0]))
        return torch.stack([(word >> s) & 255 for s in (0, 8, 16)], -1).to(torch.uint8).flatten(-2)
    g = codes.unflatten(-1, (-1, 8 // bits))
    byte = g[..., 0].clone()
    for i in range(1, 8 // bits):
        byte |= g[..., i] << (bits * i)
    return byte


def unpack(data: Tensor, bits: int) -> Tensor:
    """(..., n·bits/8) uint8 bytes -> (..., n) uint8 codes."""
    _check(bits)
    if bits == 8:
        return data
    if bits == 3:
        b = data.unflatten(-1, (-1, 3)).int()
        word = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
        return torch.stack([(word >> (3 * i)) & 7 for i in range(8)], -1).to(torch.uint8).flatten(-2)
    mask = 2**bits - 1
    return torch.stack([(data >> (bits * i)) & mask for i in range(8 // bits)], -1).flatten(-2)
