"""Weights and speed: quantize, bench."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant.cli.app import (
    Device,
    Dtype,
    Feedback,
    Json,
    Keep,
    Model,
    OneRecipe,
    Override,
    Quiet,
    Recipes,
    Seed,
    Threads,
    app,
    load,
    open_console,
    progress,
    put_json,
)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the quantized model.", show_default=False)],
    recipe: OneRecipe = "w4a8kv4",
    keep: Keep = None,
    override: Override = None,
    feedback: Feedback = None,
    json: Json = None,
    layers: Annotated[bool, typer.Option("--layers", help="A row for every weight, not for every kind.")] = False,
    quiet: Quiet = False,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
) -> None:
    """Quantize a model's weights and save it.

    `from_pretrained(OUT)` loads it, after `from turboquant import TurboQuantConfig`.

    Example: turboquant quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-w4 --recipe w4a8kv4
    """
    from turboquant.evaluate import quantizing, report
    from turboquant.evaluate.errors import EvaluateError
    from turboquant.evaluate.results import check_output

    check_output(json)
    for item in override or []:
        if not item.partition("=")[0] or "=" not in item:
            raise EvaluateError(f"--override {item!r} is not allowed: give PATTERN=RECIPE, e.g. 'down_proj=w8a8'")
    overrides = dict(item.partition("=")[::2] for item in override or [])
    with progress(quiet) as show:
        rows, summary = quantizing.quantize(model, out, recipe, keep or [], overrides, feedback, dtype, device, show)
    console = open_console(json)
    shown = (rows, report.LAYERS) if layers else (quantizing.by_kind(rows), report.KINDS)
    console.print(report.table("Weights", *shown))
    console.print(report.table("In all (bytes)", [summary], report.SUMMARY))
    if feedback is None and any(r["recipe"].startswith("w4") for r in rows):
        console.print(
            "4-bit weights lose least with --feedback self (minutes, no data needed: docs/linear.md), w8a8kv4 next to "
            "nothing", style="yellow", markup=False,
        )  # fmt: skip
    console.print(f"turboquant generate {out} PROMPT, or turboquant serve {out}", style="dim", markup=False)
    put_json(json, {"summary": summary, "weights": rows})


@app.command()
def bench(
    model: Model,
    recipe: Recipes = ["w4a8kv4"],  # noqa: B006
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs, of which the median counts.")] = 3,
    json: Json = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="OUT", help="Write a plot.")] = None,
    quiet: Quiet = False,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Time prefill and decode of recipes against the model as it is, in one run, and count bytes.

    Example: turboquant bench HuggingFaceTB/SmolLM2-135M-Instruct --recipe w4a8kv4 --json bench.json --png bench.png
    """
    net, _ = load(model, dtype, device, threads, seed, recipe, [], (json, png))
    from turboquant.evaluate import plots, report, results, speed
    from turboquant.evaluate.linear import stored_note

    with progress(quiet) as show:
        rows = speed.bench(net, recipe, prompt, new, batch, repeats, show)
    console = open_console(json)
    console.print(report.table(f"Speed and bytes, {rows[0]['dtype']} on {rows[0]['device']}", rows, report.SPEED))
    if note := stored_note(net):
        console.print(note, style="yellow", markup=False)
    if png:
        results.write(png, plots.speed_plot(rows))
    put_json(json, rows)
