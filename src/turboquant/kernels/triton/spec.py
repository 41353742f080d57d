"""What the kernels must know of a layout, as compile-time numbers (Spec) and small device tables.

Every size and offset comes from PageLayout and every table from maths/. A table index of a kernel is one of the T_
numbers: `tables` is one fp32 tensor of 256 entries each for the decoded 8-bit logarithms, the signs, the levels and
the edges between them (of live codes up to 4 bit in cells), and the levels of the search for a scale, 256 a trial.
"""

from collections import namedtuple
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.maths.codebook import lloyd_max
from turboquant.maths.codec import TRIALS, code_edges, codebook, int8_levels, log_decode, search_levels, token_scale
from turboquant.maths.rotation import hadamard, hadamard_block, signs
from turboquant.packed.bits import packed_bytes
from turboquant.packed.buffers import READER_STRIDE, reader_slots
from turboquant.packed.page import PageLayout

TABLES = ("s", "a", "signs", "key_levels", "key_edges", "value_levels", "value_edges", "key_search", "value_search")
OFFSETS = (
    "key_mean_code", "key_log_s", "key_log_scale", "key_hot_mean", "key_hot_step", "key_base", "key_mean_step",
    "value_base", "key_hot_index", "key_hot_codes", "key_codes", "value_log_scale", "value_codes", "key_scale",
    "value_scale",
)  # fmt: skip

# P tokens of a page (PP: next power of two), D head_dim (DP likewise, as HALVES rows of W), TILE tokens that attention
# reads at once, R ring, C its slots, S sinks, J reader samples, and the numbers of the codec
_NUMBERS = (
    "P", "PP", "TILE", "D", "DP", "W", "HALVES", "NORM", "R", "C", "S", "SP", "J", "JP", "NS", "NSP", "STRIDE", "LIVE",
    "KB", "VB", "KROW", "VROW", "KUNIT", "VUNIT", "HOT", "HOTP", "GAPS", "BYTES", "DECAY", "BLEND", "TRIALS",
)  # fmt: skip
_FIELDS = [*_NUMBERS, *(f"T_{t}" for t in TABLES), *(f"O_{o}" for o in OFFSETS)]
Spec = namedtuple("Spec", _FIELDS)  # type: ignore[misc]


def _power(n: int) -> int:
    return triton.next_power_of_2(max(1, n))


@lru_cache(maxsize=64)
def spec(layout: PageLayout) -> Any:
    """The numbers of a layout."""
    kv, d, f = layout.kv, layout.head_dim, layout.fields
    dp, live = _power(d), kv.codec == "live"
    width, readers = min(dp, 128), reader_slots(kv)
    numbers = dict(
        P=kv.page, PP=_power(kv.page), TILE=min(64, kv.page & -kv.page), D=d, DP=dp, W=width, HALVES=dp // width,
        NORM=hadamard_block(d) ** -0.5, R=kv.ring, C=kv.ring_slots, S=kv.sinks, SP=max(16, _power(kv.sinks)),
        J=readers, JP=_power(readers), NS=kv.page // READER_STRIDE, NSP=_power(kv.page // READER_STRIDE),
        STRIDE=READER_STRIDE, LIVE=live, KB=kv.key_bits, VB=kv.value_bits, KROW=packed_bytes(d, kv.key_bits),
        VROW=packed_bytes(d, kv.value_bits), KUNIT=int8_levels(kv.key_bits)[1] if live else 1.0,
        VUNIT=int8_levels(kv.value_bits)[1] if live else 1.0, HOT=layout.hot, HOTP=max(16, _power(layout.hot)),
        GAPS=len(_gaps(layout)), BYTES=layout.page_bytes, DECAY=1 - kv.decay, BLEND=kv.blend, TRIALS=len(TRIALS),
        **{f"T_{t}": 256 * (i if t != "value_search" else i - 1 + len(TRIALS)) for i, t in enumerate(TABLES)},
        **{f"O_{o}": f[o].offset if o in f else 0 for o in OFFSETS},
    )  # fmt: skip
    return Spec(**numbers)


@lru_cache(maxsize=64)
def constants(layout: PageLayout) -> Any:
    """`spec` as Triton's compile-time constants, the argument L of kernels; plain numbers in the interpreter."""
    return spec(layout) if triton.knobs.runtime.interpret else Spec(*map(tl.constexpr, spec(layout)))


def _gaps(layout: PageLayout) -> list[int]:
    """The padding bytes of a page."""
    used = {i for f in layout.fields.values() for i in range(f.offset, f.offset + f.nbytes)}
    return [i for i in range(layout.page_bytes) if i not in used]


@lru_cache(maxsize=64)
def tables(layout: PageLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 tables, the (W, W) int8 Hadamard matrix of one half (0, 1 and -1), and the padding bytes, int32."""
    kv, d, codes = layout.kv, layout.head_dim, torch.arange(256, dtype=torch.uint8)
    parts = {"s": log_decode(codes), "a": token_scale(codes, torch.ones((), dtype=torch.float16))}
    parts["signs"] = signs(d)
    for name, bits in (("key", kv.key_bits), ("value", kv.value_bits)):
        levels = lloyd_max(bits, None) if kv.codec == "plain" else codebook(bits)
        parts[f"{name}_levels"], parts[f"{name}_edges"] = levels, (levels[1:] + levels[:-1]) / 2
        small = kv.codec == "live" and bits < 8
        if small:
            parts[f"{name}_edges"] = torch.tensor(code_edges(bits))
        search = torch.zeros(len(TRIALS), 256)
        if small:
            search[:, : len(search_levels(bits)[0])] = torch.tensor(search_levels(bits))
        parts[f"{name}_search"] = search.flatten()
    s = spec(layout)
    out = torch.zeros(256 * (len(TABLES) - 2 + 2 * len(TRIALS)))
    for name in TABLES:
        at = getattr(s, f"T_{name}")
        out[at : at + len(parts[name])] = parts[name].float()
    block, matrix = min(hadamard_block(d), s.W), torch.zeros(s.W, s.W)
    inside = min(d, s.W)
    matrix[:inside, :inside] = hadamard(torch.eye(inside), block) * block**0.5
    gaps = torch.tensor(_gaps(layout) or [0], dtype=torch.int32)
    return out.to(device), matrix.round().to(torch.int8).to(device), gaps.to(device)


_PARTS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def parts(dtype: torch.dtype) -> int:
    """How `tile.hadamard` splits its operand: 1 for 16-bit numbers, 3 for fp32, 0 (plain fp32) in the interpreter."""
    return 0 if triton.knobs.runtime.interpret else _PARTS[dtype]


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a model dtype."""
    return _TYPES[dtype]
