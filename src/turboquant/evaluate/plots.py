"""The plots: each function takes rows and returns a PNG (bytes). Matplotlib's Agg backend, never a window."""

import io
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch

from turboquant.evaluate.baselines import BASELINES
from turboquant.evaluate.linear import LINEAR_BASELINES
from turboquant.evaluate.tracking import LayerTrack, Tracking

# Okabe and Ito's colours, which people with any common colour vision tell apart; yellow left out on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def _styled(draw: Callable[..., Any]) -> Callable[..., bytes]:
    """Draw under this file's style and hand back the PNG of the figure."""

    @wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> bytes:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            out = io.BytesIO()
            draw(*args, **kwargs).savefig(out, format="png", facecolor="white")
            return out.getvalue()

    return wrapped


def _figure(width: float, height: float, **kwargs: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**kwargs)


@_styled
def fidelity_plot(rows: Sequence[dict[str, Any]]) -> Any:
    """KL divergence (log scale) against the mean bits of a stored key or value number; filled: this library's."""
    figure, ax = _figure(7.2, 4.4)
    points = [r for r in rows if r["recipe"] != "base" and r["kl"]]
    cache = all(r.get(name, 16) >= 16 for r in points for name in ("weight_bits", "activation_bits"))
    known = (*BASELINES, *LINEAR_BASELINES)
    placed: list[tuple[float, float]] = []
    for r in sorted(points, key=lambda r: r["kl"]):
        bits, ours = (r["key_bits"] + r["value_bits"]) / 2, r["recipe"] not in known
        if not cache:  # linear layers are in it
            bits = (r["weight_bits"] + r["activation_bits"] + bits) / 3
        colour = COLOURS[points.index(r) % len(COLOURS)]  # the order of the rows, as in `errors_plot`
        ax.errorbar(bits, r["kl"], yerr=2 * (r["kl_se"] or 0), color=colour, lw=1, capsize=2)
        face = colour if ours else "white"
        ax.scatter([bits], [r["kl"]], s=60, marker="o" if ours else "s", color=colour, facecolor=face, zorder=3)
        close = sum(abs(bits - b) < 0.6 and 0.6 < r["kl"] / k < 1.7 for b, k in placed)
        ax.annotate(
            r["recipe"], (bits, r["kl"]), (9, -3 - 11 * close), textcoords="offset points", color=colour, fontsize=9
        )
        placed.append((bits, r["kl"]))
    ax.set_yscale("log")
    if points:
        ax.set_xlim(right=ax.get_xlim()[1] + 0.25 * (ax.get_xlim()[1] - ax.get_xlim()[0]))
    ax.set_xlabel(
        "bits per number" + (", everything in the pages counted" if cache else ": weights, inputs, cache; mean")
    )
    ax.set_ylabel("KL divergence from the\nunquantized model (nats)")
    ax.set_title(f"Fidelity against bits: {_about(rows)}")
    handles = [
        ax.scatter([], [], s=50, marker=m, color="#444444", facecolor=f, label=name)
        for m, f, name in (("o", "#444444", "this library's"), ("s", "white", "to compare with"))
    ]
    ax.legend(handles=handles, loc="best", fontsize=9)
    return figure


def _about(rows: Sequence[dict[str, Any]]) -> str:
    r = rows[0]
    return f"{r['model']}, ctx {r['ctx']}, {r['tokens']} tokens" if rows else ""


