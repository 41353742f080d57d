"""Triton kernels for GPUs; imported only where an op asks for them."""

import importlib.util
from typing import Any

import torch


def supports(op: str, layout: Any, device: torch.device) -> str | None:
    """None if the op can run, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"triton: tensors are on {device.type}"
    inputs = getattr(layout, "inputs", None)
    if op in ("quantize", "rotate") and inputs is not None and inputs % 16:
        return f"triton: {inputs} inputs are not made of sixteens"
    return None


def quantize(*args: Any, **kwargs: Any) -> Any:
    """See `quantize.quantize`."""
    from turboquant.kernels.triton import quantize as module

    return module.quantize(*args, **kwargs)
