"""Rows as people read them: tables for the terminal, and one HTML page with everything in it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from turboquant.evaluate.results import write

Columns = Sequence[tuple[str, str, str]]  # (heading, key of the row, format)

FIDELITY: Columns = (
    ("recipe", "recipe", "{}"),
    ("bits W", "weight_bits", "{:.2f}"),
    ("bits A", "activation_bits", "{:.2f}"),
    ("bits K", "key_bits", "{:.2f}"),
    ("bits V", "value_bits", "{:.2f}"),
    ("PPL", "ppl", "{:.3f}"),
    ("ΔPPL %", "dppl_percent", "{:+.2f}"),
    ("±", "dppl_se", "{:.2f}"),
    ("KL", "kl", "{:.4f}"),
    ("top-1 %", "top1", "{:.1f}"),
    ("match %", "match", "{:.1f}"),
    ("kernel", "kernel", "{}"),
    ("s", "seconds", "{:.0f}"),
)
MEMORY: Columns = (
    ("cache", "recipe", "{}"),
    ("bytes/token", "bytes_per_token", "{:,.0f}"),
    ("of it pages", "pages_per_token", "{:,.0f}"),
    ("ring and sinks in all", "ring_bytes", "{:,}"),
    ("tracker in all", "state_bytes", "{:,}"),
    ("than 16 bit, smaller by", "ratio", "{:.2f}×"),
)
NEEDLE: Columns = (
    ("recipe", "recipe", "{}"),
    ("ctx", "ctx", "{}"),
    ("depth", "depth", "{:.2f}"),
    ("found", "found", "{}"),
    ("of", "n", "{}"),
    ("accuracy %", "accuracy", "{:.0f}"),
)
TRACK: Columns = (
    ("layer", "layer", "{}"),
    ("head", "head", "{}"),
    ("energy in means", "mean_share", "{:.2f}"),
    ("scales max/min", "scale_spread", "{:.1f}"),
    ("drift", "drift", "{:.2f}"),
    ("stay hot (pages)", "hot_lifetime", "{:.1f}"),
    ("hot kept", "hot_overlap", "{:.2f}"),
    ("hot channels", "hot", "{}"),
)
ERRORS: Columns = (
    ("layer", "layer", "{}"),
    ("recipe", "recipe", "{}"),
    ("key error", "key_error", "{:.4f}"),
    ("value error", "value_error", "{:.4f}"),
    ("output error", "output_error", "{:.4f}"),
)
RECIPES: Columns = (
    ("name", "recipe", "{}"),
    ("what", "what", "{}"),
    ("K, d=64", "key_bits_64", "{:.2f}"),
    ("V, d=64", "value_bits_64", "{:.2f}"),
    ("K, d=128", "key_bits_128", "{:.2f}"),
    ("V, d=128", "value_bits_128", "{:.2f}"),
)
LAYERS: Columns = (
    ("weight", "name", "{}"),
    ("recipe", "recipe", "{}"),
    ("shape", "shape", "{}"),
    ("bits", "bits", "{:.3f}"),
    ("bytes", "bytes", "{:,}"),
    ("before", "bytes_before", "{:,}"),
    ("error", "error", "{:.4f}"),
)
KINDS: Columns = (
    ("kind", "kind", "{}"),
    ("weights", "weights", "{}"),
    *LAYERS[1:],
)
SUMMARY: Columns = (
    ("recipe", "recipe", "{}"),
    ("weights", "weights", "{}"),
    ("bits/weight", "bits_per_weight", "{:.3f}"),
    ("packed weights", "packed_bytes", "{:,}"),
    ("before", "packed_before", "{:,}"),
    ("model", "model_bytes", "{:,}"),
    ("before", "model_before", "{:,}"),
    ("on disk", "folder_bytes", "{:,}"),
    ("error", "error", "{:.4f}"),
)
SPEED: Columns = (
    ("recipe", "recipe", "{}"),
    ("prefill tok/s", "prefill_tokens_per_second", "{:,.1f}"),
    ("×", "prefill_speedup", "{:.2f}"),
    ("decode tok/s", "decode_tokens_per_second", "{:,.1f}"),
    ("×", "decode_speedup", "{:.2f}"),
    ("weights", "weight_bytes", "{:,}"),
    ("cache", "cache_bytes", "{:,}"),
    ("read a step", "moved_bytes", "{:,}"),
    ("of base", "moved_share", "{:.0%}"),
    ("linear", "linear_kernel", "{}"),
    ("cache kernel", "cache_kernel", "{}"),
)
INPUTS: Columns = (
    ("layer", "layer", "{}"),
    ("recipe", "recipe", "{}"),
    ("channels max/median", "spread", "{:.1f}"),
    ("peak/RMS", "peak", "{:.1f}"),
    ("weight error", "weight_error", "{:.4f}"),
    ("output error", "output_error", "{:.4f}"),
)
LINEAR_RECIPES: Columns = (
    ("name", "recipe", "{}"),
    ("what", "what", "{}"),
    ("bits W, K=4096", "weight_bits_4096", "{:.2f}"),
    ("bits A, K=4096", "activation_bits_4096", "{:.2f}"),
)
RECIPE_HELP = """Recipes: kvB, kKvV and plainB with B, K, V in 2, 3, 4, 8; wB and aB with B in 4, 8; products
in the order w4a8kv4. Options as in kv4:ring=64,sinks=0,hot=8 (of the cache: page, hot, ring, sinks, rewind,
decay, blend; of weights: group, clip, head, embed; of activations: ahot, agroup, freeze). Bits count everything
that is stored for a page or a weight; the ring of 16-bit tokens is reported beside them. In `eval` and `inspect`,
plain3 and plain4 alone are the paper without pages and ring; plain4:ring=128 is the recipe, as `generate` runs it."""


def cells(rows: Sequence[dict[str, Any]], columns: Columns) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of text)."""

    def text(value: Any, form: str) -> str:
        if isinstance(value, list):
            return " ".join(map(str, value))
        return "–" if value is None else form.format(value)

    return [c[0] for c in columns], [[text(row.get(key), form) for _, key, form in columns] for row in rows]


