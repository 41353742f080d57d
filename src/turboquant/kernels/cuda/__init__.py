"""Linear layers on NVIDIA GPUs by humming-kernels, see `linear`."""

from turboquant.kernels.cuda.linear import linear, supports

__all__ = ["linear", "supports"]
