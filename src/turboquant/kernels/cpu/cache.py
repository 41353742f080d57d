"""cache_append and cache_attention on the CPU: the native module checks the contract, this one says what breaks it.

Every size and offset comes from PageLayout and every table from maths/; the C++ in csrc/ knows none. The environment
variable TURBOQUANT_CPU_ISA (avx512vnni, avx512, avx2, neondot, portable) forces an instruction set.

Bytes are the reference's, bit for bit; outputs differ by rounding. There is no gradient.
"""

import os
import weakref
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from turboquant.maths.codebook import lloyd_max
from turboquant.maths.codec import (
    CODE_CELLS,
    ROW_STEPS,
    S_STEPS,
    SEARCH_CELL,
    SEARCH_CELLS,
    SEARCH_UNITS,
    TRIALS,
    code_edges,
    codebook,
    int8_levels,
    log_decode,
    search_levels,
    token_scale,
)
from turboquant.maths.rotation import hadamard_block, signs
from turboquant.packed.bits import packed_bytes
from turboquant.packed.buffers import READER_STRIDE, STATES, CacheBuffers
from turboquant.packed.page import PageLayout

try:
    _native: Any = import_module("turboquant.kernels.cpu._native")
except ImportError as error:
    _native, _missing = None, str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BUFFERS = ("pages", "table", "ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker", "length", "nonfinite")
_KINDS = (*DTYPES, torch.uint8, torch.int32, torch.int64, torch.bool)  # in the order of csrc/tensors.h


