"""The attention function registered as "turboquant".

A TurboQuantCache hands attention a Pending instead of key and value tensors: transformers updates the cache before
attention and without the queries, which the tracker needs. Called with plain tensors (no cache, or another cache), the
function computes ordinary attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.layers.cache import LayerCache

NAME = "turboquant"


@dataclass
class Pending:
    """Keys and values (B, H, n, d) of a chunk on their way from `Cache.update` to attention."""

    key: Tensor
    value: Tensor
    cache: LayerCache
    configs: list[Any]
    row_exact: bool
    done: bool = False


def register() -> None:
    """Make "turboquant" known as an attention implementation; calling it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        return None if _plainly_causal(**kwargs) else sdpa_mask(*args, **kwargs)

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)


def _plainly_causal(
    q_length: int | None = None,
    kv_length: int | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> bool:
    """Whether a chunk that sees itself alone, as with a TurboQuantCache, needs no mask: known without reading a tensor,
    while transformers before 5.18 makes every mask when a model is compiled or captured."""
    square = q_length is not None and q_length == kv_length
    near = local_size is None or (q_length is not None and q_length <= local_size)
    return square and near and attention_mask is None and allow_is_causal_skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: "Tensor | Pending",
    value: "Tensor | Pending",
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: (B, Hq, n, d) queries -> ((B, n, Hq, d) outputs, None).

    With a Pending, `attention_mask` must cover the chunk against itself, (B, 1, n, n): `get_mask_sizes` of the cache
    asks for that.
    """
    if not isinstance(key, Pending):
        return _plain(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, **kwargs)
    if module.training:
        raise ValueError("the TurboQuant cache is for inference: call model.eval() first")
    if not any(module.config is c for c in key.configs):
        raise ValueError(
            f"this TurboQuantCache was made for another model ({key.configs[0].model_type}); make one for this model"
        )
    if key.done:
        raise ValueError("this model shares keys and values between layers, which the TurboQuant cache cannot serve")
    n = query.shape[2]
    mask, valid = None, None
    if attention_mask is not None:
        if attention_mask.shape[-2:] != (n, n) or attention_mask.shape[1] != 1:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} is not supported with a TurboQuantCache: "
                "pass a 2-D padding mask"
            )
        mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        if torch.compiler.is_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            _assert_causal(mask, key.cache.window)
            mask = None
        else:
            if attention_mask.dtype != torch.bool and ((attention_mask != 0) & (attention_mask > -1e3)).any():
                raise ValueError("attention_mask of numbers that only weaken a logit is not supported: mask or do not")
            valid = mask[:, 0].diagonal(dim1=1, dim2=2).expand(query.shape[0], n)
            if valid.all():
                valid = None
                mask = None if n == 1 else mask
    with torch.no_grad():
        out = key.cache.step(
            query,
            key.key,
            key.value,
            valid=valid,
            mask=mask,
            scaling=scaling,
            softcap=softcap,
            sink_logits=s_aux,
            row_exact=key.row_exact,
        )
    key.done = True
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        out = _NoGradient.apply(out, query, key.key, key.value)
    return out.transpose(1, 2).contiguous(), None


class _NoGradient(torch.autograd.Function):
    """Outputs that are read from a cache, of which nothing is learned: asking for gradients is an error."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("a TurboQuantCache gives no gradients: call the model with use_cache=False to have them")


def _assert_causal(mask: Tensor, window: int | None) -> None:
    """Fail on the device, later, unless mask (B, 1, n, n) is causal without padding: nothing can be read back here."""
    t = torch.arange(mask.shape[-1], device=mask.device)
    back = t[:, None] - t
    want = back >= 0 if window is None else (back >= 0) & (back < window)
    torch._assert_async(
        (mask == want).all(), "a compiled or captured step of a TurboQuantCache takes no padding and no mask but causal"
    )


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: "Tensor | Pending",
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Ordinary attention: torch's SDPA, or written out where it lacks the soft-cap or the sink logits."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    assert isinstance(value, Tensor)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    n, m = logits.shape[-2:]
    if mask is None and n > 1:
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if s_aux is not None:
        extra = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits.dtype)
        logits = torch.cat([logits, extra], -1)
    p = torch.softmax(logits, -1, dtype=torch.float32)[..., :m].nan_to_num().to(query.dtype)
    p = nn.functional.dropout(p, dropout, module.training)
    return (p @ value).transpose(1, 2).contiguous(), None
