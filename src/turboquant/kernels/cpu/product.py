"""int8 rows times packed weights, in C++ (csrc/linear.cpp): integers are exact, then one order of fp32 sums.

The weight is read where it is saved; nothing is prepared but addresses. Outputs are the same bits for every instruction
set, number of threads and number of rows beside a row.
"""

from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cpu import cache
from turboquant.kernels.cpu.rows import LEAST_BLOCK, _signs
from turboquant.maths.activations import Int8Rows
from turboquant.maths.rotation import hadamard_block
from turboquant.packed.tensor import PackedTensor

AT_ONCE = 16  # rows up to which rotating and rounding them again for each layer costs less than a second call


class Packed:
    """The native module's view of a weight. A copy of it is empty: it belongs to the tensors it was made of."""

    def __init__(self, weight: PackedTensor | None = None) -> None:
        self.key: tuple[int, ...] | None = None
        if weight is None:
            return
        self.key = key_of(weight)
        self.tensors = weight.codes.contiguous(), weight.scale.contiguous(), weight.zero.contiguous()  # kept alive
        self.outputs, self.inputs = weight.shape
        self.block = hadamard_block(self.inputs)
        groups = weight.scale.shape[-1]
        at = tuple(t.data_ptr() for t in self.tensors)
        self.native: Any = cache._native.Weight(at, (self.outputs, self.inputs, groups, weight.stages))

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, ()


def key_of(weight: PackedTensor) -> tuple[int, ...]:
    """What a view of a weight depends on."""
    return weight.codes.data_ptr(), weight.scale.data_ptr(), weight.zero.data_ptr()


def refusal(inputs: int, group: int, dtype: torch.dtype) -> str | None:
    """None if a weight of these sizes and rows of this dtype can be served, else why not."""
    if dtype not in cache.DTYPES:
        return f"cpu: rows of {str(dtype).removeprefix('torch.')} are not served"
    if inputs % 8 or group % 8 or group > 65536:
        return f"cpu: groups of {group} of {inputs} inputs are not made of eights, or overflow 32 bit"
    return None


def fits(x: Tensor, packed: Packed) -> bool:
    """Whether `multiply_float` serves x."""
    return packed.block >= LEAST_BLOCK and x.dtype in cache.DTYPES and x.stride(-1) == 1


def multiply_float(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) rows of a float dtype, rotated and rounded as by `rows.quantize_rows` -> (M, N) in their dtype."""
    m, k = x.shape
    out = x.new_empty(m, packed.outputs)
    kind, (where, bias_kind), signs = cache.DTYPES[x.dtype], _bias(bias), _signs(k)  # signs live through the call
    at = (x.data_ptr(), 0, signs.data_ptr(), where, out.data_ptr())
    sizes = (m, x.stride(0), packed.block, kind, bias_kind, kind)
    cache._native.linear(packed.native, cache.isa(), torch.get_num_threads(), at, sizes, packed.block**-0.5)
    return out


def multiply(packed: Packed, rows: Int8Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows (..., K) -> (..., N) in `dtype`."""
    codes, unit = rows.codes.contiguous(), rows.unit.contiguous()
    m = unit.numel()
    out = torch.empty(*codes.shape[:-1], packed.outputs, dtype=dtype)
    where, bias_kind = _bias(bias)
    at = (codes.data_ptr(), unit.data_ptr(), 0, where, out.data_ptr())
    sizes = (m, 0, 0, 0, bias_kind, cache.DTYPES[dtype])
    cache._native.linear(packed.native, cache.isa(), torch.get_num_threads(), at, sizes, 0.0)
    return out


def _bias(bias: Tensor | None) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    if bias.dtype not in cache.DTYPES or not bias.is_contiguous():
        raise ValueError(f"a bias must be contiguous float32, bfloat16 or float16, not {bias.dtype}")
    return bias.data_ptr(), cache.DTYPES[bias.dtype]
