"""Decoder layers of transformers that run a step of a few tokens in two native calls around the cache's attention (or,
where they follow each other, all in one: `chain.Chain`), or leave their two additions to the norms behind them.

A stand-in is a subclass of the layer's own class under the same name, with the layer's own parameters, children and
hooks, so that whatever looks for that class finds it. Whether a layer computes what the calls compute is found by
trying (`decoder_rule`); whether a call may run so is asked each time (`layers.decoder.Step`), and the layer's own
forward runs where it may not: other caches, prompts, adapters, hooks, gradients, a compiled model.
"""

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.integrations.transformers.attention import NAME, Pending, attention_forward
from turboquant.integrations.transformers.cache import TurboQuantCache, TurboQuantLayer
from turboquant.integrations.transformers.chain import Chain, Ready
from turboquant.kernels import ops
from turboquant.kernels.fused import rms_norm
from turboquant.layers.cache import LayerCache
from turboquant.layers.decoder import Formula, Step, parts_refusal
from turboquant.layers.formulas import bare
from turboquant.layers.fused import Decoder, FusedNorm

try:  # not public: without it, recording hooks count as any others
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None


class _Forward(Decoder):
    """What a stand-in adds to the class of its layer."""

    self_attn: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    mlp: Any
    step: Any
    follower: tuple[Any, ...]  # the norm of the layer behind this one, if that is a stand-in too
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the layer's own forward, whose arguments these are."""
        if position_embeddings is not None and isinstance(past_key_values, TurboQuantCache) and not kwargs:
            chain = _chain(self, past_key_values, attention_mask, hidden_states, *position_embeddings)
            if chain is not None and (y := chain.take(self, hidden_states, position_embeddings)) is not None:
                return y
            attention = self.self_attn
            if attention.config._attn_implementation == NAME and not self.training:
                run = self.step and self.step.run(hidden_states, *position_embeddings)
                if run is None and _renewed(self):
                    run = self.step.run(hidden_states, *position_embeddings)
                if run is not None:
                    ready = partial(_ready, hidden_states, position_embeddings, past_key_values)
                    if chain is not None:
                        y = chain.run(self, hidden_states, position_embeddings, ready)
                        if y is not None:
                            return y
                    q, k, v = run.before(hidden_states, *position_embeddings)
                    k, v = past_key_values.update(k, v, attention.layer_idx)
                    out, _ = attention_forward(attention, q, k, v, attention_mask, scaling=attention.scaling)
                    y = run.after(hidden_states, out)
                    if chain is not None:
                        chain.see(self, y, position_embeddings)
                    return y
        given = kwargs | {
            "attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values,
            "use_cache": use_cache, "position_embeddings": position_embeddings,
        }  # fmt: skip
        if not kwargs and _adds(self, hidden_states):
            x = hidden_states
            out, _ = self.self_attn(hidden_states=self.input_layernorm(x), **given)
            x, y = self.post_attention_layernorm.add(x, out)
            y = self.mlp(y)
            return self.follower[0].add_ahead(x, y) if self.follower else x + y
        return super().forward(hidden_states, **given)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of the layer's own class, as the stand-in's is made at run time."""
        state = {n: v for n, v in self.__dict__.items() if n not in ("own", "step", "formula", "follower")}
        return _rebuilt, self.own, state


def _idle(hook: Any) -> bool:
    """Whether a hook is one of those with which transformers records outputs, while it records none."""
    theirs = getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
    return theirs and _active_collector is not None and not _active_collector.get()


def _hooked(layer: Any) -> bool:
    """Whether more is done when a layer runs, which may change what no tensor's identity or version tells."""
    more = layer._forward_pre_hooks or not all(map(_idle, layer._forward_hooks.values()))
    return bool(more) or "forward" in layer.__dict__


def _chain(layer: Any, past: TurboQuantCache, mask: Tensor | None, *tensors: Tensor) -> Chain | None:
    """What runs a layer together with others; None where it has to run by itself."""
    if torch.compiler.is_compiling() or mask is not None or torch.is_inference_mode_enabled() or _hooked(layer):
        return None
    return None if any(t.is_inference() for t in tensors) else past.chain  # those count not how often they are written


