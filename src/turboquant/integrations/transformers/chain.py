"""Decoder layers that follow each other, in one native call a step.

A model calls its layers one after another, each with what the one before returned. Which layers do so, a cache sees
while they run by themselves (`Chain.see`). In a later step the first of them computes all (`Chain.run`), and every
other one finds its output if it is given that very tensor, unwritten, with the same angles (`Chain.take`). Where a
model goes on in another way (it leaves early, a step is interrupted), the layers that were not asked for are taken back
from their caches before anything else comes to these (`Chain.settle`). Everything is then as if they had not run, but
that of n tokens taken back, as of any others, the slots stay written: a later `crop` has n tokens less of `rewind`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from turboquant.kernels import ops
from turboquant.layers.cache import LayerCache

Angles = tuple[Tensor, Tensor]


class Ready(NamedTuple):
    """A layer that may run with others: the kernel's object for its two calls, its cache and the scaling of logits."""

    kernel: Any
    cache: LayerCache
    scaling: float


class Ahead(NamedTuple):
    """A layer that the model has not asked for, what its cache held before, and its output, once there is one."""

    layer: ref[Any]
    cache: LayerCache
    lengths: list[int]
    columns: int
    out: Tensor | None = None


class Chain:
    """What a cache knows of the layers that use it. A copy knows nothing: what is copied has been settled."""

    def __init__(self) -> None:
        self.ahead: list[Ahead] = []  # the last layer first
        self._behind: WeakKeyDictionary[Any, ref[Any] | None] = WeakKeyDictionary()  # of a layer, which came next
        self._seen: tuple[Any, ...] = ()  # the layer that came last, what the next one is to get, and those tensors

    def __reduce__(self) -> tuple[Any, ...]:
        return Chain, ()

    def take(self, layer: Any, x: Tensor, angles: Angles) -> Tensor | None:
        """The layer's output for x, if it was computed together with x."""
        if not self.ahead or self.ahead[-1].layer() is not layer or not self._follows(x, angles):
            return None
        return self.see(layer, self.ahead.pop().out, angles)

    def run(self, layer: Any, x: Tensor, angles: Angles, ready: Callable[[Any], Ready | None]) -> Tensor | None:
        """The layer's output for x (B, n, K), computed together with those of layers that followed it when they ran by
        themselves; None where it has to run by itself.

        Args:
            ready: of a layer, whether and how it may run with others.
        """
        self.settle()
        if self._follows(x, angles):
            self._link(ref(layer))
        steps: list[tuple[ref[Any], Ready]] = []
        one = layer
        while one is not None and (step := ready(one)) is not None and _fits(step, x):
            if any(step.cache is s.cache for _, s in steps):  # also of a layer that comes twice
                break
            steps.append((ref(one), step))
            one = (behind := self._behind.get(one)) and behind()
        if len(steps) < 2:
            return None
        self._seen = ()
        for who, s in steps:  # counted before they come: whatever ends the call, `settle` undoes it
            self.ahead.insert(0, Ahead(who, s.cache, s.cache.lengths, s.cache.columns))
            s.cache.extend(x.shape[1])
        rows = [(s.kernel, s.cache.buf, s.cache.layout, s.scaling, s.cache.window) for _, s in steps]
        outs = steps[0][1].kernel.in_turn(rows, x, *angles)
        if outs is None:
            return self.settle()
        self.ahead = [a._replace(out=y) for a, y in zip(self.ahead, outs[::-1], strict=True)][:-1]
        return self.see(layer, outs[0], angles)

    def see(self, layer: Any, out: Tensor | None, angles: Angles) -> Tensor | None:
        """A layer returns `out`."""
        self._seen = ref(layer), _state(out, angles), (out, angles)
        return out

    @torch.compiler.disable
    def settle(self) -> None:
        """Take back what was computed and not asked for."""
        if self.ahead and self._seen:
            self._link(None)
        while self.ahead:
            last = self.ahead[-1]
            last.cache.truncate(last.lengths, last.columns)
            self.ahead.pop()

    def _link(self, behind: ref[Any] | None) -> None:
        if (last := self._seen[0]()) is not None:
            self._behind[last] = behind

    def _follows(self, x: Tensor, angles: Angles) -> bool:
        return bool(self._seen) and self._seen[1] == _state(x, angles)


def _state(x: Any, angles: Angles) -> tuple[Any, ...]:
    """Which tensors these are, how often they were written, and the gradient mode."""
    return *((id(t), t._version) for t in (x, *angles)), torch.is_grad_enabled()


def _fits(step: Ready, x: Tensor) -> bool:
    """Whether a layer's cache can take rows back, and takes them by the kernels that the call uses, which asks for
    shapes and dtypes itself."""
    own, n = step.cache, x.shape[1]
    if own.buf is None or own.layout is None or n > min(own.kv.chunk, own.kv.rewind):
        return False
    q, k, _ = step.kernel.sizes
    return tuple(ops.cache_kernels(own.layout, x.device, x.dtype, n, q // k * n)) == step.kernel.cache_ops
