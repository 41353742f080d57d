"""Linear layers of vLLM: fused and sharded weights through `layers/slot.py`.

A float checkpoint is packed layer by layer while it is read: of one layer at a time the 16-bit weight exists. A packed
one is loaded as it is. Each rank quantizes the inputs it sees, with a tracker of its own.

Row-parallel layers split K, and a packed weight with quantized inputs is stored rotated in blocks as large as K
allows: no part of K holds whole blocks. Such a layer keeps all of K for a part of the outputs instead (`gathers`): its
input is gathered once, and the sum over the ranks, which follows anyway, puts the outputs together. Packed while it
is read, each rank's part of K is a weight of its own, with a rotation of its own width.
"""

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.linear import LinearMethodBase

from turboquant.integrations.vllm import metrics
from turboquant.integrations.vllm.loading import Reader, packed_slot, tracker_tensor
from turboquant.kernels import ops
from turboquant.layers.slot import Slot
from turboquant.packed.checkpoint import CheckpointError
from turboquant.recipe import Recipe, RecipeError

_METHODS: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()
OUTPUT_DIM = {"weight": 1, "weight_scale": 0, "weight_zero": 0}  # of the packed tensors (S, N, K/2), (N, G), (N, G)


def enlist(method: Any, name: str) -> str:
    """A name by which the operators find a method; a second model in the process gets others."""
    key, n = name, 1
    while key in _METHODS:
        n += 1
        key = f"{name}#{n}"
    _METHODS[key] = method
    config = get_current_vllm_config_or_none()
    if config is not None:
        metrics.identify(config.parallel_config)
    metrics.source(rows)
    return key


def dummy_weights() -> bool:
    """Whether vLLM was asked for made-up weights (--load-format dummy)."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def live() -> bool:
    """Whether a request runs: trackers do not follow the dummy batches of vLLM's start."""
    return is_forward_context_available() and get_forward_context().attn_metadata is not None


