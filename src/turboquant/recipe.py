"""Recipe: what is stored in how many bits. One frozen object owns every number; nobody recomputes one.

kv4                        live keys and values in 4 bit
k4v3                       4-bit keys, 3-bit values
plain4                     the paper's TurboQuant_mse, for comparison
raw                        keys and values as they are, in fp32: what is lossless must be identical (for tests)
w4, w8                     weights of linear layers in one stage of 4 bit, or in two (4+4)
a8, a4                     activations that enter linear layers, quantized while the model runs
w4a8kv4                    products, always in the order weights, activations, cache
kv4:ring=64,sinks=0,hot=8  with options: any field of KVRecipe, WeightRecipe or ActivationRecipe but bits and codec
"""

import difflib
import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import gcd
from typing import Any

KV_BITS = (2, 3, 4, 8)
RAW_BITS = 32
LINEAR_BITS = (4, 8)
EXAMPLES = ("kv4", "kv3", "kv2", "kv8", "k4v3", "plain4", "plain3", "plain2")
LINEAR_EXAMPLES = ("w4a8kv4", "w8a8kv4", "w4a8", "w8a8", "w4a4", "w4", "w8", "a8", "a4")


class RecipeError(ValueError):
    """A recipe or one of its options is not valid; the message says what is allowed."""


