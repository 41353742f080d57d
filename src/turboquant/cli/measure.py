"""Measure a model: eval, inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from turboquant.cli.app import (
    Device,
    Dtype,
    Html,
    Json,
    Model,
    OneText,
    Png,
    Quiet,
    Recipes,
    Seed,
    Texts,
    Threads,
    app,
    load,
    open_console,
    progress,
    put_json,
)


@app.command("eval")
def evaluate(
    model: Model,
    recipe: Recipes = ["kv4"],  # noqa: B006
    text: Texts = None,
    ctx: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in all, rounded up to whole windows.")] = 24576,
    stride: Annotated[int, typer.Option(min=1, help="KL, top-1 and match at every so manyth position.")] = 1,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows at a time.")] = None,
    needle: Annotated[Path | None, typer.Option(metavar="OUT", help="Needle retrieval too; JSON rows go here.")] = None,
    needles: Annotated[int, typer.Option(min=1, help="Needle prompts at each depth.")] = 4,
    json: Json = None,
    html: Html = None,
    quiet: Quiet = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Measure fidelity against the unquantized model: perplexity, KL, top-1, match.

    With --json FILE finished rows are kept: the same command goes on where it stopped.

    Example: turboquant eval model.gguf --recipe kv4 --recipe plain4 --text book.txt --ctx 2048 --json rows.json
    """
    net, tokenizer = load(model, dtype, device, threads, seed, recipe, text or [], (json, html, needle))
    from turboquant.evaluate import fidelity, longcontext, report
    from turboquant.evaluate.linear import stored_note
    from turboquant.evaluate.texts import bundled

    texts: Any = text or bundled()
    found: list[dict[str, Any]] = []
    if needle:
        longcontext.check_ctx(tokenizer, ctx)
    file = None if json == "-" else json
    with progress(quiet) as show:
        rows = fidelity(
            net, tokenizer, recipe, texts, ctx, tokens, batch=batch, stride=stride, name=model, json=file, progress=show
        )
        if needle:
            found = longcontext.needle(net, tokenizer, recipe, ctx, n=needles, seed=seed, texts=texts, progress=show)
            put_json(str(needle), found)
    console = open_console(json)
    console.print(report.table("Fidelity against the model as it is", rows, report.FIDELITY))
    if note := stored_note(net):
        console.print(note, style="yellow", markup=False)
    if found:
        console.print(report.table("Needle in a haystack", found, report.NEEDLE))
    if html:
        report.evaluation_page(html, rows, found)
    put_json("-" if json == "-" else None, rows)


@app.command()
def inspect(
    model: Model,
    text: OneText = None,
    recipe: Recipes = ["kv4", "plain4"],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to follow.")] = 2048,
    json: Json = None,
    png: Png = None,
    html: Html = None,
    quiet: Quiet = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Show what the tracker follows: means, scales, hot channels and how long they stay hot, drift.

    Example: turboquant inspect model.gguf --text book.txt --html inspect.html
    """
    net, tokenizer = load(model, dtype, device, threads, seed, recipe, [text] if text else [], (json, png, html))
    from turboquant.evaluate import report
    from turboquant.evaluate.inputs import linear_inputs
    from turboquant.evaluate.texts import bundled
    from turboquant.evaluate.tracking import tracking

    with progress(quiet) as show:
        found = tracking(net, tokenizer, text or bundled(), recipe, tokens, show)
        layers = linear_inputs(net, tokenizer, text or bundled(), recipe, tokens, show)
    rows = found.rows()
    console = open_console(json)
    console.print(report.table("What the tracker follows", rows, report.TRACK))
    console.print(report.table("Relative error by layer", found.errors, report.ERRORS))
    if layers:
        console.print(report.table("Linear layers, each by itself", layers, report.INPUTS))
    report.inspection_files(found, model, png, html)
    put_json(json, {"tracker": rows, "errors": found.errors} | ({"linear": layers} if layers else {}))
