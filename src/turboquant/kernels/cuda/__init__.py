"""CUDA C++ for what Triton cannot do fast enough: decode attention on packed pages. Compiled at first use by NVRTC."""

from turboquant.kernels.cuda.attention import cache_attention, supports

__all__ = ["cache_attention", "supports"]
