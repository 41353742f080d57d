"""cache_append and cache_attention on the CPU: checks the contract, hands addresses to the native module.

Every size and offset comes from PageLayout and every table from maths/; the C++ in csrc/ knows none. The environment
variable TURBOQUANT_CPU_ISA (avx512vnni, avx512, avx2, portable) forces an instruction set.

Bytes are the reference's, bit for bit; outputs differ by rounding. There is no gradient.
"""

import os
import weakref
from functools import lru_cache, partial
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


@lru_cache(maxsize=1)
def isas() -> tuple[str, ...]:
    """Instruction sets that the module has code for and this machine runs, the best first; empty without the module."""
    return tuple(_native.isas()) if _native is not None else ()


def isa() -> str:
    """The instruction set in use: TURBOQUANT_CPU_ISA if this machine has it, else the best."""
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


@lru_cache(maxsize=64)
def _spec(layout: PageLayout, page_bytes: int) -> Any:
    # page_bytes is in the key: a stale size would let the native code write beyond a page
    kv, d = layout.kv, layout.head_dim
    plain = kv.codec == "plain"
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
        "page_bytes": page_bytes,
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


def _row(x: Tensor) -> tuple[int, int, int, int, int]:
    sb, sh, sn, _ = x.stride()
    return x.data_ptr(), sb, sh, sn, DTYPES[x.dtype]


def _dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x with a dense last dimension, in `dtype` or any dtype that the kernels read."""
    if x.dtype != dtype and (dtype is not None or x.dtype not in DTYPES):
        x = x.to(dtype or torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


_known: dict[int, tuple[Any, ...]] = {}  # of buffers by identity: a weak reference, what was checked, sizes, spec


def _forget(number: int, _: Any) -> None:
    _known.pop(number, None)


def _check_buffers(buf: CacheBuffers, layout: PageLayout, batch: int, heads: int) -> None:
    dtype, width = buf.ring_k.dtype, buf.table.shape[1]
    if dtype not in DTYPES:
        raise ValueError(f"the cache must be float32, bfloat16 or float16, not {dtype}")
    specs = CacheBuffers.specs(layout, batch, heads, dtype, len(buf.pages), width)
    for name in _BUFFERS:
        t = getattr(buf, name)
        if (tuple(t.shape), t.dtype) != specs[name]:
            raise ValueError(f"CacheBuffers.{name} must be {specs[name]}, got {(tuple(t.shape), t.dtype)}")
        if not t.is_contiguous():
            raise ValueError(f"CacheBuffers.{name} must be contiguous")


def _arguments(
    buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None
) -> tuple[Any, ...]:
    """Spec, addresses, sizes and strides, and last what has to stay alive while they are used."""
    b, h, n, d = k.shape
    if v.shape != k.shape or q.shape != (b, q.shape[1], n, d) or q.shape[1] % h or d != layout.head_dim:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not match")
    if valid is not None and (valid.shape != (b, n) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be ({b}, {n}) bool, got {tuple(valid.shape)} {valid.dtype}")
    tensors = [getattr(buf, name) for name in _BUFFERS]
    at = tuple([t.data_ptr() for t in tensors])
    pool, width = tensors[0].shape[0], tensors[1].shape[1]
    # the checks are repeated when anything moved: a decode step changes nothing but the numbers in the buffers
    key = (at, tensors[0].shape, tensors[1].shape, b, h, layout)
    known = _known.get(id(buf))
    if known is None or known[0]() is not buf or known[1] != key:
        _check_buffers(buf, layout, b, h)
        slots, sinks, samples = buf.ring_k.shape[2], buf.sink_k.shape[2], buf.readers.shape[2]
        known = (
            weakref.ref(buf, partial(_forget, id(buf))),
            key,
            buf.ring_k.dtype,
            (slots, sinks, samples, width, DTYPES[buf.ring_k.dtype], pool),
            _spec(layout, layout.page_bytes),
        )
        _known[id(buf)] = known
    dtype, sizes, spec = known[2:]
    q, k, v = _dense(q), _dense(k, dtype), _dense(v, dtype)
    valid = None if valid is None else valid.contiguous()
    at_valid = 0 if valid is None else valid.data_ptr()
    whole = (b, h, q.shape[1] // h, n, *sizes)
    return spec, at, whole, _row(q), _row(k), _row(v), at_valid, (q, k, v, valid)


def cache_append(buf: CacheBuffers, layout: PageLayout, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    """See `reference.cache_append`."""
    if not k.shape[0] or not k.shape[2]:
        return
    spec, buffers, sizes, q_, k_, v_, valid_, _alive = _arguments(buf, layout, q, k, v, valid)
    _native.append(spec, isa(), torch.get_num_threads(), buffers, sizes, q_, k_, v_, valid_)


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
    if not out.numel():
        return out
    spec, buffers, sizes, q_, k_, v_, valid_, _alive = _arguments(buf, layout, q, k, v, valid)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask >= 0).expand(-1, 1, n, n).contiguous()
    if sink_logits is not None:
        sink_logits = sink_logits.detach().float().contiguous()
    kept = out if out.dtype in DTYPES else out.float()
    _native.attention(
        spec,
        isa(),
        torch.get_num_threads(),
        buffers,
        sizes,
        q_,
        k_,
        v_,
        _row(kept),
        valid_,
        0 if mask is None else mask.data_ptr(),
        n * n if mask is not None and mask.shape[0] > 1 else 0,
        scaling or d**-0.5,
        softcap or 0.0,
        -1 if window is None else window,
        layout.kv.ring,
        0 if sink_logits is None else sink_logits.data_ptr(),
    )
    return kept.to(out.dtype)
