"""Inputs of linear layers to int8 on the CPU: rotation, a scale per row and rounding in one pass over the row."""

from functools import lru_cache

import torch
from torch import Tensor

from turboquant.kernels.cpu import cache
from turboquant.maths.rotation import signs

LEAST_BLOCK = 16


@lru_cache(maxsize=64)
def _signs(width: int) -> Tensor:
    return signs(width)


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rotate each row (the signs of its width, Walsh-Hadamard over aligned blocks) and round it to int8.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        block: a power of two from 16 that divides K; `maths.rotation.hadamard_block(K)` for `maths.rotation.rotate`.

    Returns:
        codes (M, K) int8 from -127 to 127 and scale (M,) fp32: R·x ≈ scale·codes, where scale is max|R·x|/127 and at
        least 1e-30, bit for bit as in maths/. A row with a NaN or an infinity has the scale NaN and codes 0.

    Raises:
        ValueError: another shape, dtype or block.
        RuntimeError: the native module is not built.
    """
    if cache._native is None:
        raise RuntimeError(f"the native module is not built ({cache._missing})")
    if x.dim() != 2 or x.device.type != "cpu" or x.dtype not in cache.DTYPES:
        raise ValueError(f"x must be (M, K) float32, bfloat16 or float16 on the CPU, got {tuple(x.shape)} {x.dtype}")
    rows, width = x.shape
    if block < LEAST_BLOCK or block & (block - 1) or width % block:
        raise ValueError(f"block must be a power of two from {LEAST_BLOCK} that divides {width}, got {block}")
    x = x.detach()
    if x.stride(1) != 1:
        x = x.contiguous()
    codes, scale, sign = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows), _signs(width)
    at = (x.data_ptr(), sign.data_ptr(), codes.data_ptr(), scale.data_ptr())
    sizes = (rows, width, x.stride(0), block, cache.DTYPES[x.dtype])
    cache._native.quantize_rows(cache.isa(), torch.get_num_threads(), at, sizes, block**-0.5)
    return codes, scale
