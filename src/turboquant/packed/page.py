"""The KV page: P tokens of one layer and one KV head as bytes. PageLayout is the only owner of sizes and offsets.

A page is written once, when its last token has come, and never changed. Its bytes depend on the tokens of its own
sequence up to its end and on nothing else. Every section starts 16-byte aligned except the small header fields,
which share one aligned block; padding bytes are zero.

>>> from turboquant.recipe import KVRecipe
>>> print(PageLayout(KVRecipe(), 128))
PageLayout kv4, head_dim 128: 64 tokens in 8864 bytes, key 4.594 and value 4.062 bits per number
     0  key_mean_code     int8     128      128 B
   128  key_log_s         uint8    128      128 B
   256  key_log_scale     uint8    64        64 B
   320  key_hot_mean      float16  4          8 B
   328  key_hot_step      float16  4          8 B
   336  key_base          float16  1          2 B
   338  key_mean_step     float16  1          2 B
   340  value_base        float16  1          2 B
   342  key_hot_index     uint8    4          4 B
   352  key_hot_codes     int8     4x64     256 B
   608  key_codes         packed   64x128  4096 B
  4704  value_log_scale   uint8    64        64 B
  4768  value_codes       packed   64x128  4096 B
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from turboquant.maths.codec import LiveCodes, PlainCodes, RowCodes
from turboquant.packed.bits import pack, packed_bytes, unpack
from turboquant.recipe import KVRecipe, RecipeError

ALIGN = 16


@dataclass(frozen=True)
class Field:
    """One field of a page: `shape` elements of `dtype` (or codes of `bits`) at byte `offset`."""

    name: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    bits: int = 0


def _align(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


@dataclass(frozen=True)
class PageLayout:
    """Sizes and offsets of a page for one recipe and head_dim.

    Attributes:
        stride: bytes from one page to the next where a page needs fewer; what is over is zero. 0 for none over.

    Raises:
        RecipeError: a head_dim that the codec cannot take (it must be a multiple of 16, from 16 to 256).
    """

    kv: KVRecipe
    head_dim: int
    stride: int = 0

    def __post_init__(self) -> None:
        if not 16 <= self.head_dim <= 256 or self.head_dim % 16:
            raise RecipeError(f"head_dim={self.head_dim} is not supported: it must be a multiple of 16, 16 to 256")

    @property
    def hot(self) -> int:
        """Hot key channels of a page."""
        return self.kv.hot_channels(self.head_dim)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Every field by name, in the order of the bytes."""
        p, d, h, f16 = self.kv.page, self.head_dim, self.hot, torch.float16
        if self.kv.codec == "raw":
            nbytes = p * d * 4
            return {
                name: Field(name, i * nbytes, nbytes, torch.float32, (p, d))
                for i, name in enumerate(("key_codes", "value_codes"))
            }
        if self.kv.codec == "plain":
            small: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("key_scale", f16, (p,))]
            value_small: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("value_scale", f16, (p,))]
        else:
            small = [
                ("key_mean_code", torch.int8, (d,)),
                ("key_log_s", torch.uint8, (d,)),
                ("key_log_scale", torch.uint8, (p,)),
                ("key_hot_mean", f16, (h,)),
                ("key_hot_step", f16, (h,)),
                ("key_base", f16, (1,)),
                ("key_mean_step", f16, (1,)),
                ("value_base", f16, (1,)),
                ("key_hot_index", torch.uint8, (h,)),
            ]
            value_small = [("value_log_scale", torch.uint8, (p,))]
        out: dict[str, Field] = {}
        at = 0

        def add(name: str, dtype: torch.dtype, shape: tuple[int, ...], bits: int = 0) -> None:
            nonlocal at
            nbytes = shape[0] * packed_bytes(d, bits) if bits else math.prod(shape) * dtype.itemsize
            out[name] = Field(name, at, nbytes, dtype, shape, bits)
            at += nbytes

        for entry in small:
            add(*entry)
        at = _align(at)
        if h:
            add("key_hot_codes", torch.int8, (h, p))
        add("key_codes", torch.uint8, (p, d), self.kv.key_bits)
        at = _align(at)
        for entry in value_small:
            add(*entry)
        at = _align(at)
        add("value_codes", torch.uint8, (p, d), self.kv.value_bits)
        return out

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values together."""
        last = self.fields["value_codes"]
        return max(_align(last.offset + last.nbytes), self.stride)

    @property
    def key_bytes(self) -> int:
        """Bytes up to the value part (the header's value_base counts as keys')."""
        return next(f.offset for f in self.fields.values() if f.name.startswith("value_") and f.name != "value_base")

    @property
    def row_tokens(self) -> int:
        """Tokens after which a code row of keys starts 16-byte aligned again (1, 2, 4 or 8)."""
        return ALIGN // math.gcd(ALIGN, packed_bytes(self.head_dim, self.kv.key_bits))

    @property
    def key_bits(self) -> float:
        """True bits per key number: codes, hot rows, header and padding included."""
        return self.key_bytes * 8 / (self.kv.page * self.head_dim)

    @property
    def value_bits(self) -> float:
        """True bits per value number, everything included."""
        return (self.page_bytes - self.key_bytes) * 8 / (self.kv.page * self.head_dim)

    def read(self, pages: Tensor, name: str) -> Tensor:
        """Field `name` of pages (..., page_bytes) uint8 -> (..., *shape); codes come unpacked, uint8."""
        f = self.fields[name]
        raw = pages[..., f.offset : f.offset + f.nbytes]
        if f.bits:
            return unpack(raw.unflatten(-1, (f.shape[0], -1)), f.bits)
        value = raw.contiguous().view(f.dtype)
        return value.unflatten(-1, f.shape)

    def write(self, values: dict[str, Tensor]) -> Tensor:
        """All fields, each (..., *shape) -> (..., page_bytes) uint8; padding is zero."""
        if set(values) != set(self.fields):
            raise ValueError(f"a page needs the fields {sorted(self.fields)}, got {sorted(values)}")
        some = values["key_codes"]
        out = torch.zeros(*some.shape[:-2], self.page_bytes, dtype=torch.uint8, device=some.device)
        for name, f in self.fields.items():
            v = values[name]
            raw = pack(v, f.bits) if f.bits else v.to(f.dtype).contiguous().view(torch.uint8)
            out[..., f.offset : f.offset + f.nbytes] = raw.reshape(*some.shape[:-2], f.nbytes)
        return out

    def __str__(self) -> str:
        head = (
            f"PageLayout {self.kv.name}, head_dim {self.head_dim}: {self.kv.page} tokens in {self.page_bytes} bytes, "
            f"key {self.key_bits:.3f} and value {self.value_bits:.3f} bits per number"
        )
        rows = [
            f"{f.offset:6d}  {f.name:16s}  {'packed' if f.bits else str(f.dtype).removeprefix('torch.'):7s}  "
            f"{'x'.join(map(str, f.shape)):7s} {f.nbytes:4d} B"
            for f in self.fields.values()
        ]
        return "\n".join([head, *rows])


def pack_page(layout: PageLayout, keys: LiveCodes | PlainCodes, values: RowCodes | PlainCodes) -> Tensor:
    """Codes of (..., P, d) keys and values -> (..., page_bytes) uint8."""
    if isinstance(keys, PlainCodes) and isinstance(values, PlainCodes):
        return layout.write(
            {"key_scale": keys.scale, "key_codes": keys.codes, "value_scale": values.scale, "value_codes": values.codes}
        )
    assert isinstance(keys, LiveCodes) and isinstance(values, RowCodes)
    fields = {
        "key_mean_code": keys.mean_code,
        "key_log_s": keys.log_s,
        "key_log_scale": keys.rows.log_scale,
        "key_hot_mean": keys.hot_mean,
        "key_hot_step": keys.hot_step,
        "key_base": keys.rows.base.unsqueeze(-1),
        "key_mean_step": keys.mean_step.unsqueeze(-1),
        "value_base": values.base.unsqueeze(-1),
        "key_hot_index": keys.hot_index,
        "key_codes": keys.rows.codes,
        "value_log_scale": values.log_scale,
        "value_codes": values.codes,
    }
    if layout.hot:
        fields["key_hot_codes"] = keys.hot_codes
    return layout.write(fields)


def unpack_keys(layout: PageLayout, pages: Tensor) -> LiveCodes | PlainCodes:
    """(..., page_bytes) uint8 -> the codes of the keys."""
    get = lambda name: layout.read(pages, name)  # noqa: E731
    if layout.kv.codec == "plain":
        return PlainCodes(get("key_codes"), get("key_scale"))
    rows = RowCodes(get("key_codes"), get("key_log_scale"), get("key_base").squeeze(-1))
    hot = get("key_hot_codes") if layout.hot else pages.new_zeros((*pages.shape[:-1], 0, layout.kv.page)).char()
    return LiveCodes(
        rows,
        get("key_log_s"),
        get("key_mean_code"),
        get("key_mean_step").squeeze(-1),
        get("key_hot_index"),
        get("key_hot_mean"),
        get("key_hot_step"),
        hot,
    )


def unpack_values(layout: PageLayout, pages: Tensor) -> RowCodes | PlainCodes:
    """(..., page_bytes) uint8 -> the codes of the values."""
    codes = layout.read(pages, "value_codes")
    if layout.kv.codec == "plain":
        return PlainCodes(codes, layout.read(pages, "value_scale"))
    return RowCodes(codes, layout.read(pages, "value_log_scale"), layout.read(pages, "value_base").squeeze(-1))
