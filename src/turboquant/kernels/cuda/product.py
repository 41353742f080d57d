"""Few int8 rows times a packed weight of one or two stages on compute capability 9.0: the launch of csrc/product.cu.

Decoding reads a weight once and multiplies little, so what counts is how early its bytes are asked for. The kernel may
start while the one before it runs (programmatic dependent launch) and fetches weights until the rows are there. It
reads the weight in the order in which humming-kernels holds it, so that the GPU holds it once: that of `fragments`.
Sums of codes are exact; groups are added in one order, which depends on the weight's shape (and where K is so long that
its rows do not fit into one block's memory, on their number).
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cuda import nvrtc

MAX_ROWS = 16  # two tiles of 8
GROUP = 128  # the one size of groups beside whole rows
OUTPUTS, WARPS, PIECE = 64, 8, 2048  # of a block; bytes of 64 outputs × 64 inputs; mirror csrc/product.cu
HALF = 113 * 1024  # bytes of shared memory of a block, of which two share a multiprocessor
SHARED = 227 * 1024  # the most that a block may have
LARGEST = 128 * 15, 128 * (16 * 15 + 8)  # an input's part of a sum, by stages; int32 holds the sum of a whole row
SPLITS = (1, 2, 4, 8)  # blocks that share the K of an output
FILL = 0.9  # blocks a multiprocessor from which K is split no further
DEEPEST = 6  # pieces that a warp has under way


class _Call(ctypes.Structure):  # mirrors `Call` of csrc/product.cu
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("weight", "second", "scale", "zero", "codes", "unit", "bias", "out")],
        *[(n, ctypes.c_int) for n in ("n", "k", "rows", "groups", "split", "tables")],
    ]


def refusal(n: int, k: int, group: int, planes: int, device: torch.device) -> str | None:
    """None if products of few rows with a weight of `planes` stages run here, else why not."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "made for compute capability 9.0"
    if group not in (GROUP, k):
        return f"for groups of {GROUP} or whole rows"
    if n % OUTPUTS or k % 128 or k == GROUP:
        return f"for a multiple of {OUTPUTS} outputs and of 128 inputs, 256 at the least"
    if group == k and k * LARGEST[planes - 1] >= 2**31:
        return f"for whole rows of up to {(2**31 - 1) // LARGEST[planes - 1]} inputs: beyond, sums overflow an int32"
    return nvrtc.missing()


