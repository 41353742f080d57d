"""Mixtures of experts in vLLM: the two stacks of a layer as slots, packed while they are read, or read packed.

Stacks that split their inputs over ranks are treated as linear layers are (linear.py). Experts run one after another;
which ones is known on the host only, so no CUDA graph can hold them. What cannot be served is refused when the layer is
made, never left unquantized.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.platforms import current_platform

from turboquant.integrations.vllm import metrics
from turboquant.integrations.vllm.linear import _METHODS, dummy_weights, enlist, live, split
from turboquant.integrations.vllm.loading import Reader, StackLoader, packed_slot, tracker_tensor
from turboquant.layers.slot import Slot
from turboquant.packed.checkpoint import CheckpointError
from turboquant.recipe import Recipe, RecipeError

SERVED = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)  # between the products, gate first


class TurboQuantMoEMethod(FusedMoEMethodBase):
    """How the experts of one layer are stored and run.

    Args:
        prefix: name of the layer.
        recipe: its linear part counts.
        packed: whether the checkpoint holds packed weights.
        moe: vLLM's FusedMoEConfig.

    Raises:
        RecipeError: experts of a kind that cannot be served; the message says why.
    """

    requires_device_loading = False

    def __init__(self, prefix: str, recipe: Recipe, packed: bool, moe: Any) -> None:
        super().__init__(moe)
        self.prefix, self.recipe = prefix, recipe
        self.packed = packed and recipe.weights is not None
        why = self._refusal()
        if why:
            raise RecipeError(f"{prefix}: {why}; or leave the experts as they are: modules_to_not_convert=['experts']")
        self.key, self.dummy, self.dtype = enlist(self, prefix), dummy_weights(), moe.in_dtype
        self.first: Slot | None = None
        self.second: Slot | None = None
        self.changes = 0  # times the hot channels were chosen anew
        self.shard: tuple[int, int] | None = None  # outputs of the second product, if it gathers
        self.readers: dict[str, Reader] = {}
        self.trackers: dict[str, list[Tensor]] = {}

    def _refusal(self) -> str | None:
        """Why these experts are not served, None if they are."""
        moe, config = self.moe, get_current_vllm_config_or_none()
        if moe.activation not in SERVED:
            return f"experts with {moe.activation.value} between their products are not served"
        if moe.has_bias or getattr(moe, "swiglu_limit", None) is not None:
            return "experts with biases or a clamp are not served"
        if moe.moe_parallel_config.use_all2all_kernels:
            return "experts that are spread over data-parallel ranks are not served"
        if current_platform.is_cuda() and config is not None:
            mode = config.compilation_config.cudagraph_mode
            if not config.model_config.enforce_eager and mode is not None and mode.name != "NONE":
                return "experts run one by one, which CUDA graphs cannot hold: serve with --enforce-eager"
        return None

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """As of vLLM's methods.

        Raises:
            RecipeError: this rank's part of the experts cannot be packed.
        """
        if layer.apply_router_weight_on_input:
            raise RecipeError(f"{self.prefix}: experts that weigh their input are not served")
        if self.packed and layer.ckpt_gate_proj_name != "gate_proj":
            raise RecipeError(
                f"{self.prefix}: packed experts are stored as gate_up_proj and down_proj, and vLLM looks for "
                f"{layer.ckpt_gate_proj_name!r} in this model; serve the unpacked checkpoint with this recipe"
            )
        e, k, inner = num_experts, hidden_size, intermediate_size_per_partition
        loader, self.dtype = extra.pop("weight_loader"), params_dtype
        self.shapes = {"w13_weight": (e, 2 * inner, k), "w2_weight": (e, k, inner)}
        axis, parallel = {"w13_weight": -2, "w2_weight": -1}, self.moe.moe_parallel_config
        if self.packed and parallel.tp_size > 1:
            width = inner * parallel.tp_size
            n, kept, gathers = split(f"{self.prefix}.w2_weight", self.recipe, k, inner, width, parallel.tp_size)
            self.shapes["w2_weight"] = (e, n, kept)
            if gathers:
                axis["w2_weight"], self.shard = -2, (parallel.tp_rank * n, n)
        for name, shape in self.shapes.items():
            where = f"{self.prefix}.{name}"
            if self.recipe.weights is not None:
                try:
                    self.recipe.weights.group_of(shape[-1])
                except RecipeError as error:
                    raise RecipeError(f"{where}: {error}, and this rank has {shape[-1]}") from error
            if self.packed:
                stack = StackLoader(axis[name], parallel.tp_rank, parallel.tp_size, layer.expert_map)
                self._read(layer, name, stack)
                continue
            full = lambda w, name=name: self._pack(layer, name, w)  # noqa: E731
            self._take(layer, name, Reader(where, shape, params_dtype, loader, extra, None, full))

    def _take(self, layer: Any, name: str, reader: Reader) -> None:
        self.readers[name] = reader
        layer.register_parameter(name, reader.parameter)

    def _read(self, layer: Any, name: str, stack: StackLoader) -> None:
        """Parameters for the tensors of a packed stack."""
        for key, (shape, dtype) in Slot.specs(name, self.shapes[name], self.recipe).items():
            where = f"{self.prefix}.{key}"
            if "_x_" in key:
                self.trackers[key] = []
                layer.register_parameter(key, tracker_tensor(where, shape, dtype, self.trackers[key]))
            else:
                self._take(layer, key, Reader(where, shape, dtype, stack, {}, dtype))

    @torch.no_grad()
    def _pack(self, layer: Any, name: str, w: Tensor) -> None:
        """A whole stack (E, N, K) has come."""
        delattr(layer, name)
        if self.recipe.weights is None:
            layer.register_parameter(name, torch.nn.Parameter(w, requires_grad=False))
        slot = Slot(layer, name, tuple(w.shape), self.recipe, "meta")
        slot.load(w)
        getattr(layer, name).weight_loader = self.readers[name].load  # for what comes of other ranks' experts
        self._ready(name, slot)

    def _ready(self, name: str, slot: Slot) -> None:
        if name == "w13_weight":
            self.first = slot
        else:
            self.second = slot
        if not slot.tracked:
            return
        saved = {key: parts for key, parts in self.trackers.items() if key.startswith(name)}
        missing = [key for key, parts in saved.items() if not parts]
        if missing and not self.dummy:
            raise CheckpointError(f"{self.prefix}.{missing[0]}: the checkpoint has no such tensor")
        if missing or not saved:
            slot.start()
        for key, parts in saved.items():
            if not missing:  # a stack of gate and up brings it twice
                setattr(slot.module, key, parts[0].to(getattr(slot.module, name).device, copy=True))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse experts of which something was not in the checkpoint.

        Raises:
            CheckpointError.
        """
        for reader in self.readers.values():
            reader.finish(self.dummy)
        for name in () if self.packed else self.readers:
            del getattr(layer, name).weight_loader
        tensors = {key: getattr(layer, key).data for key in self.readers} if self.packed else {}
        for key in (*tensors, *self.trackers):
            delattr(layer, key)
        for name in self.shapes if tensors else ():
            self._ready(name, packed_slot(layer, name, self.shapes[name], self.recipe, tensors, self.prefix))
        self.readers, self.trackers = {}, {}

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's runs."""

    @property
    def slots(self) -> list[Slot]:
        """The weights of this layer."""
        return [s for s in (self.first, self.second) if s is not None]

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(tokens, K), (tokens, k) weights and experts -> (tokens, K); shared experts are vLLM's to run."""
        return torch.ops.turboquant.vllm_experts(x, topk_weights, topk_ids, layer.expert_map, self.key)

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, local: Tensor | None) -> Tensor:
        """The layer itself, outside of what is compiled. `local` maps experts to those of this rank, -1 elsewhere."""
        first, second = self.first, self.second
        assert first is not None and second is not None, f"{self.prefix} has no weights"
        if first.tracked and live():
            self.changes += first.follow(x)
        metrics.publish(x)
        if local is not None:
            ids = local[ids.long()]
        chosen = [(e, *torch.where(ids == e)) for e in ids.unique().tolist() if e >= 0]
        inner = [self._gate(first(x[token], None, e)) for e, token, _ in chosen]
        if self.shard is not None and inner:
            whole = tensor_model_parallel_all_gather(torch.cat(inner))
            inner = list(whole.split([len(i) for i in inner]))
        out = torch.zeros_like(x, dtype=torch.float32)
        begin, count = self.shard or (0, x.shape[-1])
        for (e, token, place), i in zip(chosen, inner, strict=True):
            if second.tracked and live():
                self.changes += second.follow(i)
            y = second(i, None, e)
            out[:, begin : begin + count].index_add_(0, token, (y * weights[token, place, None]).float())
        return out.to(x.dtype)

    def _gate(self, up: Tensor) -> Tensor:
        """Between the products: (tokens, 2·K) -> (tokens, K)."""
        inner = up.new_empty(len(up), up.shape[-1] // 2)
        apply_moe_activation(self.moe.activation, inner, up)
        return inner


@torch.library.custom_op("turboquant::vllm_experts", mutates_args=())
def _experts(x: Tensor, weights: Tensor, ids: Tensor, local: Tensor | None, name: str) -> Tensor:
    return _METHODS[name].run(x, weights, ids, local)


@_experts.register_fake
def _(x: Tensor, weights: Tensor, ids: Tensor, local: Tensor | None, name: str) -> Tensor:
    return torch.empty_like(x)
