"""Weights on their way into a layer: what a loader of vLLM brings is counted and checked."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from turboquant.layers.slot import Slot
from turboquant.packed.checkpoint import CheckpointError
from turboquant.recipe import Recipe


def packed_slot(
    layer: nn.Module, name: str, shape: tuple[int, ...], recipe: Recipe, tensors: dict[str, Tensor], prefix: str
) -> Slot:
    """A slot of packed tensors that were read: those of `tensors` whose names begin with the slot's become `layer`'s.

    Raises:
        CheckpointError: zeros that no packed weight has.
    """
    slot = Slot(layer, name, shape, recipe, "meta")
    for key, t in tensors.items():
        if key.startswith(name):
            setattr(layer, key, t)
    if int(tensors[f"{name}_zero"].max()) > 15:
        raise CheckpointError(f"{prefix}.{name}_zero: zeros above 15 are no packed weight")
    return slot


MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
LARGE = 8 << 20  # bytes: more than what the search for scales has at a time, which would fault in page by page


class Copies(TorchDispatchMode):
    """Counts the numbers that are copied within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


@contextmanager
def returned() -> Iterator[None]:
    """Within the context glibc takes large memory from the system piece by piece and hands it back when it is freed.

    It keeps what it once had otherwise, and 16-bit weights that are freed one after the other would stand beside the
    packed ones until the end. Afterwards what is free goes back, and the threshold is the 32 MiB that glibc comes to.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another libc
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.malloc_trim(0)


class Reader:
    """One parameter of a layer while a checkpoint is read.

    Args:
        where: name of the parameter, for messages.
        shape, dtype: of the parameter.
        loader: vLLM's weight loader of the layer, which cuts this rank's part out.
        attrs: what the loader reads of the parameter (output_dim, input_dim).
        exact: the dtype a tensor must have; None for any float.
        full: called with the parameter once all of it has come. Until its first part comes it takes no memory then
            (`parameter` is a meta tensor); without `full` it is an ordinary parameter.
    """

    def __init__(
        self, where: str, shape: tuple[int, ...], dtype: torch.dtype, loader: Callable[..., Any],
        attrs: dict[str, Any], exact: torch.dtype | None, full: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.where, self.loader, self.exact, self.full = where, loader, exact, full
        self.device = torch.empty(0).device  # vLLM makes layers in the context of their device, and loads outside it
        self.attrs, self.numbers = attrs, 0
        self.parameter = self._make(shape, dtype, "meta" if full else self.device)
        self.parameter.weight_loader = self.load  # type: ignore[attr-defined]
        self.target: nn.Parameter | None = None if full else self.parameter

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> nn.Parameter:
        with returned():
            out = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        for key, value in self.attrs.items():
            setattr(out, key, value)
        return out

    def load(self, param: Tensor, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """vLLM's weight loader, with checks.

        Raises:
            CheckpointError: another dtype or shape than expected, or more than the parameter holds.
        """
        kind = loaded_weight.dtype
        if kind != self.exact if self.exact is not None else not kind.is_floating_point:
            want = str(self.exact or "a float type").removeprefix("torch.")
            raise CheckpointError(f"{self.where}: the checkpoint has {str(kind).removeprefix('torch.')}, not {want}")
        shape, dtype, done = tuple(self.parameter.shape), self.parameter.dtype, self.done
        if done or self.target is None:
            target = self._make(shape, dtype, "meta" if done else self.device)
        else:
            target = self.target
        try:
            with Copies() as copies:
                out = self.loader(target, loaded_weight, *args, **kwargs)
        except (AssertionError, RuntimeError, IndexError) as e:
            raise CheckpointError(
                f"{self.where}: a tensor {list(loaded_weight.shape)} of the checkpoint does not fit "
                f"{list(self.parameter.shape)} ({str(e).strip() or type(e).__name__})"
            ) from e
        if done and copies.numbers:  # a loader skips what belongs to other ranks
            raise CheckpointError(f"{self.where}: the checkpoint has more of it than {list(shape)}")
        if done:
            return out
        self.numbers += copies.numbers
        complete = self.done and self.full is not None
        self.target = None if complete else target
        if self.full is not None and complete:
            with returned():
                self.full(target.data)
        return out

    @property
    def done(self) -> bool:
        """Whether everything has come."""
        return self.numbers >= self.parameter.numel()

    def finish(self, dummy: bool = False) -> None:
        """After loading: refuse a parameter of which something is missing; with `dummy` make one up.

        Raises:
            CheckpointError.
        """
        if self.done:
            return
        if not dummy:
            raise CheckpointError(
                f"{self.where}: the checkpoint has {self.numbers} of {self.parameter.numel()} numbers of it; "
                "the rest would be garbage"
            )
        self.numbers = self.parameter.numel()
        whole = self.target if self.target is not None else self._make(
            tuple(self.parameter.shape), self.parameter.dtype, self.device
        )  # fmt: skip
        if whole.is_floating_point():
            whole.data.normal_(std=0.02)
        else:
            whole.data.fill_(7)
        if self.full is not None:
            self.target = None
            self.full(whole.data)


def tracker_tensor(where: str, shape: tuple[int, ...], dtype: torch.dtype, parts: list[Tensor]) -> nn.Parameter:
    """A parameter in whose place a checkpoint's tensors of a tracker are collected in `parts`: it is not sharded, and
    a fused layer's comes with each part.

    Its loader raises CheckpointError: another shape or dtype.
    """
    out = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

    def load(param: Tensor, loaded_weight: Tensor, *shard: Any, **of: Any) -> bool:
        if loaded_weight.shape != param.shape or loaded_weight.dtype != param.dtype:
            raise CheckpointError(f"{where}: {list(loaded_weight.shape)} in the checkpoint, not {list(shape)}")
        parts.append(loaded_weight)
        return True

    out.weight_loader = load  # type: ignore[attr-defined]
    return out


class StackLoader:
    """Brings one product of all experts, stacked as transformers has them, to this rank.

    vLLM hands the codes (E, S, N, K/2) over whole and everything else expert by expert; of gate and up, which are one
    stack, first the gate's rows and then those of up, which it has cut only where it goes expert by expert.

    Args:
        axis: that is split over the ranks, -2 outputs or -1 inputs.
        rank, ranks: which part is here.
        local: (experts,) index of each here, -1 elsewhere; None where all are.
    """

    def __init__(self, axis: int, rank: int, ranks: int, local: Tensor | None) -> None:
        self.axis, self.rank, self.ranks, self.local = axis, rank, ranks, local

    def __call__(self, target: Tensor, loaded: Tensor, *, shard_id: str, expert_id: int, **_: Any) -> bool:
        """vLLM's weight loader. Raises RuntimeError, IndexError: something of another shape."""
        half = {"w1": 0, "w3": 1}.get(shard_id)
        whole = loaded.dim() == target.dim()
        if half is not None:
            target = target.chunk(2, -2)[half]
            loaded = loaded.chunk(2, -2)[half] if whole else loaded
        for e, x in enumerate(loaded) if whole else [(expert_id, loaded)]:
            at = e if self.local is None else int(self.local[e])
            if at < 0:
                continue
            size = x.shape[self.axis] // self.ranks
            part = x.narrow(self.axis, self.rank * size, size)
            if part.shape != target[at].shape or size * self.ranks != x.shape[self.axis]:
                raise RuntimeError(f"expert {e}: {list(x.shape)} over {self.ranks} ranks")
            target[at].copy_(part)
        return True
