"""Slot: one quantized weight of a module, as buffers of that module, and the tracker of its input.

A linear layer has one slot, "weight"; a stack of experts has one for each of its products. The weight of a slot with
quantized activations is stored rotated. Buffers move, save and load with the module; dtypes never change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.kernels import ops
from turboquant.kernels.linear import Coded, Hot, LinearSpec, LinearState, Shared
from turboquant.maths.activations import HotTracker
from turboquant.maths.rotation import rotate, unrotate
from turboquant.packed.tensor import NAMES, PackedTensor
from turboquant.recipe import Recipe

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
TRACKER = ("power", "peak", "hot", "sigma", "seen")


class Slot:
    """One weight (N, K), or (E, N, K) for E experts.

    Args:
        module: gets the buffers of `specs`, empty; its float parameter of this name if the recipe has no weights must
            be there already.
        name: "weight", "gate_up_proj", ...
        recipe: its linear part counts.
        shared: to quantize an input once for several slots.
        like: the weight is a meta tensor of this dtype and shape until `load` (transformers casts what it reads to the
            dtype it finds).
    """

    def __init__(
        self, module: nn.Module, name: str, shape: tuple[int, ...], recipe: Recipe, device: Any = None,
        shared: Shared | None = None, like: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.module, self.name, self.shape, self.recipe = module, name, tuple(shape), recipe
        self.shared = shared
        a = recipe.activations
        self.tracked = a is not None and a.hot_channels(shape[-1]) > 0  # whether this slot has hot channels
        self._keys = [name + key.removeprefix("weight") for key in NAMES]
        self.tracker: HotTracker | None = None
        self._hot: Hot | None = None
        self.states: dict[int | None, LinearState] = {}
        self._specs: dict[torch.dtype, LinearSpec] = {}
        for key, (size, kind) in self.specs(name, shape, recipe).items():
            module.register_buffer(key, torch.empty(size, dtype=kind, device=device))
        if like is not None and recipe.weights is not None:
            module.register_buffer(name, torch.empty(shape, dtype=like, device="meta"))

    @staticmethod
    def specs(name: str, shape: tuple[int, ...], recipe: Recipe) -> Specs:
        """Shape and dtype of the buffers: NAME, NAME_scale, NAME_zero, and at 4-bit activations NAME_x_power, ..."""
        out: Specs = {}
        if recipe.weights is not None:
            out = {name + key.removeprefix("weight"): v for key, v in PackedTensor.specs(shape, recipe.weights).items()}
        k, a = shape[-1], recipe.activations
        if a is not None and a.hot_channels(k):
            f, h = torch.float32, a.hot_channels(k)
            kinds = (((k,), f), ((k,), f), ((h,), torch.int64), ((h,), f), ((), torch.int64))
            out |= {f"{name}_x_{key}": v for key, v in zip(TRACKER, kinds, strict=True)}
        return out

    def spec(self, dtype: torch.dtype) -> LinearSpec:
        """What a backend is chosen by, for inputs of a dtype."""
        if dtype not in self._specs:
            w, a, (n, k) = self.recipe.weights, self.recipe.activations, self.shape[-2:]
            group = w.group_of(k) if w else 0
            self._specs[dtype] = LinearSpec(k, n, w.stages if w else 0, group, a.bits if a else 16, dtype)
        return self._specs[dtype]

    def packed(self) -> PackedTensor:
        """The packed weight."""
        buffers = self.module._buffers
        return PackedTensor(*[buffers[key] for key in self._keys])  # type: ignore[arg-type]

    def dequantized(self, expert: int | None = None) -> Tensor:
        """(..., N, K) fp32 in the basis of the input; of one expert only if named."""
        if self.recipe.weights is None:
            w = getattr(self.module, self.name).detach()
            return (w if expert is None else w[expert]).float()
        w = (self.packed() if expert is None else self.packed().select(expert)).dequantize()
        return unrotate(w) if self.recipe.activations is not None else w

    def encode(self, w: Tensor, moment: Tensor | None = None) -> dict[str, Tensor]:
        """A weight (..., N, K) as the buffers of this slot, which stay as they are; arguments as for `load`."""
        out: dict[str, Tensor] = {}
        if self.recipe.weights is not None:
            rotated = self.recipe.activations is not None
            turn = rotate if rotated else lambda x: x
            moment = None if moment is None else turn(turn(moment.float()).mT.contiguous())
            if w.dim() == 2:
                packed = PackedTensor.quantize(turn(w.float()), self.recipe.weights, moment, rotated)
            else:  # one expert at a time: the workspace of a whole stack would be several times the stack
                some = [PackedTensor.quantize(turn(x.float()), self.recipe.weights, None, rotated) for x in w]
                parts = [torch.stack(p) for p in zip(*((s.codes, s.scale, s.zero) for s in some), strict=True)]
                packed = PackedTensor(*parts)
            out = {self.name + key.removeprefix("weight"): t for key, t in packed.tensors().items()}
        return out

    def load(self, w: Tensor, moment: Tensor | None = None) -> None:
        """Quantize a weight into the module; its tracker, if it has one, is to be started then.

        Args:
            moment: (K, K) second moments of the input in its own basis, for error feedback.
        """
        for key, t in self.encode(w, moment).items():
            setattr(self.module, key, t)
        self.forget()

    def start(self, prior: Tensor | None = None) -> None:
        """A tracker that has seen nothing.

        Args:
            prior: (K,), the scale of each input channel as far as the weights around tell it (of the norm before).
        """
        a = self.recipe.activations
        assert a is not None
        t = HotTracker(self._column_norm(), a.hot_channels(self.shape[-1]), prior, a.freeze)
        for key, value in self._state(t).items():
            setattr(self.module, key, value)
        self.forget()

    def _column_norm(self) -> Tensor:
        return self.dequantized().flatten(0, -2).square().mean(0).sqrt()

    def forget(self) -> None:
        """Drop what was derived from buffers that have changed or moved."""
        self.states.clear()
        self.tracker = self._hot = None

    def _state(self, t: HotTracker) -> dict[str, Tensor]:
        values = (t.power, t.peak, t.hot, t.sigma, torch.tensor(t.seen, device=t.power.device))
        return {f"{self.name}_x_{key}": v for key, v in zip(TRACKER, values, strict=True)}

    def follow(self, x: Tensor) -> bool:
        """Let the tracker see the tokens x (..., K), and take the hot columns of the weight anew if it says so.

        Returns:
            whether it did: the channels had drifted.
        """
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False  # what is captured replays with the channels that are hot between the replays
        with _outside_inference():
            return self._follow(x)

    def _follow(self, x: Tensor) -> bool:
        m, a = self.module, self.recipe.activations
        if self.tracker is None:
            assert a is not None
            state = {key: getattr(m, f"{self.name}_x_{key}") for key in TRACKER}
            self.tracker = HotTracker.resume(self._column_norm(), a.freeze, state)
        seen = self.tracker.seen
        changed = self.tracker.update(x)
        if self.tracker.seen != seen:
            for key, t in self._state(self.tracker).items():
                getattr(m, key).copy_(t)  # in place: what a CUDA graph captured stays valid
        if changed or self._hot is None:
            self._take_columns()
        return changed

    def _take_columns(self) -> None:
        index, sigma = (getattr(self.module, f"{self.name}_x_{key}") for key in ("hot", "sigma"))
        columns = None
        if self.recipe.weights is not None:
            columns = self.dequantized()[..., index] * sigma
        if self._hot is None:
            self._hot = Hot(index, sigma, columns)
            self.states.clear()
        elif columns is not None:
            assert self._hot.weight is not None
            self._hot.weight.copy_(columns)

    def __call__(self, x: Tensor | Coded, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
        """x (..., K) through the weight, or through one expert's: (..., N) in x's dtype.

        Raises:
            RuntimeError: gradients are asked for in a compiled model.
        """
        if isinstance(x, Tensor) and ops.wants_grad(x, bias):
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "compiled quantized layers compute no gradients: call the model under torch.no_grad()"
                )
            return _StraightThrough.apply(x, bias, self, expert)
        return self._run(x, bias, expert)

    def state(self, expert: int | None = None) -> LinearState:
        """What is kept beside the weight, or beside one expert's, to run it."""
        if self.tracked and self._hot is None:
            with _outside_inference():
                self._take_columns()
        if expert not in self.states:
            hot = self._hot
            if hot is not None and expert is not None and hot.weight is not None:
                hot = Hot(hot.index, hot.sigma, hot.weight[expert])
            self.states[expert] = LinearState(hot, self.shared)
        return self.states[expert]

    def _run(self, x: Tensor | Coded, bias: Tensor | None, expert: int | None) -> Tensor:
        state = self.state(expert)
        if self.recipe.weights is None:
            weight: Any = getattr(self.module, self.name)
            weight = weight if expert is None else weight[expert]
        else:
            weight = self.packed() if expert is None else self.packed().select(expert)
        y = ops.linear(x, weight, bias, self.recipe.activations, state, self.spec(x.dtype))
        if state.prepared and not torch.compiler.is_compiling():
            self._stow()
        return y

    def _stow(self) -> None:
        """Keep the codes on the host once a GPU's kernel has the whole weight in a layout of its own, so that the GPU
        holds it once. Whatever decodes the codes brings them back for that time."""
        key, count = self.name, self.shape[0] if len(self.shape) == 3 else 1
        codes = self.module._buffers.get(key)
        if codes is None or not codes.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        if sum(bool(s.prepared) for s in self.states.values()) == count:
            self.module._buffers[key] = codes.cpu()

    def nbytes(self, device: torch.device, read: bool = False) -> int:
        """Bytes of this weight on a device: its buffers, and what a backend prepared.

        Args:
            read: those alone that a step reads: what was prepared of the whole weight stands for it.
        """
        saved = [b for k, b in self.module._buffers.items() if k.startswith(self.name) and b is not None]
        if self.recipe.weights is None:
            saved.append(getattr(self.module, self.name))
        ready = [t for s in self.states.values() for t in _tensors(list(s.prepared.values()))]
        one, two = (sum(t.nbytes for t in some if t.device.type == device.type) for some in (saved, ready))
        if not read:
            return one + two
        return two if two >= sum(t.nbytes for t in saved[:1]) else one