_UPDATES = TurboQuantCache.update, TurboQuantLayer.update, LayerCache.step  # what a call of several layers leaves out


def _ready(x: Tensor, angles: tuple[Tensor, Tensor], past: TurboQuantCache, layer: Any) -> Ready | None:
    """Whether and how a layer may run together with others whose input has the shape and dtype of x."""
    attention = layer.self_attn
    kept: Any = past.layers[attention.layer_idx]
    if layer.training or attention.config._attn_implementation != NAME or _hooked(layer):
        return None
    if not isinstance(kept, TurboQuantLayer) or kept.chain is not past.chain:
        return None
    updates = past.update, kept.update, kept.cache.step
    if not all(getattr(f, "__func__", None) is own for f, own in zip(updates, _UPDATES, strict=True)):
        return None
    if not any(attention.config is c for c in kept.configs):
        return None
    run = layer.step and layer.step.run(x, *angles)
    return run and Ready(run, kept.cache, attention.scaling or attention.head_dim**-0.5)


def _refusal(layer: Any) -> str | None:
    why = parts_refusal(layer)
    if why is None and not isinstance(layer.formula, Formula):
        why = str(layer.formula)
    if why is None and type(layer.self_attn) is not layer.formula.attention:
        why = f"attention was {layer.formula.attention.__name__} when it was tried"
    return why


def _renewed(layer: Any) -> bool:
    """Whether a stand-in got a step now: it had none, or other modules stand in places of its parts."""
    if layer.step is not None and not layer.step.replaced():
        return False
    layer.step = None if _refusal(layer) else Step(layer, layer.formula, _idle)
    return layer.step is not None


def _adds(layer: Any, x: Tensor) -> bool:
    """Whether norms make the layer's additions now: a kernel does both, and the modules are what they were."""
    norm = layer.post_attention_layernorm
    if layer.training or not isinstance(norm, FusedNorm) or norm.kernel("add_norm_quantize", x) is None:
        return False
    _renewed(layer)
    return layer.step is not None and layer.step.changed() is None


