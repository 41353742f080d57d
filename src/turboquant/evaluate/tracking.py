"""What the tracker follows on a text, layer by layer, and what the codecs make of the keys and values there.

Keys, values and queries are taken where attention gets them, by an attention function of its own that hands them on
and then computes ordinary attention. Statistics come from maths/tracker.py in the order in which the cache takes
them, so these are the numbers that stand in the page headers.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.evaluate.attention import implementation, register
from turboquant.evaluate.baselines import Baseline
from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import scheme, scheme_name
from turboquant.evaluate.texts import read_texts, windows
from turboquant.kernels.reference import decode_page_keys, decode_page_values, encode_pages
from turboquant.maths.tracker import ChannelTracker, page_stats
from turboquant.packed.buffers import READER_STRIDE
from turboquant.packed.page import PageLayout
from turboquant.recipe import KVRecipe, Recipe

NAME = "turboquant_record"
LAST = 128  # queries whose output error is measured
Visit = Callable[[nn.Module, Tensor, Tensor, Tensor], None]
_visit: ContextVar[Visit | None] = ContextVar("turboquant_visit", default=None)


@dataclass
class LayerTrack:
    """One layer, page by page: tensors (pages, H, d) fp32, hot (pages, H, h) int64, drift (pages, H) fp32.

    mean, sigma_key, sigma_query, scales: as frozen for each page. low, high: smallest and largest key of the page.
    own_mean: of the page alone.
    """

    layer: int
    page: int
    mean: Tensor
    sigma_key: Tensor
    sigma_query: Tensor
    scales: Tensor
    own_mean: Tensor
    low: Tensor
    high: Tensor
    hot: Tensor
    drift: Tensor


@dataclass
class Tracking:
    """Tracks of all attention layers, and rows of the errors of some schemes in each of them."""

    layers: list[LayerTrack] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and head, see `summary`."""
        return [row for track in self.layers for row in summary(track)]


