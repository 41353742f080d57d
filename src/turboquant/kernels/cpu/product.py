"""int8 rows times packed weights, in C++ (csrc/linear.cpp): integers are exact, then one order of fp32 sums.

The weight is read where it is saved; nothing is prepared but addresses. Outputs are the same bits for every instruction
set, number of threads and number of rows beside a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from turboquant.kernels.cpu import cache
from turboquant.kernels.cpu.rows import LEAST_BLOCK, _signs
from turboquant.kernels.fused import NUMBERS
from turboquant.maths.activations import Int8Rows
from turboquant.maths.rotation import hadamard_block
from turboquant.packed.tensor import PackedTensor

AT_ONCE = 16  # rows up to which rotating and rounding them again for each layer costs less than a second call


Pair = tuple[PackedTensor, Tensor | None]  # a weight (N, K) and its bias (N,)


class Packed:
    """The native module's view of weights of one K and their biases. A copy of it is empty: it belongs to the tensors
    it was made of.

    Raises:
        ValueError: a tensor that is not on the CPU, a bias of another dtype than those served, or not contiguous.
    """

    def __init__(self, *pairs: Pair) -> None:
        self.key: tuple[int, ...] | None = None
        if not pairs:
            return
        self.key = key_of(pairs)
        self.tensors, rows = [], []  # tensors are kept alive
        for w, bias in pairs:
            where, parts = 0, [w.codes, w.scale, w.zero]
            for t in parts if bias is None else (*parts, bias):
                if t.device.type != "cpu":
                    raise ValueError(f"packed weights and biases must be on the CPU, not on {t.device}")
            if bias is not None:
                if bias.dtype not in cache.DTYPES or not bias.is_contiguous():
                    raise ValueError(f"a bias must be contiguous float32, bfloat16 or float16, not {bias.dtype}")
                where, kind = bias.data_ptr(), cache.DTYPES[bias.dtype]
                self.tensors.append(bias)
            parts = [t.contiguous() for t in parts]
            self.tensors += parts
            sizes = (*w.shape, w.scale.shape[-1], w.stages, kind if where else 0)
            rows.append((*(t.data_ptr() for t in parts), where, *sizes))
        self.outputs, self.inputs = [w.shape[0] for w, _ in pairs], pairs[0][0].shape[1]
        self.block = hadamard_block(self.inputs)
        self.native: Any = cache._native.Weights(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, ()


def key_of(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """What a view of weights and biases depends on."""
    key: list[int] = []
    for w, bias in pairs:
        key += (w.codes.data_ptr(), w.scale.data_ptr(), w.zero.data_ptr(), 0 if bias is None else bias.data_ptr())
    return tuple(key)


def refusal(inputs: int, group: int, dtype: torch.dtype) -> str | None:
    """None if a weight of these sizes and rows of this dtype can be served, else why not."""
    if dtype not in cache.DTYPES:
        return f"cpu: rows of {str(dtype).removeprefix('torch.')} are not served"
    if inputs % 8 or group % 8 or group > 65536:
        return f"cpu: groups of {group} of {inputs} inputs are not made of eights, or overflow 32 bit"
    return None


def fits(x: Tensor, packed: Packed) -> bool:
    """Whether the product can round x itself."""
    return packed.block >= LEAST_BLOCK and x.dtype in cache.DTYPES


@cache.untraced
def multiply(packed: Packed, x: Tensor | Int8Rows, dtype: torch.dtype) -> list[Tensor]:
    """Rows (..., K) times each weight: (..., N) in `dtype`. Float rows are rotated and rounded as by
    `rows.quantize_rows`."""
    at, sizes, lead, _alive = _input(packed, x, dtype)
    outs = [torch.empty(*lead, n, dtype=dtype) for n in packed.outputs]
    where = [y.data_ptr() for y in outs]
    cache._native.linear(packed.native, cache.isa(), torch.get_num_threads(), at, where, sizes, packed.block**-0.5)
    return outs


@cache.untraced
def mlp(wide: Packed, down: Packed, x: Tensor | Int8Rows, activation: str, dtype: torch.dtype) -> Tensor:
    """down(activation(gate)·up) of rows as for `multiply`, each step rounded to `dtype` as modules round it: (..., N).

    Args:
        wide: gate and up, as one weight or two. activation: one of `fused.ACTIVATIONS`.
    """
    at, sizes, lead, _alive = _input(wide, x, dtype)
    out, signs = torch.empty(*lead, down.outputs[0], dtype=dtype), _signs(down.inputs)
    more = signs.data_ptr(), down.block, down.block**-0.5, NUMBERS[activation]
    cache._native.mlp(
        wide.native,
        down.native,
        cache.isa(),
        torch.get_num_threads(),
        at,
        out.data_ptr(),
        sizes,
        wide.block**-0.5,
        *more,
    )
    return out


def _input(packed: Packed, x: Tensor | Int8Rows, dtype: torch.dtype) -> tuple[Any, ...]:
    """Addresses and sizes of rows, their leading dimensions, and what has to live through the call."""
    k, kind = packed.inputs, cache.DTYPES[dtype]
    if isinstance(x, Int8Rows):
        codes, unit = x.codes.contiguous(), x.unit.contiguous()
        sizes = (unit.numel(), 0, 0, 0, kind)
        return (codes.data_ptr(), unit.data_ptr(), 0), sizes, codes.shape[:-1], (codes, unit)
    flat, signs = x.reshape(-1, k), _signs(k)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    sizes = (flat.shape[0], flat.stride(0), packed.block, cache.DTYPES[x.dtype], kind)
    return (flat.data_ptr(), 0, signs.data_ptr()), sizes, x.shape[:-1], flat
