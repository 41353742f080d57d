"""A few rows times a float weight that stays as it is, in C++ (csrc/dense.cpp): the output embeddings of a step.

Output embeddings are most of what a step of a small model reads; torch's product of one 16-bit row reads them at less
than half of what memory gives (docs/measured/linear.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant.kernels.cpu import cache
from turboquant.kernels.linear import LinearSpec

ROWS = 4  # that meet a weight while it is read once; for more, torch's own product


def refusal(spec: LinearSpec) -> str | None:
    """None if a weight of this spec can be served, else why not."""
    if spec.stages or spec.activation_bits != 16:
        return "cpu: dense products are of float rows and weights"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"cpu: dense products are of 16-bit weights, not {str(spec.dtype).removeprefix('torch.')}"
    return f"cpu: {spec.inputs} inputs are not made of sixteens" if spec.inputs % 16 else None


@cache.untraced
def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias.

    Args:
        x: (..., K) bfloat16 or float16. weight: (N, K) of the same dtype. bias: (N,) of any dtype served, or None.

    Returns:
        (..., N) in x's dtype: sums in fp32, rounded once, the same bits on every machine; by torch where there are more
        than ROWS rows or something is not contiguous.
    """
    n, k = weight.shape
    m = x.numel() // k
    plain = x.stride(-1) == 1 and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    if not plain or m > ROWS or (bias is not None and bias.dtype not in cache.DTYPES) or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    flat, out = x.reshape(m, k), x.new_empty(*x.shape[:-1], n)
    where, kind = (0, 0) if bias is None else (bias.data_ptr(), cache.DTYPES[bias.dtype])
    at = (flat.data_ptr(), weight.data_ptr(), where, out.data_ptr())
    cache._native.dense(
        cache.isa(), torch.get_num_threads(), at, (m, n, k, flat.stride(0), cache.DTYPES[x.dtype], kind)
    )
    return out
