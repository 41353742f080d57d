"""The ops that layers call, and the choice of the backend that runs them.

A backend is a module with functions of the same names and signatures; it may lack some, or refuse some arguments by
saying why in its `supports(op, layout, device)` (None: it can). What was asked for runs, or an error says why not;
with "auto" the first backend that can runs, and `explain()` names it. The backends in OPTIONAL run only when asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

OPS = ("cache_append", "cache_attention")
BACKENDS = ("triton", "reference")  # in order of preference
OPTIONAL = ("cpu",)  # never chosen by "auto"
INTERPRETED = {"triton": "cpu"}  # device type on which a backend is an interpreter, which "auto" does not choose either
_forced: ContextVar[str] = ContextVar("turboquant_backend", default="auto")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why."""


def _refusal(name: str, op: str, layout: PageLayout | None, device: torch.device) -> str | None:
    """None if the backend can run the op, else the reason."""
    module = import_module(f"turboquant.kernels.{name}")
    supports = getattr(module, "supports", None)
    why = supports(op, layout, device) if supports else None
    return why or (None if hasattr(module, op) else f"{name} has no {op}")


def choose(op: str, layout: PageLayout | None, device: torch.device) -> tuple[str, str]:
    """(backend, reason) for an op.

    Raises:
        BackendError: the backend forced with `use_backend` cannot run it.
    """
    forced = _forced.get()
    reasons: list[str] = []
    for name in BACKENDS if forced == "auto" else (forced,):
        why = _refusal(name, op, layout, device)
        if why is None and forced == "auto" and INTERPRETED.get(name) == device.type:
            why = f"{name}: its interpreter runs only with use_backend({name!r})"
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
    if torch.compiler.is_compiling():
        torch.ops.turboquant.cache_append(*_tensors(buf), layout.kv.name, *args, **kwargs)
    else:
        _call("cache_append", buf, layout, *args, **kwargs)


def cache_attention(buf: Any, layout: PageLayout, *args: Any, **kwargs: Any) -> Tensor:
    """Attend to a layer's cache and the chunk; contract in `reference.cache_attention`."""
    if torch.compiler.is_compiling():
        return torch.ops.turboquant.cache_attention(*_tensors(buf), layout.kv.name, *args, **kwargs)
    return _call("cache_attention", buf, layout, *args, **kwargs)


# ---- the same as operators of torch, which torch.compile keeps whole; buffers are passed as tensors

_NAMES = tuple(f.name for f in fields(CacheBuffers))
_WRITTEN = tuple(n for n in _NAMES if n != "table")


def _tensors(buf: Any) -> tuple[Tensor, ...]:
    return tuple([getattr(buf, name) for name in _NAMES])


@lru_cache(maxsize=64)
def _layout(recipe: str, head_dim: int) -> PageLayout:
    kv = parse_recipe(recipe).kv
    assert kv is not None
    return PageLayout(kv, head_dim)


@torch.library.custom_op("turboquant::cache_append", mutates_args=_WRITTEN)
def _append_operator(
    pages: Tensor, table: Tensor, ring_k: Tensor, ring_v: Tensor, sink_k: Tensor, sink_v: Tensor, readers: Tensor,
    tracker: Tensor, length: Tensor, nonfinite: Tensor, recipe: str, q: Tensor, k: Tensor, v: Tensor,
    valid: Tensor | None,
) -> None:  # fmt: skip
    buf = CacheBuffers(pages, table, ring_k, ring_v, sink_k, sink_v, readers, tracker, length, nonfinite)
    _call("cache_append", buf, _layout(recipe, k.shape[-1]), q, k, v, valid)


@torch.library.custom_op("turboquant::cache_attention", mutates_args=())
def _attention_operator(
    pages: Tensor, table: Tensor, ring_k: Tensor, ring_v: Tensor, sink_k: Tensor, sink_v: Tensor, readers: Tensor,
    tracker: Tensor, length: Tensor, nonfinite: Tensor, recipe: str, q: Tensor, k: Tensor, v: Tensor,
    valid: Tensor | None = None, mask: Tensor | None = None, scaling: float | None = None, window: int | None = None,
    softcap: float | None = None, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    buf = CacheBuffers(pages, table, ring_k, ring_v, sink_k, sink_v, readers, tracker, length, nonfinite)
    layout = _layout(recipe, k.shape[-1])
    out = _call("cache_attention", buf, layout, q, k, v, valid, mask, scaling, window, softcap, sink_logits)
    return out.contiguous()


@_append_operator.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


@_attention_operator.register_fake
def _(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(args[11].shape, dtype=args[11].dtype, device=args[11].device)  # q
