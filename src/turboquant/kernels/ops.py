"""The ops that layers call, and the choice of the backend that runs them.

A backend is a module with functions of the same names and signatures; it may lack some, or refuse some arguments by
saying why in its `supports(op, layout, device)` (None: it can). What was asked for runs, or an error says why not;
with "auto" the first backend that can runs, and `explain()` names it. The backends in OPTIONAL run only when asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from turboquant.kernels.linear import LinearSpec, LinearState
from turboquant.packed.page import PageLayout
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe

OPS = ("cache_append", "cache_attention")
LINEAR_OPS = ("rotate", "quantize", "linear")
BACKENDS = ("reference",)  # in order of preference
LINEAR_BACKENDS = ("cuda", "triton", "cpu", "reference")  # the same for LINEAR_OPS
OPTIONAL = ("cpu",)  # never chosen by "auto"
_forced: ContextVar[str] = ContextVar("turboquant_backend", default="auto")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why."""


def _refusal(name: str, op: str, layout: PageLayout | LinearSpec | None, device: torch.device) -> str | None:
    """None if the backend can run the op, else the reason."""
    module = import_module(f"turboquant.kernels.{name}")
    if not hasattr(module, op):
        return f"{name} has no {op}"
    supports = getattr(module, "supports", None)
    return supports(op, layout, device) if supports else None


def choose(op: str, layout: PageLayout | LinearSpec | None, device: torch.device) -> tuple[str, str]:
    """(backend, reason) for an op.

    Raises:
        BackendError: the backend forced with `use_backend` cannot run it.
    """
    forced = _forced.get()
    reasons: list[str] = []
    known = LINEAR_BACKENDS if op in LINEAR_OPS else BACKENDS
    for name in known if forced == "auto" else (forced,):
        why = _refusal(name, op, layout, device)
        if why is None:
            return name, "; ".join(reasons) or ("asked for" if forced != "auto" else "first choice")
        reasons.append(why)
    raise BackendError(f"backend {forced!r} cannot run {op}: {'; '.join(reasons)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every op runs on this backend or raises BackendError; "auto" is the default choice."""
    known = tuple(dict.fromkeys(("auto", *BACKENDS, *OPTIONAL, *LINEAR_BACKENDS)))
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


def explain_linear(spec: LinearSpec, device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """Which kernel runs each op of a linear layer, and why the ones before it do not: rows as of `explain`."""
    device = torch.device(device)
    rows = []
    for op in LINEAR_OPS:
        name, why = choose(op, spec, device)
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


def rotate(x: torch.Tensor, spec: LinearSpec | None = None) -> torch.Tensor:
    """The rotation of a layer's input; contract in `linear.rotate`."""
    return _linear_op("rotate", spec, x.device)(x)


def quantize(x: torch.Tensor, recipe: ActivationRecipe, *args: Any, spec: LinearSpec | None = None) -> Any:
    """Codes of a layer's input; contract in `linear.quantize`."""
    return _linear_op("quantize", spec, x.device)(x, recipe, *args)


def linear(
    x: torch.Tensor,
    weight: PackedTensor | torch.Tensor,
    bias: torch.Tensor | None,
    recipe: ActivationRecipe | None,
    state: LinearState,
    spec: LinearSpec,
) -> torch.Tensor:
    """A linear layer with quantized operands; contract in `linear.linear`.

    While a model is compiled the choice of its last ordinary call stands: the compiler cannot trace the choosing.
    """
    if torch.compiler.is_compiling():
        if state.run is None:
            raise BackendError("call a quantized model once before it is compiled: that chooses its kernels")
    else:
        state.run = _linear_op("linear", spec, x.device)
    return state.run(x, weight, bias, recipe, state)


def _linear_op(op: str, spec: LinearSpec | None, device: torch.device) -> Any:
    name = _chosen(op, spec, device, _forced.get())
    return getattr(import_module(f"turboquant.kernels.{name}"), op)


@lru_cache(maxsize=4096)
def _chosen(op: str, spec: LinearSpec | None, device: torch.device, forced: str) -> str:
    return choose(op, spec, device)[0]