class _Probe:
    """A cache and its layer, which note what reaches them."""

    def __init__(self, config: Any) -> None:
        self.configs = [config]
        self.seen: list[Any] = []

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        pending = Pending(k, v, self, self.configs, False)  # type: ignore[arg-type]
        return pending, pending

    def step(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append((q, k, v, kwargs))
        return q.flip(-1).contiguous()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


@torch.no_grad()
def decoder_rule(layer: Any) -> str | None:
    """Why a decoder layer does not compute what the two calls compute, None if it does: it is tried with random
    weights, attention must get the very queries, keys, values and scaling, and the output must be the same bits."""
    kind, why = type(layer).__name__, parts_refusal(layer)
    if why is not None:
        return why
    own = layer.self_attn
    if not isinstance(getattr(own, "head_dim", None), int) or not all(
        hasattr(own, n) for n in ("config", "layer_idx", "scaling")
    ):
        return f"{type(own).__name__} has no head_dim, layer_idx, scaling or config"
    draw, width, d = torch.Generator().manual_seed(0), 16, own.head_dim
    if any(own._modules[n].out_features % d for n in ("q_proj", "k_proj", "v_proj")):
        return f"{type(own).__name__} has no whole heads"

    def linear(n: int, k: int) -> nn.Linear:
        out = nn.Linear(k, n)
        out.weight.data, out.bias.data = torch.randn(n, k, generator=draw), torch.randn(n, generator=draw)
        return out

    attention, mlp, norms = bare(own), bare(layer.mlp.own[0]), []
    sizes = {n: own._modules[n].out_features for n in ("q_proj", "k_proj", "v_proj")}
    attention._modules = {n: linear(size, width) for n, size in sizes.items()} | {
        "o_proj": linear(width, sizes["q_proj"])
    }
    attention.config = copy.copy(own.config)
    attention.config._attn_implementation = NAME
    mlp._modules = {
        n: linear(32 if n == "gate_up_proj" else 16, 16) if "proj" in n else m and bare(m)
        for n, m in layer.mlp._modules.items()
    }
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        new = bare(norm.own[0])
        new._parameters = {"weight": nn.Parameter(torch.rand(width, generator=draw) + 0.5, requires_grad=False)}
        norms.append(new)
    probe = bare(layer)
    parts = {"self_attn": attention, "mlp": mlp, "input_layernorm": norms[0], "post_attention_layernorm": norms[1]}
    probe._modules = {n: parts[n] for n in layer._modules}
    probe.training = attention.training = False
    x, cos, sin = (torch.randn(2, 3, n, generator=draw) for n in (width, d, d))
    past = _Probe(attention.config)
    try:
        got = probe(
            x, attention_mask=None, position_ids=torch.arange(3)[None], past_key_values=past, use_cache=True,
            position_embeddings=(cos, sin),
        )  # fmt: skip
    except Exception as e:
        return f"{kind} cannot be tried ({type(e).__name__})"
    if len(past.seen) != 1 or not isinstance(got, Tensor):
        return f"{kind} calls attention otherwise, or returns more than a tensor"
    h = rms_norm(x, norms[0].weight, layer.input_layernorm.rule)
    q, k, v = (attention._modules[n](h).view(2, 3, -1, d).transpose(1, 2) for n in sizes)
    q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    *states, options = past.seen[0]
    if not all(torch.equal(a, b) for a, b in zip(states, (q, k, v), strict=True)):
        return f"{kind} makes queries, keys and values in another way"
    if options.pop("scaling") != own.scaling or any(o is not None and o is not False for o in options.values()):
        return f"{kind} asks attention for more than scaling"
    y = x + attention._modules["o_proj"](q.flip(-1).transpose(1, 2).reshape(2, 3, -1))
    want = y + mlp(rms_norm(y, norms[1].weight, layer.post_attention_layernorm.rule))
    return None if torch.equal(got, want) else f"{kind} adds up otherwise"


def fuse_decoders(model: nn.Module) -> list[dict[str, Any]]:
    """Put stand-ins in place of decoder layers that compute what the two calls compute.

    Returns:
        one row for each layer that has an attention and an MLP: {"name", "op", "fused", "why"}.
    """
    rows = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Decoder) or not {"self_attn", "mlp"} <= set(layer._modules):
            continue
        why = decoder_rule(layer)
        if why is None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _stand_in(layer, Formula(layer)))
        rows.append({"name": name, "op": "decoder_step", "fused": why is None, "why": why or "Llama's formula"})
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer, behind in pairwise(stack):
                if isinstance(layer, _Forward) and isinstance(behind, _Forward):
                    layer.follower = (behind.input_layernorm,)
    return rows


def explain_decoders(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> list[dict[str, str]]:
    """Which decoder layers of a quantized model run a step of a few tokens in two calls with a cache of this library.

    Returns:
        rows {"name", "op", "kernel" ("none" where its modules run one after another), "why"}.
    """
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, Decoder):
            kernel, why = _explained(layer, dtype, torch.device(device))
        elif {"self_attn", "mlp"} <= set(layer._modules):
            kernel, why = "none", decoder_rule(layer) or "no stand-in was put in its place"
        else:
            continue
        rows.append({"name": name, "op": "decoder_step", "kernel": kernel, "why": f"{why}"})
    return rows


def _explained(layer: Any, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    _renewed(layer)
    why = _refusal(layer) or layer.step.refusal(dtype, device)
    if why is None and (layer.training or "forward" in layer.__dict__):
        why = "it is in training mode" if layer.training else "it was given another forward"
    if why is not None:
        norm = layer.post_attention_layernorm
        adds = layer.step and not layer.training and ops.fused("add_norm_quantize", norm.slot.spec(dtype), device)
        return "none", f"{why}; the norms behind its additions make these" if adds else why
    kernel = layer.step.kernel(dtype, device).__module__
    return kernel.removeprefix("turboquant.kernels.").split(".")[0], "all but attention in two calls"


def _stand_in(layer: nn.Module, formula: Formula | str) -> Any:
    own: Any = type(layer)
    kind: Any = type(own.__name__, (_Forward, own), {"__module__": own.__module__})
    new: Any = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)  # one set of children, parameters and hooks
    new.own, new.step, new.formula, new.follower = (layer,), None, formula, ()
    return new


def _rebuilt(own: nn.Module) -> Any:
    return _stand_in(own, decoder_rule(own) or Formula(own))
