"""signs ∘ block Walsh-Hadamard: the rotation that makes coordinates near-Gaussian.

The paper rotates by a dense random orthogonal matrix (d² multiplications). Random signs followed by a
Walsh-Hadamard transform is orthogonal too, costs d·log2 d additions and needs no stored matrix. It is computed
here by butterflies, never by a matrix product: additions in a fixed order give the same bits for any batch size,
which is what makes a page's bytes independent of batch composition.
"""

from functools import lru_cache

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def hadamard_block(width: int) -> int:
    """Largest power of two that divides `width`: 64 -> 64, 80 -> 16, 96 -> 32, 576 -> 64, 896 -> 128."""
    if width < 1:
        raise ValueError(f"width must be positive, got {width}")
    return width & -width


@lru_cache(maxsize=64)
def _sign_list(width: int) -> tuple[float, ...]:
    out, x = [], width
    for _ in range(width):  # splitmix64: the same signs on every device, platform and torch version
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        z = x
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        out.append(1.0 if (z ^ (z >> 31)) & 1 else -1.0)
    return tuple(out)


def signs(width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """The fixed ±1 diagonal for this width, shape (width,); kept from call to call, not to be written to."""
    return _signs(width, torch.device(device), dtype)


@lru_cache(maxsize=64)
def _signs(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be used outside it
        return torch.tensor(_sign_list(width), device=device, dtype=dtype)


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each aligned `block` of the last dimension (symmetric, own inverse).

    Args:
        x: (..., width), any float dtype; computed in that dtype, without gradient.
        block: a power of two that divides width; by default the largest one.
    """
    width = x.shape[-1]
    block = hadamard_block(width) if block is None else block
    if block < 1 or block & (block - 1) or width % block:
        raise ValueError(f"block must be a power of two dividing the width {width}, got {block}")
    x, half = x.detach(), 1
    while half < block:
        a, b = x.reshape(-1, width // (2 * half), 2, half).unbind(2)
        if torch.compiler.is_compiling():  # which cannot trace writing into views
            y = torch.stack((a + b, a - b), 2)
        else:
            y = x.new_empty(a.shape[0], a.shape[1], 2, half)
            torch.add(a, b, out=y[:, :, 0])
            torch.sub(a, b, out=y[:, :, 1])
        x, half = y.view(x.shape), 2 * half
    return x * block**-0.5


def rotate(x: Tensor) -> Tensor:
    """R·x with R = blockdiag(H)·diag(signs); R is orthogonal. (..., width) -> (..., width)."""
    return hadamard(x.detach() * signs(x.shape[-1], x.device, x.dtype))


def unrotate(y: Tensor) -> Tensor:
    """Rᵀ·y, the inverse of `rotate`."""
    return hadamard(y) * signs(y.shape[-1], y.device, y.dtype)
