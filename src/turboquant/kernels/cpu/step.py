"""A decoder layer of a few rows in two native calls (csrc/decoder.cpp): what stands in front of attention, and what
stands behind it; or layers that follow each other, with the attention of their caches, in one. The bits are those of
norms, layers, rotary embedding, cache, additions and MLP one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant.kernels.cpu import cache, product
from turboquant.kernels.cpu.rows import _signs
from turboquant.kernels.fused import NUMBERS, NormRule
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout

ROWS = product.AT_ONCE  # rows up to which everything is rounded within the calls
Norm = tuple[Tensor, NormRule]
InTurn = tuple["DecoderStep", CacheBuffers, PageLayout, float, int | None]  # ..., scaling and window of its attention


class DecoderStep:
    """The native view of one decoder layer with packed weights and inputs of 8 bit.

    Args:
        qkv: the three weights of K inputs and their biases; o: that behind attention, (K, Hq·d).
        wide, down, activation: the MLP, as of `linear.mlp`.
        norms: weight (K,) of `dtype` and rule of the norm in front of attention, and of that in front of the MLP.
        dtype: of rows and norms, one of `cache.DTYPES`.

    Raises:
        ValueError: as of `product.Packed`; weights that do not fit one another; a norm of another dtype.
    """

    def __init__(
        self, qkv: Sequence[product.Pair], o: product.Pair, wide: Sequence[product.Pair], down: product.Pair,
        activation: str, norms: Sequence[Norm], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        for weight, _ in norms:
            if weight.dtype != dtype or not weight.is_contiguous() or weight.device.type != "cpu":
                raise ValueError(f"a norm's weight must be contiguous {dtype} on the CPU, not {weight.dtype}")
        packed = [product.Packed(*pairs) for pairs in (qkv, [o], wide, [down])]
        turned = (packed[0], packed[1], packed[3])
        signs = [_signs(p.inputs) for p in turned]
        self.dtype, self.width, self.sizes, self.most = dtype, packed[0].inputs, packed[0].outputs, ROWS
        self.kept = packed, norms, signs
        self.native = cache._native.Layer(
            *(p.native for p in packed),
            [(r.eps, r.shift, float(r.once)) for _, r in norms],
            [w.data_ptr() for w, _ in norms],
            [s.data_ptr() for s in signs],
            [p.block for p in turned],
            [p.block**-0.5 for p in turned],
            NUMBERS[activation],
            cache.DTYPES[dtype],
        )

    cache_ops = cache.cache_append, cache.cache_attention  # what `in_turn` does between its layers' two calls

    @cache.untraced
    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, q, k and v, rotary embedding of q and k.

        Args:
            x: (B, n, K) of the layer's dtype, at most ROWS rows.
            cos, sin: (B or 1, n, d) of the same dtype and strides; q·cos + rotate_half(q)·sin is computed.

        Returns:
            q (B, Hq, n, d), k and v (B, H, n, d): views of one tensor.
        """
        b, n, _ = x.shape
        d, (nq, nk, nv) = cos.shape[-1], self.sizes
        flat = _dense(x, self.width)
        all_ = nq + nk + nv
        out = torch.empty(b, n, all_, dtype=self.dtype)
        sizes = (b * n, flat.stride(0), n, d, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
        at = (flat.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
        self.native.before(cache.isa(), torch.get_num_threads(), at, sizes)
        steps = (n * all_, d, all_, 1)
        return (
            out.as_strided((b, nq // d, n, d), steps, 0),
            out.as_strided((b, nk // d, n, d), steps, nq),
            out.as_strided((b, nv // d, n, d), steps, nq + nk),
        )

    @cache.untraced
    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """y = x + o(attended), and y + MLP(norm(y)): (B, n, K).

        Args:
            x: (B, n, K), what `before` got. attended: (B, n, Hq, d) of the same dtype.
        """
        rows = x.shape[0] * x.shape[1]
        flat, wide = _dense(x, self.width), _dense(attended, attended.shape[2] * attended.shape[3])
        out = torch.empty(x.shape, dtype=self.dtype)
        at = (wide.data_ptr(), flat.data_ptr(), out.data_ptr())
        self.native.after(cache.isa(), torch.get_num_threads(), at, (rows, wide.stride(0), flat.stride(0)))
        return out

    @staticmethod
    @cache.untraced
    def in_turn(steps: Sequence[InTurn], x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor] | None:
        """Layers one after another, each with what the one before returned; their caches get the tokens, as by
        `cache_ops`.

        Args:
            steps: layers of one dtype and width, each with its cache, in which there is room for the tokens.
            x, cos, sin: as of `before`.

        Returns:
            what each layer returns, (B, n, K); None, and nothing is done, where a cache does not fit its layer, or has
            buffers that the native calls do not read.
        """
        b, n, k = x.shape
        flat, outs = _dense(x, k), [torch.empty(x.shape, dtype=x.dtype) for _ in steps]
        sizes = (b, flat.stride(0), n, cos.shape[-1], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
        rows = [(s.native, cache._spec(at), buf, scaling, -1 if w is None else w) for s, buf, at, scaling, w in steps]
        at = (flat.data_ptr(), cos.data_ptr(), sin.data_ptr())
        done = cache._native.in_turn(torch.get_num_threads(), rows, at, [y.data_ptr() for y in outs], sizes)
        return outs if done else None


def _dense(x: Tensor, width: int) -> Tensor:
    flat = x.reshape(-1, width)
    return flat if flat.stride(1) == 1 else flat.contiguous()
