"""The CPU backend: packed codes read with AVX-512 VNNI, AVX-512, AVX2 or portable vectors (NEON on aarch64).

See `cache` and `quantize`; the C++ is in csrc/.
"""

from turboquant.kernels.cpu.cache import DTYPES, cache_append, cache_attention, supports

GRADIENTS = False

__all__ = ["DTYPES", "GRADIENTS", "cache_append", "cache_attention", "supports"]