def fragments(codes: Tensor, group: int) -> Tensor:
    """(N, K) codes below 16 -> (N·K/2,) uint8 in humming's order for int8 rows on compute capability 9.0.

    A lane of a warp finds the operands of two tensor-core products (16 outputs × 32 inputs) in 16 bytes. Whole rows:
    K/32, N/32, lane, eighth of the 32 outputs, 4 inputs; a byte holds inputs i and i + 16. Groups of 128: K/64, N/16,
    lane, quarter of the 64 inputs, 4 inputs; a byte holds outputs o and o + 8.
    """
    n, k = codes.shape
    if group == GROUP:
        x = codes.view(n // 16, 2, 8, k // 64, 4, 4, 4)  # tile, half, o, K/64, quarter, lane of four, input
        low, high = x.permute(3, 0, 1, 2, 5, 4, 6).unbind(2)
    else:
        x = codes.view(n // 32, 4, 8, k // 32, 2, 4, 4)  # tile, eighth, o, K/32, half, lane of four, input
        low, high = x.permute(3, 0, 4, 2, 5, 1, 6).unbind(2)
    return (low | high << 4).contiguous().flatten()


@dataclass(frozen=True)
class Shape:
    """How a product is cut.

    Attributes:
        tiles: of 8 rows. depth: pieces that a warp has under way. split: blocks that share K.
        tables: groups whose scales and zeros a block keeps. shared: bytes of memory.
        several: whether a block takes 64 outputs after 64: then as many blocks run as fit at once.
    """

    tiles: int
    depth: int
    split: int
    tables: int
    shared: int
    several: bool = False


def shape_of(n: int, k: int, group: int, planes: int, rows: int, processors: int) -> Shape:
    """For so many rows and multiprocessors: as many blocks as fill them, more where a block's rows would not fit into
    its memory (if none does, `shared` is above SHARED), and as many pieces as fit, two at the least."""
    pieces = k // 64
    fits = [s for s in SPLITS if s * 2 * WARPS <= pieces] or [1]
    fill = next((s for s in fits if n // OUTPUTS * s >= FILL * processors), fits[-1])
    group = group if group < k else 0
    if fill == 1 and n // OUTPUTS > 2 * processors:
        shape = _cut(pieces, 1, group, planes, rows, True)
        if shape.shared <= HALF:
            return shape
    shapes = [_cut(pieces, s, group, planes, rows) for s in fits if s >= fill]
    return next((s for s in shapes if s.shared <= SHARED), shapes[-1])


def _cut(pieces: int, split: int, group: int, planes: int, rows: int, several: bool = False) -> Shape:
    tiles, most = 1 if rows <= 8 else 2, -(-pieces // split)  # pieces of a block
    tables = most * 64 // group + 2 if group else 1
    x, step, fixed = rows * (most * 64 + 16), WARPS * planes * PIECE, 3 * OUTPUTS * tables * (1 + several)
    sums = WARPS * tiles * 8 * (OUTPUTS + 4) * 4
    depth = max(2, min(DEEPEST, -(-most // WARPS), (HALF - fixed - x - several * sums) // step))
    shared = fixed + (depth * step + x + sums if several else max(depth * step + x, sums))
    return Shape(tiles, depth, split, tables, shared, several)


def most_rows(n: int, k: int, group: int, planes: int, device: torch.device, limit: int) -> int:
    """Up to how many rows, of `limit` asked for, a product fits into shared memory."""
    fits = (
        r for r in range(limit, 0, -1) if shape_of(n, k, group, planes, r, nvrtc.processors(device)).shared <= SHARED
    )
    return next(fits, 0)


def config(shape: Shape, k: int, group: int, planes: int, dtype: torch.dtype) -> str:
    """config.cuh."""
    numbers = {
        "NT": shape.tiles, "DEPTH": shape.depth, "PLANES": planes, "GROUP": group if group < k else 0,
        "PACKED_K": int(group == GROUP), "SEVERAL": int(shape.several), "BF16": int(dtype == torch.bfloat16),
    }  # fmt: skip
    return "\n".join(["#pragma once", *(f"#define {k} {v}" for k, v in numbers.items()), ""])


@lru_cache(maxsize=4096)
def _kernel(
    n: int, k: int, group: int, planes: int, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Shape]:
    """(kernel, its shape)."""
    shape = shape_of(n, k, group, planes, rows, nvrtc.processors(device))
    if shape.shared > SHARED:
        raise ValueError(f"{rows} rows of {k} inputs need {shape.shared} bytes of shared memory, {SHARED} are there")
    return _function(config(shape, k, group, planes, dtype), device), shape


@lru_cache(maxsize=256)
def _function(source: str, device: torch.device) -> Any:
    return nvrtc.functions("product.cu", source, ("product",), device, SHARED)[0]


def multiply(
    weight: Tensor, second: Tensor | None, scale: Tensor, zero: Tensor, codes: Tensor, unit: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(M, K) int8 codes with units (M, 1) fp32 times a weight -> (M, N) in dtype, bf16 or fp16; M from 1 to MAX_ROWS.

    Args:
        weight: as `fragments` gives it, of any dtype. second: that of the second stage, or None.
        scale: (N, G) fp16. zero: (N, G) uint8.
        bias: (N,) of dtype or None.

    Raises:
        ValueError: a tensor of another dtype or size or not contiguous, no rows or more than MAX_ROWS, or rows of so
            many inputs that they do not fit into shared memory.
    """
    (m, k), (n, groups) = codes.shape, scale.shape
    if not 0 < m <= MAX_ROWS:
        raise ValueError(f"{m} rows, from 1 to {MAX_ROWS} are possible")
    given = (
        ("weight", weight, weight.dtype, n * k // 2), ("second", second, weight.dtype, n * k // 2),
        ("scale", scale, torch.float16, 2 * n * groups), ("zero", zero, torch.uint8, n * groups),
        ("codes", codes, torch.int8, m * k), ("unit", unit, torch.float32, 4 * m), ("bias", bias, dtype, 2 * n),
    )  # fmt: skip
    for name, t, kind, size in given:
        if t is not None and (t.dtype != kind or t.nbytes != size or not t.is_contiguous()):
            raise ValueError(f"{name}: {t.dtype} {tuple(t.shape)}, {kind} of {size} bytes in one piece is needed")
    kernel, shape = _kernel(n, k, k // groups, 1 if second is None else 2, m, dtype, codes.device)
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    call = _Call(
        weight.data_ptr(), 0 if second is None else second.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        codes.data_ptr(), unit.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), n, k, m, groups,
        shape.split, shape.tables,
    )  # fmt: skip
    grid = (shape.split, 2 * nvrtc.processors(codes.device) if shape.several else n // OUTPUTS, 1)
    nvrtc.launch(kernel, grid, 32 * WARPS, shape.shared, codes.device, call, after=True, cluster=shape.split)
    return out