@_styled
def bytes_plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Allocated bytes a token by part, as horizontal bars; rows of `memory`."""
    figure, ax = _figure(7.2, 1.4 + 0.45 * len(rows))
    names = [r["recipe"] for r in rows]
    left = [0.0] * len(rows)
    for part, label, colour in (
        ("pages_bytes", "pages (base: keys and values)", COLOURS[0]),
        ("ring_bytes", "ring and sinks, in the model's dtype", COLOURS[4]),
        ("state_bytes", "tracker and readers", COLOURS[1]),
    ):
        width = [r[part] / r["tokens"] / 1024 for r in rows]
        ax.barh(names, width, left=left, color=colour, label=label, height=0.62)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for name, x, r in zip(names, left, rows, strict=True):
        ax.annotate(f"{x:.1f}" if name == "base" else f"{x:.1f}   ({r['ratio']:.1f}× below 16 bit)", (x, name), (5, 0),
                    textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    ax.set_xlim(0, max(left) * 1.12)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    sequences, tokens = rows[0]["sequences"], rows[0]["tokens"]
    ax.set_xlabel(f"KiB of cache a token, allocated, for {sequences} × {tokens // sequences} tokens")
    ax.set_title("Bytes per token")
    ax.legend(loc="lower right", fontsize=9)
    return figure


@_styled
def ranges_plot(track: LayerTrack, head: int = 0) -> Any:
    """What the tracker sees of one head's keys over the tokens: all channels above, a few with their ranges below."""
    figure, (top, bottom) = _figure(7.6, 6.6, nrows=2, height_ratios=(1.1, 1), sharex=True)
    pages, _, d = track.mean.shape
    edges = [i * track.page for i in range(pages + 1)]
    middle = [(a + b) / 2 for a, b in pairwise(edges)]
    importance = (track.sigma_key * track.sigma_query)[:, head]
    importance = importance / importance.mean(-1, keepdim=True)
    from matplotlib.colors import LogNorm

    low, high = float(importance.quantile(0.02)), float(importance.quantile(0.995))
    mesh = top.pcolormesh(
        edges, range(d + 1), importance.T.numpy(), cmap="cividis", norm=LogNorm(max(low, 1e-3), high), rasterized=True
    )
    figure.colorbar(mesh, ax=top, label="importance σ_K·σ_Q\n(mean of the channels = 1)", pad=0.01)
    hot = track.hot[:, head]
    x = torch.tensor(middle).unsqueeze(1).expand(hot.shape).flatten()
    top.scatter(x, hot.flatten() + 0.5, s=26, color="#D55E00", edgecolor="white", lw=0.8, label="hot (kept in 8 bit)")
    top.set_ylabel("channel")
    top.grid(visible=False)
    top.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), fontsize=9, handletextpad=0.1)
    top.set_title(f"Keys of layer {track.layer}, head {head}, page by page ({track.page} tokens)")

    counts = torch.bincount(hot.flatten(), minlength=d)
    picked = [int(c) for c in counts.argsort(descending=True, stable=True)[:2] if counts[c]]
    rest = [int(c) for c in importance.mean(0).argsort() if c not in picked]
    picked.append(rest[len(rest) // 2])
    for c, colour in zip(picked, COLOURS, strict=False):
        mean, sigma = track.mean[:, head, c], track.sigma_key[:, head, c]
        kind = "hot" if counts[c] else "ordinary"
        bottom.fill_between(middle, mean - 2 * sigma, mean + 2 * sigma, color=colour, alpha=0.22, lw=0, step=None)
        bottom.plot(middle, mean, color=colour, lw=1.8, label=f"channel {c} ({kind})")
        for edge in (track.low, track.high):
            bottom.plot(middle, edge[:, head, c], color=colour, lw=0.9, ls=":")
    bottom.set_xlabel("token")
    bottom.set_ylabel("key (model's units)")
    bottom.set_title("Tracked mean and ±2σ (line, band); extremes of each page (dotted)")
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(picked), fontsize=9)
    return figure


@_styled
def errors_plot(tracking: Tracking) -> Any:
    """Relative error of keys, of values, and of what attention makes of them, layer by layer."""
    figure, axes = _figure(9.0, 3.6, ncols=3, sharey=True)
    names = list(dict.fromkeys(r["recipe"] for r in tracking.errors))
    for ax, key, title in zip(
        axes,
        ("key_error", "value_error", "output_error"),
        ("keys", "values", "attention output, no ring"),
        strict=True,
    ):
        for name, colour, marker in zip(names, COLOURS * 3, "os^Dv<>" * 3, strict=False):
            some = [r for r in tracking.errors if r["recipe"] == name]
            ax.plot([r["layer"] for r in some], [100 * r[key] for r in some], color=colour, marker=marker, ms=3.5,
                    lw=1.3, label=name)  # fmt: skip
        ax.set_title(title)
        ax.set_xlabel("layer")
        ax.set_yscale("log")
    axes[0].set_ylabel("relative error (%)")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(1, len(names)), fontsize=9
    )
    return figure


@_styled
def drift_plot(tracking: Tracking) -> Any:
    """Drift of every layer (mean over its heads) against the tokens."""
    figure, ax = _figure(7.2, 4.0)
    drift = torch.stack([t.drift.mean(1) for t in tracking.layers])
    page = tracking.layers[0].page
    edges = [i * page for i in range(drift.shape[1] + 1)]
    layers = [t.layer for t in tracking.layers]
    mesh = ax.pcolormesh(edges[1:], range(len(layers) + 1), drift[:, 1:].numpy(), cmap="cividis", rasterized=True)
    figure.colorbar(mesh, ax=ax, label="drift (1: means moved by one σ,\nor variances by a factor e)", pad=0.01)
    ax.grid(visible=False)
    ax.set_xlabel("token")
    ax.set_ylabel("attention layer")
    ax.set_title("How far each page lies from what the tracker held")
    return figure


def most_telling(tracking: Tracking) -> tuple[LayerTrack, int]:
    """The layer and head whose keys carry most of their energy in a few channels: the one worth drawing."""
    best, where = -1.0, (tracking.layers[0], 0)
    for track in tracking.layers:
        energy = (track.mean.square() + track.sigma_key.square()).mean(0)  # (H, d)
        peak = energy.amax(-1) / energy.mean(-1)
        head = int(peak.argmax())
        if float(peak[head]) > best:
            best, where = float(peak[head]), (track, head)
    return where


@_styled
def speed_plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Tokens a second of prefill and decode, and bytes read for one decode step, a bar a recipe; rows of `bench`."""
    figure, axes = _figure(9.6, 1.3 + 0.45 * len(rows), ncols=3, sharey=True)
    names = [r["recipe"] for r in rows]
    parts = (
        ("prefill_tokens_per_second", 1, "prefill, tokens/s"),
        ("decode_tokens_per_second", 1, "decode, tokens/s"),
        ("moved_bytes", 2**20, "read for one token, MiB"),
    )
    for ax, (key, unit, title), colour in zip(axes, parts, COLOURS, strict=False):
        ax.barh(names, [r[key] / unit for r in rows], color=colour, height=0.62)
        for r in rows:
            ax.annotate(f"{r[key] / unit:,.1f}", (r[key] / unit, r["recipe"]), (4, 0), textcoords="offset points",
                        va="center", fontsize=8)  # fmt: skip
        ax.set_xlim(0, max(r[key] for r in rows) / unit * 1.25)
        ax.grid(axis="y", visible=False)
        ax.set_title(title)
    axes[0].invert_yaxis()
    return figure
