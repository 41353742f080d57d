"""PackedTensor: the weight of a linear layer, or of a stack of experts, in bytes. A plain container.

>>> PackedTensor.specs((64, 256), WeightRecipe(8))["weight"]
((2, 64, 128), torch.uint8)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant.maths.weights import WeightCodes, decode_weight, encode_weight
from turboquant.packed.bits import pack, packed_bytes, unpack
from turboquant.recipe import WeightRecipe

NAMES = ("weight", "weight_scale", "weight_zero")  # of the three tensors, as modules and checkpoints call them


@dataclass(frozen=True)
class PackedTensor:
    """W = scale · (code - zero), see maths/weights.py.

    Attributes:
        codes: (..., S, N, K/2) uint8, two codes a byte in the order of packed/bits.py.
        scale: (..., N, G) fp16.
        zero: (..., N, G) uint8 from 0 to 15.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def specs(shape: tuple[int, ...], recipe: WeightRecipe) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the three tensors by NAMES, for a weight (..., N, K)."""
        *lead, n, k = shape
        groups = k // recipe.group_of(k)
        codes = (*lead, recipe.stages, n, packed_bytes(k, 4))
        fields = (*lead, n, groups)
        return dict(zip(NAMES, ((codes, torch.uint8), (fields, torch.float16), (fields, torch.uint8)), strict=True))

    @classmethod
    def quantize(
        cls, w: Tensor, recipe: WeightRecipe, moment: Tensor | None = None, rotated: bool = False
    ) -> "PackedTensor":
        """(..., N, K) of any float dtype; `moment` as in `encode_weight`, `rotated` if w is (`WeightRecipe.clips`)."""
        coded = encode_weight(w, recipe.group_of(w.shape[-1]), recipe.stages, recipe.clips(rotated), moment)
        return cls(pack(coded.codes, 4), coded.scale, coded.zero)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., N, K) of the weight."""
        return (*self.scale.shape[:-1], self.codes.shape[-1] * 2)

    @property
    def stages(self) -> int:
        """Stages of 4 bit."""
        return self.codes.shape[-3]

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """By NAMES."""
        return dict(zip(NAMES, (self.codes, self.scale, self.zero), strict=True))

    def select(self, index: int) -> "PackedTensor":
        """One of a stack."""
        return PackedTensor(self.codes[index], self.scale[index], self.zero[index])

    def coded(self) -> WeightCodes:
        """Unpacked integers, where the scales are: codes may be kept on the host, see `layers.slot`."""
        return WeightCodes(unpack(self.codes.to(self.scale.device), 4), self.scale, self.zero)

    def dequantize(self, stages: int | None = None) -> Tensor:
        """(..., N, K) fp32 from the first `stages` stages, by default from all."""
        return decode_weight(self.coded(), stages)