class TurboQuantLinearMethod(LinearMethodBase):
    """How one linear layer is stored and run.

    Args:
        prefix: name of the layer.
        recipe: its linear part counts.
        packed: whether the checkpoint holds packed weights.
    """

    requires_device_loading = False

    def __init__(self, prefix: str, recipe: Recipe, packed: bool) -> None:
        self.prefix, self.recipe = prefix, recipe
        self.packed = packed and recipe.weights is not None
        self.key, self.dummy = enlist(self, prefix), dummy_weights()
        self.gathers = False
        self.slot: Slot | None = None
        self.changes = 0  # times the hot channels were chosen anew
        self.readers: dict[str, Reader] = {}
        self.trackers: dict[str, list[Tensor]] = {}

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """As of vLLM's methods.

        Raises:
            RecipeError: the layer, or this rank's part of it, cannot be packed.
        """
        n, k, loader = sum(output_partition_sizes), input_size_per_partition, extra["weight_loader"]
        self.outputs, self.shard, self.dtype = n, (0, n), params_dtype
        if self.packed and k != input_size:
            n, k, self.gathers = split(self.prefix, self.recipe, n, k, input_size, layer.tp_size)
            if self.gathers:
                self.shard = (layer.tp_rank * n, n)
        if self.recipe.weights is not None:
            try:
                self.recipe.weights.group_of(k)
            except RecipeError as e:
                raise RecipeError(f"{self.prefix}: {e}{_would_fit(input_size, k)}; name it in "
                                  "modules_to_not_convert or choose another --tensor-parallel-size") from e  # fmt: skip
        self.local = (n, k)
        if not self.packed:
            full = lambda w: self._pack(layer, w)  # noqa: E731
            dims = {"output_dim": 0, "input_dim": 1}
            self._read(layer, Reader(f"{self.prefix}.weight", (n, k), params_dtype, loader, dims, None, full), "weight")
            return
        for name, (shape, dtype) in Slot.specs("weight", (n, k), self.recipe).items():
            where = f"{self.prefix}.{name}"
            if name in OUTPUT_DIM:
                at = OUTPUT_DIM[name]
                dims = {"output_dim": at, "input_dim": at if self.gathers else len(shape) - 1}
                self._read(layer, Reader(where, shape, dtype, loader, dims, dtype), name)
            else:
                self.trackers[name] = []
                layer.register_parameter(name, tracker_tensor(where, shape, dtype, self.trackers[name]))

    def _read(self, layer: Any, reader: Reader, name: str) -> None:
        self.readers[name] = reader
        layer.register_parameter(name, reader.parameter)

    def _pack(self, layer: Any, w: Tensor) -> None:
        """The whole float weight of this rank (N, K) has come."""
        for name in self.readers:
            delattr(layer, name)
        if self.recipe.weights is None:
            layer.register_parameter("weight", torch.nn.Parameter(w, requires_grad=False))
        slot = Slot(layer, "weight", self.local, self.recipe, "meta")
        with torch.no_grad():
            slot.load(w)
            if slot.tracked:
                slot.start()
        self._ready(slot)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """What was loaded becomes the slot's.

        Raises:
            CheckpointError: something of the layer was not in the checkpoint.
        """
        if self.slot is not None:
            return
        for reader in self.readers.values():
            reader.finish(self.dummy)
        if not self.packed:
            return  # `finish` has packed it
        tensors = {name: getattr(layer, name).data for name in self.readers}
        for name in (*tensors, *self.trackers):
            delattr(layer, name)
        slot = packed_slot(layer, "weight", self.local, self.recipe, tensors, self.prefix)
        self._follow_on(layer, slot)
        self._ready(slot)

    @torch.no_grad()
    def _follow_on(self, layer: Any, slot: Slot) -> None:
        """Start the tracker as it was saved; a fused layer's from the mean power of its parts."""
        device = layer.weight.device
        missing = [name for name, parts in self.trackers.items() if not parts]
        if missing and not self.dummy:
            raise CheckpointError(f"{self.prefix}.{missing[0]}: the checkpoint has no such tensor")
        if missing:
            slot.start()
        elif any(len(parts) > 1 for parts in self.trackers.values()):
            slot.start(torch.stack(self.trackers["weight_x_power"]).mean(0).sqrt().to(device))
        else:
            for name, parts in self.trackers.items():
                setattr(layer, name, parts[0].to(device, copy=True))

    def _ready(self, slot: Slot) -> None:
        self.slot, self.readers, self.trackers = slot, {}, {}

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K of this rank) -> (..., N of this rank) in x's dtype."""
        if not self.gathers:
            return torch.ops.turboquant.vllm_linear(x, bias, self.key)
        x = tensor_model_parallel_all_gather(x)
        y = torch.ops.turboquant.vllm_linear(x, None, self.key)
        first, count = self.shard
        y = F.pad(y, (first, self.outputs - first - count))
        return y if bias is None else y + bias

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer itself, outside of what is compiled."""
        assert self.slot is not None, f"{self.prefix} has no weights"
        if self.slot.tracked and live():
            self.changes += self.slot.follow(x)
        metrics.publish(x)
        return self.slot(x, bias)

    @property
    def slots(self) -> list[Slot]:
        """The weights of this layer."""
        return [] if self.slot is None else [self.slot]


def rows() -> list[metrics.Row]:
    """What `metrics` reports about all layers of this process."""
    found = [(m, s) for m in list(_METHODS.values()) for s in m.slots]
    packed = [s.packed() for _, s in found if s.recipe.weights is not None]
    out: list[metrics.Row] = []
    if packed:
        size = sum(p.nbytes for p in packed)
        out += [("weight_bytes", {}, size), ("weight_bits", {}, 8 * size / sum(math.prod(p.shape) for p in packed))]
    for m, s in found:
        if s.tracked:
            out.append(("drift_alarms", {"of": "activations", "layer": m.key}, m.changes))
        scale = getattr(s.module, f"{s.name}_scale", None)  # codes may wait on the host
        device = (getattr(s.module, s.name) if scale is None else scale).device
        kernel = ops.explain_linear(s.spec(m.dtype), device)[-1]["kernel"]
        out.append(("kernel_info", {"op": "linear", "kernel": kernel}, 1.0))
    return list({(name, *labels.items()): (name, labels, value) for name, labels, value in out}.values())


def split(prefix: str, recipe: Recipe, n: int, k: int, width: int, ranks: int) -> tuple[int, int, bool]:
    """What a rank holds of a packed weight (n, width) whose inputs are spread over `ranks`, k to each.

    Returns:
        (N, K) of its part, and whether it keeps all inputs, for a part of the outputs, and gathers them.

    Raises:
        RecipeError: neither inputs nor outputs can be split.
    """
    assert recipe.weights is not None
    group = recipe.weights.group_of(width)
    if recipe.activations is None and k % group == 0 and k % 8 == 0:
        return n, k, False
    if n % ranks:
        kind = "rotated in blocks that" if recipe.activations else f"in groups of {group} that"
        raise RecipeError(
            f"{prefix}: {width} packed inputs over {ranks} ranks are {k} each, {kind} do not fit, and its {n} outputs "
            f"are not a multiple of {ranks} either; serve the unpacked checkpoint, or choose a --tensor-parallel-size "
            f"that divides {n}"
        )
    return n // ranks, width, True


def _would_fit(width: int, part: int) -> str:
    if part == width:
        return ""
    sizes = [t for t in range(1, 65) if width % t == 0 and (width // t) % 8 == 0]
    return f" (it has {width} in all, {part} on this rank; {sizes} ranks would fit)"


@torch.library.custom_op("turboquant::vllm_linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return _METHODS[name].run(x, bias)


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _METHODS[name].local[0])