@contextmanager
def _outside_inference() -> Iterator[None]:
    """For tensors that are kept: torch writes to those made in inference mode only there."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def forget_slots(module: Any, *_: Any) -> None:
    """For load_state_dict of a module with slots: drop what was derived from the buffers that it had."""
    for slot in module.slots.values():
        slot.forget()


class _StraightThrough(torch.autograd.Function):
    """Gradients on every backend alike: those of a float layer with the weight as it decodes, rounding of the input
    being taken for the identity. The packed weight gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, slot: Slot, expert: int | None) -> Tensor:
        ctx.slot, ctx.expert = slot, expert
        return slot._run(x.detach(), bias, expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, (for_x, for_bias, *_) = grads[0], ctx.needs_input_grad
        back = (g.float() @ ctx.slot.dequantized(ctx.expert)).to(g.dtype) if for_x else None
        return back, g.reshape(-1, g.shape[-1]).sum(0) if for_bias else None, None, None


def _tensors(x: Any) -> list[Tensor]:
    """All tensors in lists, tuples and modules."""
    if isinstance(x, nn.Module):
        return [*x.parameters(), *x.buffers()]
    if isinstance(x, list | tuple):
        return [t for y in x for t in _tensors(y)]
    return [x] if isinstance(x, Tensor) else []


def keep_dtypes(module: nn.Module, fn: Any) -> None:
    """For `_apply` of a module with slots: move its buffers as `fn` moves them, but to no other dtype."""
    for key, b in module._buffers.items():
        if b is None:
            continue
        if b.is_floating_point() and not b.is_meta:
            where = fn(torch.empty(0, dtype=torch.uint8, device=b.device)).device
            module._buffers[key] = b.to(where)
        else:
            module._buffers[key] = fn(b)
