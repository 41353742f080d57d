"""The theorems of arXiv:2504.19874 as functions, for unit vectors: what tests and reports compare against."""

import math

MSE_SMALL = {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0095}  # Theorem 1, exact values of the Lloyd-Max cost
# Theorem 2, times 1/d: π/2 times the cost of the (bits-1)-bit base. The paper prints 0.56, 0.18 and 0.047, from costs
# it rounded down first (0.36, 0.117, 0.03).
PROD_SMALL = {1: 1.57, 2: 0.57, 3: 0.185, 4: 0.0542}


def mse_upper(bits: int) -> float:
    """D_mse <= sqrt(3)·π/2 · 4^-bits (Theorem 1); tabulated values for 1..4 bits, which are smaller."""
    return MSE_SMALL.get(bits, math.sqrt(3) * math.pi / 2 * 4.0**-bits)


def mse_lower(bits: int) -> float:
    """No quantizer of `bits` bits per coordinate has D_mse < 4^-bits in the worst case (Theorem 3)."""
    return 4.0**-bits


def prod_upper(bits: int, dim: int) -> float:
    """E|<y,x> - <y,x̂>|² <= sqrt(3)·π²/d · 4^-bits for unit x and y (Theorem 2); tabulated for 1..4 bits."""
    return PROD_SMALL.get(bits, math.sqrt(3) * math.pi**2 * 4.0**-bits) / dim


def prod_lower(bits: int, dim: int) -> float:
    """E|<y,x> - <y,x̂>|² >= 4^-bits / d (Theorem 3)."""
    return 4.0**-bits / dim
