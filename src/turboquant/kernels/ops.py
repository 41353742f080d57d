"""The ops that layers call, and the choice of the backend that runs them.

A backend is a module with functions of the same names and signatures; it may lack some, or refuse some arguments by
saying why in its `supports(op, layout, device)` (None: it can). What was asked for runs, or an error says why not;
with "auto" the first backend that can runs, and `explain()` names it. The backends in OPTIONAL run only when asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

from turboquant.packed.page import PageLayout

OPS = ("cache_append", "cache_attention")
BACKENDS = ("reference",)  # in order of preference
OPTIONAL = ("cpu",)  # never chosen by "auto"
_forced: ContextVar[str] = ContextVar("turboquant_backend", default="auto")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why."""


def _refusal(name: str, op: str, layout: PageLayout | None, device: torch.device) -> str | None:
    """None if the backend can run the op, else the reason."""
    module = import_module(f"turboquant.kernels.{name}")
    if not hasattr(module, op):
        return f"{name} has no {op}"
    supports = getattr(module, "supports", None)
    return supports(op, layout, device) if supports else None


def choose(op: str, layout: PageLayout | None, device: torch.device) -> tuple[str, str]:
    """(backend, reason) for an op.

    Raises:
        BackendError: the backend forced with `use_backend` cannot run it.
    """
    forced = _forced.get()
    reasons: list[str] = []
    for name in BACKENDS if forced == "auto" else (forced,):
        why = _refusal(name, op, layout, device)
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


def explain(layout: PageLayout | None = None, device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """Which kernel runs each op, and what could on request: rows of {"op", "kernel", "device", "why"}."""
    device = torch.device(device)
    rows = []
    for op in OPS:
        name, why = choose(op, layout, device)
        for other in OPTIONAL if _forced.get() == "auto" else ():
            why += "; " + (_refusal(other, op, layout, device) or f"{other}: with use_backend({other!r})")
        rows.append({"op": op, "kernel": name, "device": str(device), "why": why})
    return rows


def _call(op: str, buf: Any, layout: PageLayout, *args: Any, **kwargs: Any) -> Any:
    name, _ = choose(op, layout, buf.ring_k.device)
    return getattr(import_module(f"turboquant.kernels.{name}"), op)(buf, layout, *args, **kwargs)


def cache_append(buf: Any, layout: PageLayout, *args: Any, **kwargs: Any) -> None:
    """Add a chunk to a layer's cache; contract in `reference.cache_append`."""
    _call("cache_append", buf, layout, *args, **kwargs)


def cache_attention(buf: Any, layout: PageLayout, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attend to a layer's cache and the chunk; contract in `reference.cache_attention`."""
    return _call("cache_attention", buf, layout, *args, **kwargs)
