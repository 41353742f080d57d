"""Decoder layers that follow each other, in one native call a step.

A model calls its layers one after another, each with what the one before returned. Which layers do so, a cache sees
while they run by themselves (`Chain.note`). In a later step the first of them computes all (`Chain.run`), and every
other one finds its output if it is given that very tensor, unwritten, with the same angles (`Chain.take`). Where a
model goes on in another way (it leaves early, a hook changes what a layer returns), the layers that were not asked for
are taken back from their caches before anything else comes to these (`Chain.settle`): without loss, for a step has no
more tokens than the recipe's `rewind`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

from turboquant.kernels import ops
from turboquant.layers.cache import LayerCache

Angles = tuple[Tensor, Tensor]


class Ready(NamedTuple):
    """A layer that may run with others: the kernel's object for its two calls, its cache and the scaling of logits."""

    kernel: Any
    cache: LayerCache
    scaling: float


class Chain:
    """What a cache knows of the layers that use it. A copy of it knows only what has to be taken back."""

    def __init__(self, left: list[LayerCache] | None = None, tokens: int = 0) -> None:
        self._known: dict[int, list[ref[Any]]] = {}  # id of the first layer -> layers that followed each other
        self._now: list[ref[Any]] = []  # the layers that run now, as far as they have
        self._seen: tuple[Any, ...] = ()  # output and angles of the last of them, and how often these were written
        self._coming: list[tuple[Any, Tensor]] = []  # layers not asked for yet and their outputs, the last one first
        self._left, self._tokens = left or [], tokens  # their caches, in the same order, and what was added to each

    def __reduce__(self) -> tuple[Any, ...]:
        return Chain, (self._left, self._tokens)

    def take(self, layer: Any, x: Tensor, angles: Angles) -> Tensor | None:
        """The layer's output for x, if it was computed together with x."""
        if not self._coming or self._coming[-1][0]() is not layer or not self._follows(x, angles):
            return None
        self._left.pop()
        _, out = self._coming.pop()
        self._see(out, angles)
        return out

    def run(self, layer: Any, x: Tensor, angles: Angles, ready: Callable[[Any], Ready | None]) -> Tensor | None:
        """The layer's output for x (B, n, K), computed together with those of layers that followed it when they ran by
        themselves; None where it has to run by itself.

        Args:
            ready: of a layer, whether and how it may run with others.
        """
        self.settle()
        known = self._known.get(id(layer), ())
        if len(known) < 2 or known[0]() is not layer or any(t.is_inference() for t in angles):
            return None
        steps: list[Ready] = []
        for one in map(ref.__call__, known):
            step = None if one is None else ready(one)
            if step is None or not _fits(step, x):
                break
            steps.append(step)
        if len(steps) < 2:
            return None
        n = x.shape[1]
        for s in steps:
            s.cache.reserve(n)
        rows = [(s.kernel, s.cache.buf, s.cache.layout, s.scaling, s.cache.window) for s in steps]
        outs = steps[0].kernel.in_turn(rows, x, *angles)
        if outs is None:
            return None
        for s in steps:
            s.cache.came(n)
        self._now = known if len(steps) == len(known) else known[: len(steps)]
        self._left, self._tokens = [s.cache for s in steps[:0:-1]], n
        self._coming = list(zip(self._now[:0:-1], outs[:0:-1], strict=True))
        self._see(outs[0], angles)
        return outs[0]

    def note(self, layer: Any, x: Tensor, out: Tensor, angles: Angles) -> None:
        """A layer that was ready has made `out` of x by itself."""
        if self._seen and self._follows(x, angles) and all(r() is not layer for r in self._now):
            self._now.append(ref(layer))
        else:
            self._now = self._known[id(layer)] = [ref(layer)]
        self._see(out, angles)

    def settle(self) -> None:
        """Take back what was computed and not asked for."""
        left, self._left, self._coming = self._left, [], []
        if left:
            self._now = self._now[: -len(left)]
            if self._now:
                self._known[id(self._now[0]())] = self._now
            self._seen = ()
            for cache in left:
                cache.crop(self._tokens)

    def _see(self, out: Tensor, angles: Angles) -> None:
        plain = not any(t.is_inference() for t in (out, *angles))  # the others count how often they were written
        self._seen = (out, *angles, *(t._version for t in angles)) if plain else ()

    def _follows(self, x: Tensor, angles: Angles) -> bool:
        out, cos, sin, *written = self._seen
        a, b = angles
        return x is out and not x._version and cos is a and sin is b and written == [a._version, b._version]


def _fits(step: Ready, x: Tensor) -> bool:
    """Whether a layer's cache can take rows by a call of several layers, whose kernels are those that would serve it
    by itself."""
    own, (b, n, _) = step.cache, x.shape
    if not own.holds(b, n) or own.layout is None or own.buf is None:
        return False
    q, k, _ = step.kernel.sizes
    kernels = ops.cache_kernels(own.layout, x.device, own.buf.ring_k.dtype, n, q // k * n)
    return own.buf.ring_k.dtype is x.dtype and tuple(kernels) == step.kernel.cache_ops