@torch.no_grad()
def tracking(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    recipes: Sequence[str | Recipe] = ("kv4",),
    tokens: int = 2048,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tracking:
    """Run `tokens` tokens of a text through the model and follow them.

    Args:
        text: a file (Path) or the text itself.
        recipes: schemes whose error is measured in every layer; the first live recipe gives page size, decay and hot
            count of the tracks ("kv4" if there is none).

    Raises:
        EvaluateError, RecipeError: before any work; the text must hold `tokens` tokens, at least two pages.
    """
    plan = [s for s in map(scheme, recipes) if isinstance(s, Baseline) or (isinstance(s, Recipe) and s.kv)]
    live = [s.kv for s in plan if isinstance(s, Recipe) and s.kv is not None and s.kv.codec == "live"]
    kv = live[0] if live else KVRecipe()
    if tokens < 2 * kv.page:
        raise EvaluateError(f"tokens={tokens} is not allowed: at least two pages of {kv.page} tokens are needed")
    ids = windows(tokenizer, read_texts(text), tokens, tokens).to(model.device)
    out, seen = Tracking(), 0
    total = model.config.get_text_config(decoder=True).num_hidden_layers

    def visit(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> None:
        nonlocal seen
        q, k, v = q[0].float(), k[0].float(), v[0].float()
        layer = getattr(module, "layer_idx", None)
        layer = seen if layer is None else layer
        seen += 1
        out.layers.append(_track(layer, kv, q, k))
        out.errors.extend(_errors(layer, plan, q, k, v, getattr(module, "sliding_window", None)))
        if progress:
            progress("layers", seen, total)

    register(NAME, _record)
    token = _visit.set(visit)
    try:
        with implementation(model, NAME):
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        _visit.reset(token)
    return out


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    from turboquant.integrations.transformers.attention import attention_forward

    visit = _visit.get()
    if visit is not None:
        visit(module, query, key, value)
    return attention_forward(module, query, key, value, *args, **kwargs)


def _pages(kv: KVRecipe, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole pages of q (Hq, n, d), k (H, n, d): keys (pages, H, P, d), power (pages, H, d), usable (pages, 1, P)."""
    n = k.shape[1] // kv.page * kv.page
    keys = k[:, :n].unflatten(1, (-1, kv.page)).transpose(0, 1)
    power = q.unflatten(0, (k.shape[0], -1))[:, :, READER_STRIDE - 1 : n : READER_STRIDE].square().mean(1)
    power = power.unflatten(1, (-1, kv.page // READER_STRIDE)).mean(2).transpose(0, 1)
    usable = (torch.arange(n, device=k.device) >= kv.sinks).view(-1, 1, kv.page)
    return keys, power, usable


def _track(layer: int, kv: KVRecipe, q: Tensor, k: Tensor) -> LayerTrack:
    keys, power, usable = _pages(kv, q, k)
    own = page_stats(keys, power, usable.expand(keys.shape[:-1]))
    tracker, frozen, drift = ChannelTracker(kv.decay), [], []
    for i in range(len(keys)):
        page = type(own)(own.mean[i], own.var[i], own.power[i])
        drift.append(tracker.drift(page).to(k.device))
        frozen.append(tracker.frozen(page, kv.blend))
        tracker.update(page)
    stack = lambda get: torch.stack([get(s) for s in frozen]).cpu()  # noqa: E731
    real = usable.unsqueeze(-1)
    return LayerTrack(
        layer=layer,
        page=kv.page,
        mean=stack(lambda s: s.mean),
        sigma_key=stack(lambda s: s.sigma_key()),
        sigma_query=stack(lambda s: s.sigma_query()),
        scales=stack(lambda s: s.scales()),
        own_mean=own.mean.cpu(),
        low=torch.where(real, keys, torch.inf).amin(2).cpu(),
        high=torch.where(real, keys, -torch.inf).amax(2).cpu(),
        hot=stack(lambda s: s.hot(kv.hot_channels(k.shape[-1]))),
        drift=torch.stack(drift).cpu(),
    )


def _errors(
    layer: int, plan: Sequence[Any], q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> list[dict[str, Any]]:
    rows = []
    want = _attend(q, k, v, window)
    for s in plan:
        if isinstance(s, Baseline):
            k_hat, v_hat, first = s.keys(k.unsqueeze(0))[0], s.values(v.unsqueeze(0))[0], s.sinks
        else:
            k_hat, v_hat, first = _coded(s.kv, q, k, v)
        got = _attend(q, k_hat, v_hat, window)
        n = k.shape[1]
        error = {"key_error": _relative(k[:, first:n], k_hat[:, first:n])}
        error["value_error"] = _relative(v[:, first:n], v_hat[:, first:n])
        error["output_error"] = _relative(want, got)
        rows.append({"layer": layer, "recipe": scheme_name(s)} | error)
    return rows


def _coded(kv: KVRecipe, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values (H, n, d) as whole pages of a recipe hold them (the rest and the sinks as they are)."""
    layout = PageLayout(kv, k.shape[-1])
    keys, power, usable = _pages(kv, q, k)
    values = v[:, : len(keys) * kv.page].unflatten(1, (-1, kv.page)).transpose(0, 1)
    k_hat, v_hat, end = k.clone(), v.clone(), len(keys) * kv.page
    real = usable[:, 0].expand(k.shape[0], -1, -1)
    data, _ = encode_pages(layout, keys.transpose(0, 1), values.transpose(0, 1), power.transpose(0, 1), real, None)
    k_hat[:, :end] = decode_page_keys(layout, data).flatten(1, 2)
    v_hat[:, :end] = decode_page_values(layout, data).flatten(1, 2)
    k_hat[:, : kv.sinks], v_hat[:, : kv.sinks] = k[:, : kv.sinks], v[:, : kv.sinks]
    return k_hat, v_hat, kv.sinks


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last queries over all tokens, every token in its coded copy: (H, g, LAST, d)."""
    n, last = k.shape[1], min(LAST, k.shape[1])
    logits = torch.einsum("hgnd,hmd->hgnm", q.unflatten(0, (k.shape[0], -1))[:, :, -last:], k) * k.shape[-1] ** -0.5
    t, j = torch.arange(n - last, n, device=k.device).unsqueeze(1), torch.arange(n, device=k.device)
    see = j <= t if window is None else (j <= t) & (t - j < window)
    return torch.softmax(logits.masked_fill(~see, -torch.inf), -1) @ v.unsqueeze(1)


def _relative(want: Tensor, got: Tensor) -> float:
    """Root of the squared error over the squared norm."""
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def summary(track: LayerTrack) -> list[dict[str, Any]]:
    """Rows of a layer, one a head: {"layer", "head", "mean_share", "scale_spread", "hot", "hot_overlap",
    "hot_lifetime", "drift"}.

    mean_share: share of the keys' energy that is the channel means. scale_spread: largest over smallest scale of the
    last page. hot: channels of the last page. hot_overlap: share of a page's hot channels that the next page keeps.
    hot_lifetime: pages that a channel stays hot, on average. drift: mean over the pages (`ChannelTracker.drift`).
    """
    rows = []
    pages, heads, d = track.mean.shape
    for h in range(heads):
        is_hot = torch.zeros(pages, d, dtype=torch.bool).scatter_(1, track.hot[:, h], True)
        kept, count = (is_hot[1:] & is_hot[:-1]).sum().item(), max(1, int(is_hot[1:].sum()))
        stays = is_hot[0].sum().item() + (is_hot[1:] & ~is_hot[:-1]).sum().item()
        mean2, var = track.mean[:, h].square().sum(), track.sigma_key[:, h].square().sum()
        rows.append(
            {
                "layer": track.layer,
                "head": h,
                "mean_share": float(mean2 / (mean2 + var)),
                "scale_spread": float(track.scales[-1, h].max() / track.scales[-1, h].min()),
                "hot": track.hot[-1, h].tolist(),
                "hot_overlap": kept / count if is_hot.any() else None,
                "hot_lifetime": is_hot.sum().item() / stays if stays else None,
                "drift": float(track.drift[1:, h].mean()),
            }
        )
    return rows
