"""The application, options that commands share, and what they do first and last."""

import os
import sys
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from turboquant import __version__


class Group(TyperGroup):
    """Turns what users can mend into one line `error: ...` and exit code 2, and this package's warnings into one line
    `warning: ...`; --debug shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        args = list(ctx.args)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = partial(_warn, warnings.showwarning)
                return super().invoke(ctx)
        except Exception as e:
            usage = hasattr(e, "format_message") and getattr(e, "exit_code", 0) == 2
            ours = type(e).__module__.startswith("turboquant.")
            if ctx.params.get("debug") or not (usage or ours):
                raise
            text = _usage(e, args) if usage else str(e)
            print("error:", " ".join(text.split()), file=sys.stderr)
            raise typer.Exit(2) from None


def _warn(other: Any, message: Any, category: Any, filename: str, *args: Any) -> None:
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        print("warning:", " ".join(str(message).split()), file=sys.stderr)
    else:
        other(message, category, filename, *args)


def _usage(error: Any, args: list[str]) -> str:
    """A usage error, with the value that was given (which typer leaves out)."""
    names = getattr(getattr(error, "param", None), "opts", [])
    given = [value for name, value in pairwise(args) if name in names]
    text = f"{error.format_message()}" + (f", given: {given[-1]!r}" if given else "")
    serving = getattr(getattr(error, "ctx", None), "info_name", None) == "serve"
    if serving and (hasattr(error, "option_name") or "extra argument" in text):
        text = f"{text.rstrip('.')}. A recipe follows --recipe, vLLM's own arguments follow --"
    return text


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="4-bit inference for transformer models, live and without calibration: KV cache, weights, activations.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub name, folder, .gguf file, or smollm2: the demo's.", show_default=False),
]
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
Feedback = Annotated[
    str | None, typer.Option("--feedback", help="Error feedback (minutes): self, self:FILE, random, or a text.")
]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="Modules that stay as they are.")]
Override = Annotated[list[str] | None, typer.Option("--override", help="PATTERN=RECIPE, for some modules.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", callback=lambda on: _hush(on))]


def _hush(quiet: bool) -> bool:
    """Switches the bars off too that other libraries draw while a model is loaded; they look once, when imported."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    return quiet


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


def open_console(json: str | None = None) -> Any:
    """See `evaluate.console`."""
    from turboquant.evaluate import console

    return console.open_console(json)


def progress(quiet: bool) -> Any:
    from turboquant.evaluate.console import progress_bars

    return progress_bars(quiet)


def prepare(threads: int | None, seed: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def put_json(out: str | None, value: Any) -> None:
    if out is None:
        return
    from turboquant.evaluate.results import dumps, write

    if out == "-":
        sys.stdout.write(dumps(value))
    else:
        write(out, dumps(value))


def load(
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    seed: int,
    recipes: list[str],
    texts: list[Path],
    outputs: tuple[Any, ...],
) -> tuple[Any, Any]:
    """The model and its tokenizer, after everything has been checked that can be checked without them."""
    from turboquant.evaluate.fidelity import scheme
    from turboquant.evaluate.linear import check_folder
    from turboquant.evaluate.models import load
    from turboquant.evaluate.results import check_output
    from turboquant.evaluate.texts import read_texts

    check_folder(model, [scheme(recipe) for recipe in recipes])
    if texts:
        read_texts(texts)
    for path in outputs:
        check_output(path)
    prepare(threads, seed)
    return load(model, dtype, device)
