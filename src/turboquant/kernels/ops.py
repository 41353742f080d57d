"""The ops that layers call, and the choice of the backend that runs them.

A backend is a module with functions of the same names and signatures; it may lack some, or refuse some arguments by
saying why in its `supports(op, layout, device)` (None: it can). Of the cache ops, its `DTYPES`, where it has one, are
the cache dtypes it serves, `GRADIENTS = False` says that it computes none, and `serves(op, layout, chunk)`
says why not for chunks that it does not take. What was asked for runs, or an error says why not; with "auto" the first
backend that can runs, and `explain()` names it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant.kernels.linear import Coded, LinearSpec, LinearState
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe, parse_recipe

OPS = ("cache_append", "cache_attention")
LINEAR_OPS = ("rotate", "quantize", "norm_quantize", "add_norm_quantize", "gate_quantize", "linear")
BACKENDS = ("cuda", "triton", "cpu", "reference")  # in order of preference
INTERPRETED = {"triton": "cpu"}  # device type on which a backend is an interpreter, which "auto" does not choose
_forced: ContextVar[str] = ContextVar("turboquant_backend", default="auto")
# The same where the compiler looks: it guards what it read of a module, and traces no ContextVar. The innermost of the
# contexts that are open in any thread.
_compiled_forced = "auto"
_open: list[str] = []
_lock = Lock()


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why."""


@dataclass(frozen=True)
class Chunk:
    """What decides on the backend of a cache op beside layout and device.

    dtype: of the cache, None for any. grad: an argument requires a gradient. tokens: of the chunk. rows: query rows of
    a KV head, heads of its group times tokens. masked: there is padding or a mask. mixed: queries, keys, values and
    cache differ in dtype.
    """

    dtype: torch.dtype | None = None
    grad: bool = False
    tokens: int = 1
    rows: int = 1
    masked: bool = False
    mixed: bool = False


ANY = Chunk()


def _refusal(
    name: str, op: str, layout: PageLayout | LinearSpec | None, device: torch.device, chunk: Chunk = ANY
) -> str | None:
    """None if the backend can run the op, else the reason."""
    if isinstance(layout, PageLayout) and layout.kv.codec == "raw" and name != "reference":
        return f"{name} has no raw pages"
    module = import_module(f"turboquant.kernels.{name}")
    supports = getattr(module, "supports", None)
    why: str | None = supports(op, layout, device) if supports else None
    if why is None and not hasattr(module, op):
        why = f"{name} has no {op}"
    if why is not None or not op.startswith("cache_"):
        return why
    if chunk.grad and not getattr(module, "GRADIENTS", True):
        return f"{name} computes no gradients, and an argument requires one"
    dtypes = getattr(module, "DTYPES", None)
    if chunk.dtype is not None and dtypes is not None and chunk.dtype not in dtypes:
        return f"{name} serves no {str(chunk.dtype).removeprefix('torch.')} cache"
    serves = getattr(module, "serves", None)
    return serves(op, layout, chunk) if serves else None


