"""The CPU backend, experimental: packed codes read with AVX-512, AVX2 or portable vectors.

It runs only within `use_backend("cpu")`. See `cache`; the C++ is in csrc/.
"""

from turboquant.kernels.cpu.cache import cache_append, cache_attention, supports

__all__ = ["cache_append", "cache_attention", "supports"]