def table(title: str, rows: Sequence[dict[str, Any]], columns: Columns, wrap: bool = False) -> Any:
    """A rich table; wrap=True for columns of text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    headings, body = cells(rows, columns)
    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    for heading, (_, _, form) in zip(headings, columns, strict=True):
        out.add_column(heading, justify="left" if form == "{}" else "right", no_wrap=not wrap)
    for row in body:
        out.add_row(*map(Text, row))  # Text: no markup in what others named
    return out


@dataclass
class Section:
    """A part of the page: a heading and any of a paragraph, a quotation, a table, and PNGs with their names."""

    title: str
    text: str = ""
    quote: str = ""
    table: tuple[list[str], list[list[str]]] | None = None
    images: list[tuple[str, bytes]] = field(default_factory=list)


def page(path: str | Path, title: str, lead: str, sections: Sequence[Section], footer: str = "") -> Path:
    """Write one HTML file that needs no other file."""
    import jinja2

    source = (resources.files("turboquant.evaluate") / "templates" / "report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    parts = [
        vars(s) | {"images": [(name, base64.b64encode(data).decode()) for name, data in s.images]} for s in sections
    ]
    return write(path, template.render(title=title, lead=lead, sections=parts, footer=footer))


def fidelity_sections(rows: Sequence[dict[str, Any]]) -> list[Section]:
    """The fidelity table with its plot, and the bytes per token."""
    from turboquant.evaluate.memory import from_fidelity
    from turboquant.evaluate.plots import bytes_plot, fidelity_plot

    sizes = from_fidelity(rows)
    what = (
        "Each scheme reads the same windows of text as the unquantized model. KL (nats), top-1 and match (1 - total "
        "variation) compare the next-token distributions; ± is the standard error of the paired change of perplexity."
    )
    images = [("fidelity", fidelity_plot(rows))] if any(r["kl"] for r in rows) else []
    return [
        Section("Fidelity", what, table=cells(rows, FIDELITY), images=images),
        Section(
            "Bytes per token",
            f"Allocated for {sizes[0]['tokens']} tokens in {sizes[0]['sequences']} sequences. Schemes whose kernel is "
            "fake-quant store nothing: theirs are computed from their bits. The ring is in the dtype of the model.",
            table=cells(sizes, MEMORY),
            images=[("bytes", bytes_plot(sizes))],
        ),
    ]


def tracking_sections(tracking: Any, every_head: bool = True) -> list[Section]:
    """Key ranges of one layer, errors by layer, drift, and a row for every layer and head."""
    from turboquant.evaluate.plots import drift_plot, errors_plot, most_telling, ranges_plot

    track, head = most_telling(tracking)
    out = [
        Section(
            "What the tracker sees",
            "One layer's keys over the tokens: the layer and head whose energy is most concentrated in a few channels.",
            images=[("ranges", ranges_plot(track, head))],
        )
    ]
    if tracking.errors:
        what = (
            "Relative error in each layer, every token read from its codes (in use, the ring spares the newest ones)."
        )
        out.append(Section("Error by layer", what, images=[("errors", errors_plot(tracking))]))
    if every_head:
        out.append(Section("Drift", images=[("drift", drift_plot(tracking))]))
        out.append(Section("Every layer and head", table=cells(tracking.rows(), TRACK)))
    return out


def evaluation_page(path: str | Path, rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> Path:
    """The page of `turboquant eval`."""
    r, sections = rows[0], fidelity_sections(rows)
    if found:
        sections.append(Section("Needle in a haystack", table=cells(found, NEEDLE)))
    lead = f"{r['model']} in {r['dtype']} on {r['device']}: {r['tokens']} tokens in windows of {r['ctx']}."
    return page(path, "Fidelity of quantized KV caches", lead, sections, f"turboquant {r['version']}")


def inspection_files(tracking: Any, model: str, png: str | Path | None, html: str | Path | None) -> None:
    """The files of `turboquant inspect`."""
    from turboquant.evaluate.plots import most_telling, ranges_plot

    if png:
        write(png, ranges_plot(*most_telling(tracking)))
    if html:
        track = tracking.layers[0]
        lead = f"{model}: {len(tracking.layers)} attention layers, {len(track.mean)} pages of {track.page} tokens."
        page(html, "What the tracker follows", lead, tracking_sections(tracking))


def generation_line(row: dict[str, Any]) -> str:
    """One line about a generation."""
    speed = f"{row['tokens_per_second']:.1f} tokens/s" if row["tokens_per_second"] else "–"
    size = {k: f"{row[k + '_bytes'] / 2**20:.2f}" for k in ("cache", "pages", "ring", "state", "sixteen_bit")}
    cache = f"cache {size['cache']} MiB, as it is without a recipe: {row['recipe']} leaves it alone"
    if row["pages_bytes"] or row["cache_bytes"] != row["ring_bytes"]:
        cache = f"cache {size['cache']} MiB allocated ({size['pages']} packed, {size['ring']} ring in {row['dtype']}, "
        cache += f"which long texts do not add to, {size['state']} trackers), a 16-bit cache {size['sixteen_bit']} MiB"
    return (
        f"{row['recipe']}: {row['prompt_tokens']} tokens read in {row['prompt_seconds']:.2f} s, {row['new_tokens']} "
        f"written at {speed}; {cache}; kernel {row['kernel']}"
    )


def recipe_rows() -> list[dict[str, Any]]:
    """Recipes and baselines with their true bits at head_dim 64 and 128."""
    from turboquant.evaluate.baselines import BASELINES
    from turboquant.packed.page import PageLayout
    from turboquant.recipe import EXAMPLES, parse_recipe

    rows: list[dict[str, Any]] = []
    for name in EXAMPLES:
        kv = parse_recipe(name).kv
        assert kv is not None
        shown = f"{name}:ring={kv.ring}" if name in BASELINES else name
        rows.append({"recipe": shown, "what": "live" if kv.codec == "live" else "the paper's codec, in our pages"})
        for d in (64, 128):
            layout = PageLayout(kv, d)
            rows[-1] |= {f"key_bits_{d}": layout.key_bits, f"value_bits_{d}": layout.value_bits}
    for b in BASELINES.values():
        rows.append({"recipe": b.name, "what": "to compare with"})
        rows[-1] |= {f"{n}_bits_{d}": getattr(b, f"{n}_bits")(d) for n in ("key", "value") for d in (64, 128)}
    return rows


def linear_recipe_rows() -> list[dict[str, Any]]:
    """Recipes and baselines of linear layers with their true bits at 4096 inputs."""
    from turboquant.evaluate.linear import LINEAR_BASELINES
    from turboquant.recipe import LINEAR_EXAMPLES, parse_recipe

    rows: list[dict[str, Any]] = []
    for name in LINEAR_EXAMPLES:
        r = parse_recipe(name)
        weights = r.weights.bits_per_weight(4096) if r.weights else 16.0
        activations = r.activations.bits_per_activation(4096) if r.activations else 16.0
        what = "with the cache " + r.kv.name if r.kv else "linear layers"
        rows.append({"recipe": name, "what": what, "weight_bits_4096": weights, "activation_bits_4096": activations})
    for b in LINEAR_BASELINES.values():
        bits = {"weight_bits_4096": b.weight_bits(4096), "activation_bits_4096": b.activation_bits(4096)}
        rows.append({"recipe": b.name, "what": "to compare with"} | bits)
    return rows