def _exchange() -> Any:
    """The table of C functions by which torch describes its tensors; None before 2.10."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


if _native is not None:
    _native.use_tensors(Tensor, _KINDS, _exchange())


@lru_cache(maxsize=1)
def isas() -> tuple[str, ...]:
    """Instruction sets that the module has code for and this machine runs, the best first; empty without the module."""
    return tuple(_native.isas()) if _native is not None else ()


# for functions that give native calls addresses of tensors: where torch.compile cuts a function into graphs, what
# nothing reads afterwards is freed before the call
untraced = torch.compiler.disable


def isa() -> str:
    """The instruction set in use: TURBOQUANT_CPU_ISA, else the best.

    Raises:
        ValueError: that one does not run here.
    """
    return str(_native.isa())  # the variable is read there: os.environ takes longer than the rest of a call's checks


def supports(op: str, layout: PageLayout | None, device: torch.device) -> str | None:
    """None if the op can run, else why not."""
    if device.type != "cpu":
        return f"cpu: tensors are on {device.type}"
    if _native is None:
        return f"cpu: the native module is not built ({_missing})"
    asked = os.environ.get("TURBOQUANT_CPU_ISA", "")
    if asked and asked not in isas():
        return f"cpu: TURBOQUANT_CPU_ISA={asked!r} does not run here, only {', '.join(isas())}"
    return None


# of layouts by identity, for their hash takes longer: a weak reference, and the spec
_specs: dict[int, tuple[Any, Any]] = {}


def _spec(layout: PageLayout) -> Any:
    known = _specs.get(id(layout))
    if known is None or known[0]() is not layout:
        number = id(layout)
        known = weakref.ref(layout, lambda _: _specs.pop(number, None)), _new_spec(layout)
        _specs[number] = known
    return known[1]


def _new_spec(layout: PageLayout) -> Any:
    kv, d = layout.kv, layout.head_dim
    plain = kv.codec == "plain"
    shapes = {name: shape for name, (shape, _) in CacheBuffers.specs(layout, 1, 1, torch.float32).items()}
    # eight-bit logarithms as the maths decodes them
    s_table = log_decode(torch.arange(256, dtype=torch.uint8))
    a_table = token_scale(torch.arange(256, dtype=torch.uint8), torch.ones((), dtype=torch.float16))
    block = hadamard_block(d)
    numbers = {
        "page": kv.page,
        "d": d,
        "hot": layout.hot,
        "plain": plain,
        "key_bits": kv.key_bits,
        "value_bits": kv.value_bits,
        "block": block,
        "reader_stride": READER_STRIDE,
        "states": STATES,
        "page_bytes": layout.page_bytes,
        "ring": kv.ring,
        "slots": shapes["ring_k"][2],
        "sinks": shapes["sink_k"][2],
        "samples": shapes["readers"][2],
        "key_row": packed_bytes(d, kv.key_bits),
        "value_row": packed_bytes(d, kv.value_bits),
        "norm": block**-0.5,
        "s_steps": S_STEPS,
        "row_steps": ROW_STEPS,
        "decay_old": 1 - (1 - kv.decay),
        "decay_new": 1 - kv.decay,
        "blend_old": 1 - kv.blend,
        "blend_new": kv.blend,
        "code_cells": CODE_CELLS,
        "search_units": SEARCH_UNITS,
        "search_cell": SEARCH_CELL,
    }
    tables = {"signs": signs(d), "s_table": s_table, "a_table": a_table}
    for part, bits in (("key", kv.key_bits), ("value", kv.value_bits)):
        levels = lloyd_max(bits, None) if plain else codebook(bits)
        tables[f"{part}_levels"] = levels
        tables[f"{part}_edges"] = (levels[1:] + levels[:-1]) / 2
        numbers[f"{part}_unit"] = int8_levels(bits)[1]
        if not plain and bits < 8:
            tables[f"{part}_edges"] = torch.tensor(code_edges(bits))
        search = torch.zeros(len(TRIALS), SEARCH_CELLS) if plain or bits == 8 else torch.tensor(search_levels(bits))
        tables[f"{part}_search"] = search.T.flatten()  # (cells, trials)
    offsets = {name: field.offset for name, field in layout.fields.items()}
    return _native.spec(
        {k: float(v) for k, v in numbers.items()}, offsets, {k: v.float().tolist() for k, v in tables.items()}
    )


def _dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x with a dense last dimension, in `dtype` or any dtype that the kernels read."""
    if x.dtype != dtype and (dtype is not None or x.dtype not in DTYPES):
        x = x.to(dtype or torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def _as_read(
    buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask as the native calls read them, which refused them as they were.

    Raises:
        ValueError: what does not match.
    """
    b, h, n, d = k.shape
    if v.shape != k.shape or q.shape != (b, q.shape[1], n, d) or q.shape[1] % h or d != layout.head_dim:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not match")
    if valid is not None and (valid.shape != (b, n) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be ({b}, {n}) bool, got {tuple(valid.shape)} {valid.dtype}")
    dtype, width = buf.ring_k.dtype, buf.table.shape[1]
    if dtype not in DTYPES:
        raise ValueError(f"the cache must be float32, bfloat16 or float16, not {dtype}")
    specs = CacheBuffers.specs(layout, b, h, dtype, len(buf.pages), width, max(STATES, buf.tracker.shape[1]))
    for name in _BUFFERS:
        t = getattr(buf, name)
        if (tuple(t.shape), t.dtype) != specs[name]:
            raise ValueError(f"CacheBuffers.{name} must be {specs[name]}, got {(tuple(t.shape), t.dtype)}")
        if not t.is_contiguous() or t.device.type != "cpu":
            raise ValueError(f"CacheBuffers.{name} must be contiguous and on the CPU")
    return _dense(q), _dense(k, dtype), _dense(v, dtype), None if valid is None else valid.contiguous()


_REFUSED = "the native module refused what the checks of its wrapper found right"


def cache_append(buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """See `reference.cache_append`."""
    spec, threads = _spec(layout), torch.get_num_threads()
    if _native.append(spec, threads, buf, q, k, v, valid):
        return
    if not _native.append(spec, threads, buf, *_as_read(buf, layout, q, k, v, valid)):
        raise RuntimeError(_REFUSED)


def cache_attention(
    buf: CacheBuffers,
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
    """See `reference.cache_attention`."""
    b, hq, n, d = q.shape
    out = torch.empty_strided((b, hq, n, d), (n * hq * d, d, hq * d, 1), dtype=q.dtype)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask >= 0).expand(-1, 1, n, n).contiguous()
    if sink_logits is not None:
        sink_logits = sink_logits.detach().float().contiguous()
    spec, threads = _spec(layout), torch.get_num_threads()
    more = (mask, sink_logits, scaling or d**-0.5, softcap or 0.0, -1 if window is None else window)
    if _native.attention(spec, threads, buf, q, k, v, valid, out, *more):
        return out
    kept = out if out.dtype in DTYPES else out.float()
    if not _native.attention(spec, threads, buf, *_as_read(buf, layout, q, k, v, valid), kept, *more):
        raise RuntimeError(_REFUSED)
    return kept.to(out.dtype)
