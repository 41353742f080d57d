"""The ops that layers call, and the choice of the backend that runs them.

A backend is a module with functions of the same names and signatures; it may lack some, or refuse some arguments by
saying why in its `supports(op, layout, device)` (None: it can). Its `DTYPES`, where it has one, are the cache dtypes it
serves, and `GRADIENTS = False` says that it computes none. What was asked for runs, or an error says why not; with
"auto" the first backend that can runs, and `explain()` names it. The backends in OPTIONAL run only when asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

from turboquant.packed.page import PageLayout

OPS = ("cache_append", "cache_attention")
BACKENDS = ("cpu", "reference")  # in order of preference
OPTIONAL: tuple[str, ...] = ()  # never chosen by "auto"
_forced: ContextVar[str] = ContextVar("turboquant_backend", default="auto")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why."""


def _refusal(
    name: str, op: str, layout: PageLayout | None, device: torch.device, dtype: torch.dtype | None, grad: bool
) -> str | None:
    """None if the backend can run the op, else the reason."""
    module = import_module(f"turboquant.kernels.{name}")
    if not hasattr(module, op):
        return f"{name} has no {op}"
    if grad and not getattr(module, "GRADIENTS", True):
        return f"{name} computes no gradients, and an argument requires one"
    dtypes = getattr(module, "DTYPES", None)
    if dtype is not None and dtypes is not None and dtype not in dtypes:
        return f"{name} serves no {str(dtype).removeprefix('torch.')} cache"
    supports = getattr(module, "supports", None)
    return supports(op, layout, device) if supports else None


def choose(
    op: str, layout: PageLayout | None, device: torch.device, dtype: torch.dtype | None = None, grad: bool = False
) -> tuple[str, str]:
    """(backend, reason) for an op.

    Args:
        dtype: of the cache; None for any.
        grad: whether an argument requires a gradient.

    Raises:
        BackendError: the backend forced with `use_backend` cannot run it.
    """
    forced = _forced.get()
    reasons: list[str] = []
    for name in BACKENDS if forced == "auto" else (forced,):
        why = _refusal(name, op, layout, device, dtype, grad)
        if why is None:
            return name, "; ".join(reasons) or ("asked for" if forced != "auto" else "first choice")
        reasons.append(why)
    raise BackendError(f"backend {forced!r} cannot run {op}: {'; '.join(reasons)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every op runs on this backend or raises BackendError; "auto" is the default choice."""
    known = ("auto", *BACKENDS, *OPTIONAL)
    if name not in known:
        raise BackendError(f"backend {name!r} is not known: choose one of {known}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(
    layout: PageLayout | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[dict[str, str]]:
    """Which kernel runs each op, and why none before it: rows of {"op", "kernel", "device", "why"}.

    Args:
        layout, device, dtype: of the cache; without a dtype, one that every backend serves.
    """
    device = torch.device(device)
    rows = []
    for op in OPS:
        name, why = choose(op, layout, device, dtype)
        for other in OPTIONAL if _forced.get() == "auto" else ():
            refusal = _refusal(other, op, layout, device, dtype, False)
            why += "; " + (refusal or f"{other}: with use_backend({other!r})")
        rows.append({"op": op, "kernel": name, "device": str(device), "why": why})
    return rows


def _call(op: str, buf: Any, layout: PageLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    name, _ = choose(op, layout, q.device, buf.ring_k.dtype, grad)
    return getattr(import_module(f"turboquant.kernels.{name}"), op)(buf, layout, q, k, v, *args)


def cache_append(
    buf: Any, layout: PageLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None
) -> None:
    """Add a chunk to a layer's cache; contract in `reference.cache_append`."""
    _call("cache_append", buf, layout, q, k, v, valid)


def cache_attention(
    buf: Any,
    layout: PageLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to a layer's cache and the chunk; contract in `reference.cache_attention`."""
    return _call("cache_attention", buf, layout, q, k, v, valid, mask, scaling, window, softcap, sink_logits)