@dataclass(frozen=True)
class KVRecipe:
    """How one KV cache is stored.

    Attributes:
        key_bits, value_bits: bits of the codes, one of 2, 3, 4, 8; 32 for "raw".
        codec: "live" (tracked keys, see maths/codec.py), "plain" (the paper's TurboQuant_mse) or "raw" (fp32).
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

        need(self.codec in ("live", "plain", "raw"), "codec", "'live', 'plain' or 'raw'")
        bits = (RAW_BITS,) if self.codec == "raw" else KV_BITS
        need(self.key_bits in bits, "key_bits", f"one of {bits}")
        need(self.value_bits in bits, "value_bits", f"one of {bits}")
        need(16 <= self.page <= 512 and self.page % 16 == 0, "page", "a multiple of 16 from 16 to 512")
        need(-1 <= self.hot <= 64, "hot", "from 0 to 64, or -1 for the default")
        need(0 <= self.ring <= 65536, "ring", "from 0 to 65536 tokens")
        need(0 <= self.sinks <= 64, "sinks", "from 0 to 64 tokens")
        need(0 <= self.rewind <= self.page, "rewind", f"from 0 to page={self.page} tokens")
        need(0 <= self.decay < 1, "decay", "in [0, 1)")
        need(0 < self.blend <= 1, "blend", "in (0, 1]")
        _ = self.name

    def hot_channels(self, head_dim: int) -> int:
        """Hot key channels of a head: `hot`, or by default 4 up to head_dim 128 and head_dim/16 above."""
        if self.codec != "live":
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

    @cached_property  # made by __post_init__, for torch.compile can read it then and cannot make it
    def name(self) -> str:
        """The string that `parse_recipe` turns into this."""
        k, v = self.key_bits, self.value_bits
        if self.codec == "raw":
            head = "raw"
        elif self.codec == "plain":
            head = f"plain{k}" if k == v else f"plaink{k}v{v}"
        else:
            head = f"kv{k}" if k == v else f"k{k}v{v}"
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in ("key_bits", "value_bits", "codec") and getattr(self, f.name) != f.default
        ]
        return head + (":" + ",".join(options) if options else "")


def _need(part: Any, ok: bool, name: str, allowed: str) -> None:
    if not ok:
        raise RecipeError(f"{name}={getattr(part, name)!r} is not allowed: {name} must be {allowed}")


@dataclass(frozen=True)
class WeightRecipe:
    """How the weight (N, K) of a linear layer is stored: W = scale · (code - zero), one scale and zero a group.

    Attributes:
        bits: 4, one stage; or 8, two stages of 4 bit of which the first is a 4-bit weight by itself.
        group: weights along K that share a scale, a power of two from 16 to 512; 0 for a whole row. A K that the group
            does not divide gets the largest power of two that divides both (`group_of`).
        clip: 1 to search the range of each 4-bit group for the smallest squared error, 0 for minimum and maximum, -1 to
            search where the weight is rotated, that is, where inputs are quantized too (`clips`).
        head, embed: also the output and the input embeddings, in 8 bit (8) or not at all (0).
    """

    bits: int = 4
    group: int = 128
    clip: int = -1
    head: int = 0
    embed: int = 0

    def __post_init__(self) -> None:
        _need(self, self.bits in LINEAR_BITS, "bits", f"one of {LINEAR_BITS}")
        power = self.group > 0 and self.group & (self.group - 1) == 0
        _need(self, self.group == 0 or (16 <= self.group <= 512 and power), "group", "0 or a power of two, 16 to 512")
        _need(self, self.clip in (-1, 0, 1), "clip", "0, 1 or -1 for the default")
        _need(self, self.head in (0, 8), "head", "0 or 8")
        _need(self, self.embed in (0, 8), "embed", "0 or 8")

    @property
    def stages(self) -> int:
        """Stages of 4 bit."""
        return self.bits // 4

    def group_of(self, width: int) -> int:
        """Weights that share a scale in a row of `width`.

        Raises:
            RecipeError: no group of at least 8 fits.
        """
        group = gcd(width, self.group) if self.group else width
        if group < 8 or width % 8:
            raise RecipeError(f"a weight (N, {width}) cannot be packed: {width} must be a multiple of 8")
        return group

    def clips(self, rotated: bool) -> bool:
        """Whether the range of a group is searched.

        Unrotated, the large weights of a group often meet the large channels of the input, and the squared error of
        weights alone is the wrong guide. Two stages keep the full range: a clipped weight would cost more than it buys.
        """
        return self.stages == 1 and (rotated if self.clip < 0 else self.clip == 1)

    def bits_per_weight(self, width: int) -> float:
        """True bits: codes, 16-bit scales and 8-bit zeros."""
        return self.bits + (16 + 8) / self.group_of(width)


@dataclass(frozen=True)
class ActivationRecipe:
    """How the input of a linear layer is quantized, token by token, while the model runs.

    Attributes:
        bits: 8, rotated int8 with one scale a token; or 4, rotated asymmetric int4 in groups of `agroup`, one in `ahot`
            channels kept in 8 bit (the hot channels, which a tracker chooses).
        ahot: one in so many channels is hot at 4 bit; 0 for none.
        agroup: channels that share an int4 scale: 16, 32, 64 or 128.
        freeze: tokens after which the tracker of 4 bit stops following, so that results depend on nothing else; 0
            for never.
    """

    bits: int = 8
    ahot: int = 16
    agroup: int = 16
    freeze: int = 0

    def __post_init__(self) -> None:
        _need(self, self.bits in LINEAR_BITS, "bits", f"one of {LINEAR_BITS}")
        _need(self, self.ahot == 0 or 2 <= self.ahot <= 1024, "ahot", "0 or from 2 to 1024")
        _need(self, self.agroup in (16, 32, 64, 128), "agroup", "one of (16, 32, 64, 128)")
        _need(self, 0 <= self.freeze <= 2**31 - 1, "freeze", "from 0 to 2147483647 tokens")

    def hot_channels(self, width: int) -> int:
        """Hot channels of an input of `width`."""
        return 0 if self.bits == 8 or self.ahot == 0 else max(1, width // self.ahot)

    def group_of(self, width: int) -> int:
        """Channels that share an int4 scale."""
        return gcd(width, self.agroup)

    def bits_per_activation(self, width: int) -> float:
        """True bits a number of one token: codes, a byte a group, hot channels, 32-bit token scales."""
        if self.bits == 8:
            return 8 + 32 / width
        hot = self.hot_channels(width)
        return 4 + 8 / self.group_of(width) + (8 * hot + 32 * (1 + (hot > 0))) / width


@dataclass(frozen=True)
class Recipe:
    """What a model runs with; None leaves that part alone.

    Attributes:
        kv: of the cache.
        weights, activations: of the linear layers.
    """

    kv: KVRecipe | None = None
    weights: WeightRecipe | None = None
    activations: ActivationRecipe | None = None

    @property
    def linear(self) -> "Recipe | None":
        """The part that concerns linear layers, None if there is none."""
        return replace(self, kv=None) if self.weights or self.activations else None

    @property
    def name(self) -> str:
        """The string that `parse_recipe` turns into this."""
        head, options = "", []
        for letter, part in (("w", self.weights), ("a", self.activations)):
            if part is not None:
                head += f"{letter}{part.bits}"
                options += [f"{f.name}={getattr(part, f.name)}" for f in _options(part) if _changed(part, f)]
        kv, _, tail = (self.kv.name if self.kv else "").partition(":")
        options += [tail] if tail else []
        return (head + kv or "none") + (":" + ",".join(options) if options else "")


def _options(part: Any) -> list[Any]:
    return [f for f in fields(part) if f.name not in ("bits", "key_bits", "value_bits", "codec")]


def _changed(part: Any, f: Any) -> bool:
    return getattr(part, f.name) != f.default


_HEAD = re.compile(
    r"(?:w(?P<w>\d+))?(?:a(?P<a>\d+))?"
    r"(?P<cache>(?P<raw>raw)|(?P<plain>plain)?(?:kv(?P<both>\d+)|k(?P<k>\d+)v(?P<v>\d+)|(?P<bare>\d+)))?"
)


def parse_recipe(text: "str | Recipe") -> Recipe:
    """Turn "kv4", "k4v3", "plain4", "w4a8", "w4a8kv4" or "w4a8kv4:ring=64,group=64" into a Recipe.

    Raises:
        RecipeError: naming the part that is wrong, what is allowed, and the nearest known recipe.
    """
    if isinstance(text, Recipe):
        return text
    head, _, tail = str(text).strip().lower().partition(":")
    m = _HEAD.fullmatch(head)
    if m is None or not head or (m["bare"] and not m["plain"]):
        raise RecipeError(_unknown(text, head))
    kv = weights = activations = None
    if m["raw"]:
        kv = KVRecipe(RAW_BITS, RAW_BITS, codec="raw")
    elif m["cache"]:
        key_bits = int(m["k"] or m["both"] or m["bare"])
        value_bits = int(m["v"] or m["both"] or m["bare"])
        if key_bits not in KV_BITS or value_bits not in KV_BITS:
            raise RecipeError(_unknown(text, head))
        kv = KVRecipe(key_bits, value_bits, codec="plain" if m["plain"] else "live")
    for bits in (m["w"], m["a"]):
        if bits and int(bits) not in LINEAR_BITS:
            raise RecipeError(_unknown(text, head))
    weights = WeightRecipe(int(m["w"])) if m["w"] else None
    activations = ActivationRecipe(int(m["a"])) if m["a"] else None
    recipe = Recipe(kv, weights, activations)
    return _with_options(recipe, tail, str(text)) if tail else recipe


def _unknown(text: object, head: str) -> str:
    known = EXAMPLES + LINEAR_EXAMPLES
    likeness = [difflib.SequenceMatcher(None, head, e).ratio() for e in known]
    best = max(range(len(known)), key=likeness.__getitem__)
    hint = f" Did you mean {known[best]!r}?" if likeness[best] >= 0.4 else ""
    return (
        f"unknown recipe {text!r}.{hint} Known: kvB, kKvV and plainB with B, K, V in {KV_BITS}, wB and aB with B in "
        f"{LINEAR_BITS}, and products in the order w, a, cache (for example {', '.join(known)}), and options as in "
        "'kv4:ring=64,sinks=0' or 'w4a8:group=64'."
    )


def _with_options(recipe: Recipe, tail: str, text: str) -> Recipe:
    parts = {name: getattr(recipe, name) for name in ("weights", "activations", "kv") if getattr(recipe, name)}
    owner = {f.name: (name, type(f.default)) for name, part in parts.items() for f in _options(part)}
    given: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for item in tail.split(","):
        name, equals, value = item.partition("=")
        if name not in owner:
            near = difflib.get_close_matches(name, owner, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown option {name!r} in recipe {text!r}.{hint} Options: {', '.join(owner)}.")
        part, kind = owner[name]
        if name in given[part]:
            raise RecipeError(f"option {name!r} stands twice in recipe {text!r}")
        try:
            given[part][name] = kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise RecipeError(f"option {name}={value!r} in recipe {text!r} must be {what}") from None
        if not equals:
            raise RecipeError(f"option {name!r} in recipe {text!r} has no value; write {name}=...")
    if "page" in given.get("kv", {}):  # a page holds no more than can be taken back of it
        given["kv"].setdefault("rewind", max(0, min(parts["kv"].rewind, given["kv"]["page"])))
    return replace(recipe, **{name: replace(part, **given[name]) for name, part in parts.items()})