def choose(
    op: str, layout: PageLayout | LinearSpec | None, device: torch.device, chunk: Chunk = ANY
) -> tuple[str, str]:
    """(backend, reason) for an op.

    Raises:
        BackendError: the backend forced with `use_backend` cannot run it.
    """
    forced = _forced.get()
    reasons: list[str] = []
    for name in BACKENDS if forced == "auto" else (forced,):
        why = _refusal(name, op, layout, device, chunk)
        if why is None and forced == "auto" and INTERPRETED.get(name) == device.type:
            why = f"{name}: its interpreter runs only with use_backend({name!r})"
        if why is None:
            return name, "; ".join(reasons) or ("asked for" if forced != "auto" else "first choice")
        reasons.append(why)
    raise BackendError(f"backend {forced!r} cannot run {op}: {'; '.join(reasons)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every op runs on this backend or raises BackendError; "auto" is the default choice."""
    known = ("auto", *BACKENDS)
    if name not in known:
        raise BackendError(f"backend {name!r} is not known: choose one of {known}")
    token = _forced.set(name)
    _compiler_sees(lambda: _open.append(name))
    try:
        yield
    finally:
        _forced.reset(token)
        _compiler_sees(lambda: _open.pop(len(_open) - 1 - _open[::-1].index(name)))


def _compiler_sees(change: Callable[[], object]) -> None:
    global _compiled_forced
    with _lock:
        change()
        _compiled_forced = _open[-1] if _open else "auto"


def explain(
    layout: PageLayout | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokens: int = 1,
) -> list[dict[str, str]]:
    """Which kernel runs each cache op, and why none before it.

    Args:
        layout, device, dtype: of the cache; without a dtype, one that every backend serves.
        tokens: of a chunk.

    Returns:
        Rows of {"op", "kernel", "device", "why"}.
    """
    return _explain(OPS, layout, torch.device(device), Chunk(dtype, tokens=tokens, rows=tokens))


def explain_linear(spec: LinearSpec, device: torch.device | str = "cpu") -> list[dict[str, str]]:
    """Which kernel runs each op of a linear layer, and why the ones before it do not: rows as of `explain`."""
    rows = _explain(LINEAR_OPS, spec, torch.device(device), ANY)
    if rows[-1]["kernel"] == "reference":  # it quantizes its rows itself
        rows[:-1] = [r | {"kernel": "reference", "why": "part of the reference's linear"} for r in rows[:-1]]
        return rows
    kernels = {r["op"]: r["kernel"] for r in rows}
    for r in rows:
        if r["op"] in ("norm_quantize", "gate_quantize") and r["kernel"] == "reference":
            r |= {"kernel": kernels["quantize"], "why": f"quantize after the model's own operations: {r['why']}"}
        if r["op"] == "add_norm_quantize" and r["kernel"] == "reference":
            r |= {"kernel": kernels["norm_quantize"], "why": f"norm_quantize after torch's addition: {r['why']}"}
    return rows


def _explain(
    ops: tuple[str, ...], layout: PageLayout | LinearSpec | None, device: torch.device, chunk: Chunk
) -> list[dict[str, str]]:
    rows = []
    for op in ops:
        name, why = choose(op, layout, device, chunk)
        note = getattr(import_module(f"turboquant.kernels.{name}"), "note", None)
        if op == "linear" and isinstance(layout, LinearSpec) and note is not None:
            why = f"{note(layout, device)}; {why}"
        rows.append({"op": op, "kernel": name, "device": str(device), "why": why})
    return rows


# ---- the cache


def _call(
    op: str, masked: bool, buf: Any, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> Any:  # masked: there is padding or a mask
    grad = wants_grad(q, k, v)
    (_, h, n, _), dtype, kept = k.shape, q.dtype, buf.ring_k.dtype
    mixed = not dtype == k.dtype == v.dtype == kept
    chunk = (kept, grad, n, q.shape[1] // h * n, masked, mixed)
    return _cache_op(op, layout, q.device, _forced.get(), chunk)(buf, layout, q, k, v, *args)


_cache_ops: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # the choice for a layout, by identity, and a kind of chunk


def _cache_op(op: str, layout: PageLayout, device: torch.device, forced: str, chunk: tuple[Any, ...]) -> Any:
    key = (op, id(layout), device, forced, *chunk)
    known = _cache_ops.get(key)
    if known is not None and known[0]() is layout:
        return known[1]
    name, _ = choose(op, layout, device, Chunk(*chunk))
    run = getattr(import_module(f"turboquant.kernels.{name}"), op)
    _cache_ops[key] = weakref.ref(layout, lambda _: _cache_ops.pop(key, None)), run
    return run


def cache_kernels(layout: PageLayout, device: torch.device, dtype: torch.dtype, tokens: int, rows: int) -> list[Any]:
    """What runs each of OPS for a chunk of one dtype without padding, mask and gradients; arguments as of `Chunk`."""
    chunk = (dtype, False, tokens, rows, False, False)
    return [_cache_op(op, layout, device, _forced.get(), chunk) for op in OPS]


def cache_append(buf: Any, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """Add a chunk to a layer's cache; contract in `reference.cache_append`."""
    if torch.compiler.is_compiling():
        torch.ops.turboquant.cache_append(*_tensors(buf), layout.kv.name, q, k, v, valid)
    else:
        _call("cache_append", valid is not None, buf, layout, q, k, v, valid)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a function of these is to be differentiated, which native kernels are not."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def cache_attention(
    buf: Any,
    layout: PageLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend to a layer's cache and the chunk; contract in `reference.cache_attention`."""
    args = (q, k, v, valid, mask, scaling, window, softcap, sink_logits)
    if torch.compiler.is_compiling():
        return torch.ops.turboquant.cache_attention(*_tensors(buf), layout.kv.name, *args)
    return _call("cache_attention", valid is not None or mask is not None, buf, layout, *args)


# The same as operators of torch, which torch.compile keeps whole; buffers are passed as tensors.

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
    _call("cache_append", valid is not None, buf, _layout(recipe, k.shape[-1]), q, k, v, valid)


@torch.library.custom_op("turboquant::cache_attention", mutates_args=())
def _attention_operator(
    pages: Tensor, table: Tensor, ring_k: Tensor, ring_v: Tensor, sink_k: Tensor, sink_v: Tensor, readers: Tensor,
    tracker: Tensor, length: Tensor, nonfinite: Tensor, recipe: str, q: Tensor, k: Tensor, v: Tensor,
    valid: Tensor | None = None, mask: Tensor | None = None, scaling: float | None = None, window: int | None = None,
    softcap: float | None = None, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    buf = CacheBuffers(pages, table, ring_k, ring_v, sink_k, sink_v, readers, tracker, length, nonfinite)
    layout = _layout(recipe, k.shape[-1])
    args = (q, k, v, valid, mask, scaling, window, softcap, sink_logits)
    out = _call("cache_attention", valid is not None or mask is not None, buf, layout, *args)
    return out.contiguous()


@_append_operator.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


@_attention_operator.register_fake
def _(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(args[11].shape, dtype=args[11].dtype, device=args[11].device)  # q


# ---- linear layers


def rotate(x: Tensor, spec: LinearSpec | None = None) -> Tensor:
    """The rotation of a layer's input; contract in `linear.rotate`."""
    return _linear_op("rotate", spec, x.device)(x)


def quantize(x: Tensor, recipe: ActivationRecipe, *args: Any, spec: LinearSpec | None = None) -> Any:
    """Codes of a layer's input; contract in `linear.quantize`."""
    return _linear_op("quantize", spec, x.device)(x, recipe, *args)


def linear(
    x: Tensor | Coded,
    weight: PackedTensor | Tensor,
    bias: Tensor | None,
    recipe: ActivationRecipe | None,
    state: LinearState,
    spec: LinearSpec,
) -> Tensor:
    """A linear layer with quantized operands; contract in `linear.linear`.

    While a model is compiled the choice of its last ordinary call stands: the compiler cannot trace the choosing. A
    backend that was asked for must be that one.
    """
    if torch.compiler.is_compiling():
        if state.run is None:
            raise BackendError("call a quantized model once before it is compiled: that chooses its kernels")
        run = state.run
        if _compiled_forced not in ("auto", state.backend):
            raise BackendError(
                f"backend {_compiled_forced!r} was asked for, and the model to compile runs on {state.backend!r}: call "
                "it once within use_backend before it is compiled"
            )
    else:
        state.backend, run = _linear(spec, x.device, _forced.get())
        state.run = run
    return run(x, weight, bias, recipe, state)


@lru_cache(maxsize=4096)
def _linear(spec: LinearSpec, device: torch.device, forced: str) -> tuple[str, Any]:
    backend = _chosen("linear", spec, device, forced)
    return backend, import_module(f"turboquant.kernels.{backend}").linear


def forced() -> str:
    """The backend that `use_backend` asks for, "auto" if none is."""
    return _forced.get()


def fused(op: str, spec: LinearSpec, device: torch.device) -> Any:
    """A kernel's "norm_quantize", "add_norm_quantize" or "gate_quantize" (contracts in `fused`), "linears" or "mlp"
    (contracts in `cpu.linear`), or "decoder_step" (`cpu.step.DecoderStep`) for a layer of 8-bit inputs.

    Returns:
        None where no backend has one, or the layer itself runs on the reference, which quantizes its rows itself.
    """
    return _fused(op, spec, device, _forced.get())


@lru_cache(maxsize=4096)
def _fused(op: str, spec: LinearSpec, device: torch.device, forced: str) -> Any:
    if spec.activation_bits != 8:
        return None
    try:
        names = [choose(o, spec, device)[0] for o in ("linear", op)]
    except BackendError:  # one was asked for that lacks this op: its own quantize runs
        return None
    return None if "reference" in names else getattr(import_module(f"turboquant.kernels.{names[1]}"), op)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias of a float layer in x's dtype: by a backend that has such an op (contract in `cpu.head.dense`), else
    by torch. The compiler sees torch's."""
    run = None if torch.compiler.is_compiling() else _dense(weight.shape, x.dtype, x.device, _forced.get())[0]
    return F.linear(x, weight, bias) if run is None else run(x, weight, bias)


def explain_dense(weight: Tensor) -> tuple[str, str]:
    """(kernel, why) of `dense` for a few rows of the weight's dtype, with how many in why; the kernel is "torch" where
    no backend has one."""
    return _dense(weight.shape, weight.dtype, weight.device, _forced.get())[1:]


@lru_cache(maxsize=4096)
def _dense(shape: torch.Size, dtype: torch.dtype, device: torch.device, forced: str) -> tuple[Any, str, str]:
    spec = LinearSpec(shape[1], shape[0], 0, 0, 16, dtype)
    try:
        name, why = choose("dense", spec, device)
    except BackendError as e:  # the backend asked for has none; nor have all of them
        return None, "torch", str(e)
    module = import_module(f"turboquant.kernels.{name}")
    return module.dense, name, f"up to {module.DENSE_ROWS} rows, torch beyond; {why}"


def _linear_op(op: str, spec: LinearSpec | None, device: torch.device) -> Any:
    name = _chosen(op, spec, device, _forced.get())
    return getattr(import_module(f"turboquant.kernels.{name}"), op)


@lru_cache(maxsize=4096)
def _chosen(op: str, spec: LinearSpec | None, device: torch.device, forced: str) -> str:
    return choose(op, spec, device)[0]
