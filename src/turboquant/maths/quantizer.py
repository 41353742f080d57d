"""TurboQuant_mse and TurboQuant_prod as arXiv:2504.19874 states them, and the per-token scale this library prefers.

The paper stores ‖x‖ and codes of R·x/‖x‖. A least-squares scale <y,c>/<c,c> against the chosen levels c costs as
many bits, needs nothing at decode time and is never worse; given a rounded scale, codes are chosen again for it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.maths.codebook import lloyd_max, nearest
from turboquant.maths.exact import lane_sum, root
from turboquant.maths.rotation import rotate, unrotate


def rms(y: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept: (..., d) -> (..., 1)."""
    return root(lane_sum(y.square()) / y.shape[-1]).unsqueeze(-1)


def least_squares_scale(y: Tensor, values: Tensor) -> Tensor:
    """argmin_a ‖y - a·values‖² over the last dimension, kept: (..., 1). Zero where values are all zero."""
    return (lane_sum(y * values) / lane_sum(values.square()).clamp_min(1e-30)).unsqueeze(-1)


def safe_divide(y: Tensor, scale: Tensor) -> Tensor:
    """y / scale with 0 where the scale is 0."""
    return torch.where(scale > 0, y / torch.where(scale > 0, scale, 1.0), 0.0)


@dataclass(frozen=True)
class MSECodes:
    """codes (..., d) uint8; norm (..., 1) fp32, the length of the input."""

    codes: Tensor
    norm: Tensor


@dataclass(frozen=True)
class TurboQuantMSE:
    """TurboQuant_mse (arXiv:2504.19874, Algorithm 1): normalise, rotate, round each coordinate to its Lloyd-Max level.

    Args:
        dim: width d of the vectors.
        bits: bits per coordinate, 1..8.
        rotation: "hadamard" (signs ∘ block Hadamard, the library's) or "dense" (the paper's random orthogonal Π).
        seed: of the dense rotation.
    """

    dim: int
    bits: int
    rotation: str = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rotation not in ("hadamard", "dense"):
            raise ValueError(f"rotation must be 'hadamard' or 'dense', got {self.rotation!r}")

    def _levels(self, device: torch.device) -> Tensor:
        return lloyd_max(self.bits, self.dim, device) / math.sqrt(self.dim)

    def _dense(self, device: torch.device) -> Tensor:
        g = torch.randn(self.dim, self.dim, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        q, r = torch.linalg.qr(g)
        return (q * torch.sign(torch.diagonal(r))).float().to(device)  # Haar-distributed

    def encode(self, x: Tensor) -> MSECodes:
        """(..., d) float -> codes and norm. A zero vector decodes to zero."""
        norm = x.float().norm(dim=-1, keepdim=True)
        unit = safe_divide(x.float(), norm)
        y = rotate(unit) if self.rotation == "hadamard" else unit @ self._dense(x.device).T
        return MSECodes(nearest(y, self._levels(x.device)), norm)

    def decode(self, c: MSECodes) -> Tensor:
        """Codes and norm -> (..., d) fp32."""
        y = self._levels(c.codes.device)[c.codes.long()]
        x = unrotate(y) if self.rotation == "hadamard" else y @ self._dense(y.device)
        return x * c.norm


@dataclass(frozen=True)
class ProdCodes:
    """base: codes of the (bits-1)-bit TurboQuant_mse; signs (..., d) int8 ±1; residual (..., 1) length of the rest."""

    base: MSECodes
    signs: Tensor
    residual: Tensor


@dataclass(frozen=True)
class TurboQuantProd:
    """TurboQuant_prod (arXiv:2504.19874, Algorithm 2): TurboQuant_mse at bits-1, then a 1-bit QJL of the residual.

    Its inner products are unbiased: E<y, decode(encode(x))> = <y, x> over the Gaussian projection S.
    """

    dim: int
    bits: int
    rotation: str = "dense"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits < 2:
            raise ValueError(f"TurboQuant_prod spends one bit on QJL: bits must be >= 2, got {self.bits}")

    @property
    def _base(self) -> TurboQuantMSE:
        return TurboQuantMSE(self.dim, self.bits - 1, self.rotation, self.seed)

    def _projection(self, device: torch.device) -> Tensor:
        return torch.randn(self.dim, self.dim, generator=torch.Generator().manual_seed(self.seed + 1)).to(device)

    def encode(self, x: Tensor) -> ProdCodes:
        """(..., d) float -> codes."""
        base = self._base.encode(x)
        rest = x.float() - self._base.decode(base)
        s = torch.where(rest @ self._projection(x.device).T >= 0, 1, -1).to(torch.int8)
        return ProdCodes(base, s, rest.norm(dim=-1, keepdim=True))

    def decode(self, c: ProdCodes) -> Tensor:
        """Codes -> (..., d) fp32: base + sqrt(π/2)/d · ‖r‖ · Sᵀ·sign(S·r)   (arXiv:2504.19874, Eq. 12; QJL)."""
        back = c.signs.float() @ self._projection(c.signs.device)
        return self._base.decode(c.base) + math.sqrt(math.pi / 2) / self.dim * c.residual * back
