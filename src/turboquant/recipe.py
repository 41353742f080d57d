"""Recipe: what is stored in how many bits. One frozen object owns every number; nobody recomputes one.

kv4                        live keys and values in 4 bit
k4v3                       4-bit keys, 3-bit values
plain4                     the paper's TurboQuant_mse, for comparison
kv4:ring=64,sinks=0,hot=8  with options (any field of KVRecipe except the bits and the codec)
"""

import difflib
import re
from dataclasses import dataclass, fields, replace

KV_BITS = (2, 3, 4, 8)
EXAMPLES = ("kv4", "kv3", "kv2", "kv8", "k4v3", "plain4", "plain3", "plain2")


class RecipeError(ValueError):
    """A recipe or one of its options is not valid; the message says what is allowed."""


@dataclass(frozen=True)
class KVRecipe:
    """How one KV cache is stored.

    Attributes:
        key_bits, value_bits: bits of the codes, one of 2, 3, 4, 8.
        codec: "live" (tracked keys, see maths/codec.py) or "plain" (the paper's TurboQuant_mse).
        page: tokens of a page, a multiple of 16.
        hot: key channels kept in 8 bit per page and head; -1 for the default of the head_dim (`hot_channels`).
        ring: newest tokens read in 16 bit, 0 allowed (the open page is in 16 bit anyway until it is complete).
        sinks: first tokens kept in 16 bit, 0 allowed.
        rewind: tokens that `crop` can take back without loss.
        decay, blend: of the tracker (`ChannelTracker`).
    """

    key_bits: int = 4
    value_bits: int = 4
    codec: str = "live"
    page: int = 64
    hot: int = -1
    ring: int = 128
    sinks: int = 4
    rewind: int = 32
    decay: float = 0.8
    blend: float = 0.5

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise RecipeError(f"{name}={getattr(self, name)!r} is not allowed: {name} must be {allowed}")

        need(self.key_bits in KV_BITS, "key_bits", f"one of {KV_BITS}")
        need(self.value_bits in KV_BITS, "value_bits", f"one of {KV_BITS}")
        need(self.codec in ("live", "plain"), "codec", "'live' or 'plain'")
        need(16 <= self.page <= 512 and self.page % 16 == 0, "page", "a multiple of 16 from 16 to 512")
        need(-1 <= self.hot <= 64, "hot", "from 0 to 64, or -1 for the default")
        need(0 <= self.ring <= 65536, "ring", "from 0 to 65536 tokens")
        need(0 <= self.sinks <= 64, "sinks", "from 0 to 64 tokens")
        need(0 <= self.rewind <= self.page, "rewind", f"from 0 to page={self.page} tokens")
        need(0 <= self.decay < 1, "decay", "in [0, 1)")
        need(0 < self.blend <= 1, "blend", "in (0, 1]")

    def hot_channels(self, head_dim: int) -> int:
        """Hot key channels of a head: `hot`, or by default 4 up to head_dim 128 and head_dim/16 above."""
        if self.codec == "plain":
            return 0
        default = 4 if head_dim <= 128 else head_dim // 16
        return min(default if self.hot < 0 else self.hot, head_dim // 2)

    @property
    def ring_slots(self) -> int:
        """Slots of the 16-bit ring: the ring or the open page, whichever is longer, and what `crop` may take back."""
        return -(-(max(self.ring, self.page) + self.rewind) // 16) * 16

    @property
    def chunk(self) -> int:
        """Longest chunk whose rows read exactly what they would read one token at a time (at least 1)."""
        return max(1, self.ring - self.page + 1)

    @property
    def name(self) -> str:
        """The string that `parse_recipe` turns into this."""
        k, v = self.key_bits, self.value_bits
        if self.codec == "plain":
            head = f"plain{k}" if k == v else f"plaink{k}v{v}"
        else:
            head = f"kv{k}" if k == v else f"k{k}v{v}"
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in ("key_bits", "value_bits", "codec") and getattr(self, f.name) != f.default
        ]
        return head + (":" + ",".join(options) if options else "")


@dataclass(frozen=True)
class Recipe:
    """What a model runs with. `kv` is the cache's recipe; None leaves the cache alone."""

    kv: KVRecipe | None = None

    @property
    def name(self) -> str:
        """The string that `parse_recipe` turns into this."""
        return self.kv.name if self.kv else "none"


_HEAD = re.compile(r"(?P<plain>plain)?(?:kv(?P<both>\d+)|k(?P<k>\d+)v(?P<v>\d+)|(?P<bare>\d+))")


def parse_recipe(text: "str | Recipe") -> Recipe:
    """Turn "kv4", "k4v3", "plain4" or "kv4:ring=64,hot=8" into a Recipe.

    Raises:
        RecipeError: naming the part that is wrong, what is allowed, and the nearest known recipe.
    """
    if isinstance(text, Recipe):
        return text
    head, _, tail = str(text).strip().lower().partition(":")
    m = _HEAD.fullmatch(head)
    if m is None or (m["bare"] and not m["plain"]):
        raise RecipeError(_unknown(text, head))
    key_bits = int(m["k"] or m["both"] or m["bare"])
    value_bits = int(m["v"] or m["both"] or m["bare"])
    if key_bits not in KV_BITS or value_bits not in KV_BITS:
        raise RecipeError(_unknown(text, head))
    kv = KVRecipe(key_bits, value_bits, codec="plain" if m["plain"] else "live")
    return Recipe(_with_options(kv, tail, str(text)) if tail else kv)


def _unknown(text: object, head: str) -> str:
    likeness = [difflib.SequenceMatcher(None, head, e).ratio() for e in EXAMPLES]
    best = max(range(len(EXAMPLES)), key=likeness.__getitem__)
    hint = f" Did you mean {EXAMPLES[best]!r}?" if likeness[best] >= 0.4 else ""
    return (
        f"unknown recipe {text!r}.{hint} Known: kvB, kKvV and plainB with B, K, V in {KV_BITS} "
        f"(for example {', '.join(EXAMPLES)}), and options as in 'kv4:ring=64,sinks=0'."
    )


def _with_options(kv: KVRecipe, tail: str, text: str) -> KVRecipe:
    allowed: dict[str, type] = {
        f.name: type(f.default) for f in fields(kv) if f.name not in ("key_bits", "value_bits", "codec")
    }
    given: dict[str, float] = {}
    for item in tail.split(","):
        name, equals, value = item.partition("=")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown option {name!r} in recipe {text!r}.{hint} Options: {', '.join(allowed)}.")
        try:
            given[name] = allowed[name](value)
        except ValueError:
            kind = "a whole number" if allowed[name] is int else "a number"
            raise RecipeError(f"option {name}={value!r} in recipe {text!r} must be {kind}") from None
        if not equals:
            raise RecipeError(f"option {name!r} in recipe {text!r} has no value; write {name}=...")
    return replace(kv, **given)  # type: ignore[arg-type]
