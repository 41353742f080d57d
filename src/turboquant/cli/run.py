"""Run a model: generate, serve."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from turboquant.cli.app import Device, Dtype, Json, Model, Quiet, Seed, Threads, app, load, open_console, put_json


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Default: what a quantized folder was written with, else kv4.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the prompt as it is: no chat template.")] = False,
    json: Json = None,
    quiet: Quiet = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Generate text from a quantized cache, streamed.

    Example: turboquant generate HuggingFaceTB/SmolLM2-135M-Instruct "Why is the sky blue?" --recipe kv4
    """
    from turboquant.evaluate.errors import EvaluateError
    from turboquant.evaluate.fidelity import check_recipe

    if not prompt:
        raise EvaluateError("PROMPT is empty; give at least one word")
    if recipe:
        check_recipe(recipe)
    net, tokenizer = load(model, dtype, device, threads, seed, [recipe] if recipe else [], [], (json,))
    from turboquant.evaluate import generation, report
    from turboquant.evaluate.linear import folder_recipe

    console = open_console(json)
    if recipe is None:
        written = folder_recipe(net)
        recipe = written.name if written else "kv4"
        if written:
            console.print(f"recipe {recipe}, as the folder was written", style="dim", markup=False)
    emit = lambda piece: console.print(piece, end="", markup=False, soft_wrap=True)  # noqa: E731
    row = generation.generate(net, tokenizer, prompt, recipe, max_new_tokens, temperature, seed, not raw, emit)
    console.print()
    console.print(report.generation_line(row), style="dim")
    put_json(json, row)


class Serve(TyperCommand):
    """Keeps what follows -- for vLLM, so that a word before it is not taken for vLLM's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta["vllm"] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- VLLM ARGS]"]


@app.command(cls=Serve)
def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Default: what a quantized folder was written with, else kv4."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: vLLM's, all.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: vLLM's, 8000.")] = None,
) -> None:
    """Serve a model with vLLM: an OpenAI-compatible server with this recipe.

    What follows -- are arguments of vLLM's own. Needs vLLM: pip install ".\\[vllm]" in a clone of turboquant.

    Example: turboquant serve Qwen/Qwen3-8B --recipe w8a8kv4

    Example: turboquant serve ./qwen-w4 --port 8001 -- --tensor-parallel-size 2 --max-model-len 32768

    Example: turboquant serve ./qwen-w4 -- --kv-cache-memory-bytes 1000000000 (on a CPU: vLLM would want all memory)
    """
    from turboquant.integrations.vllm.serve import serve as start

    start(model, recipe, host, port, ctx.meta["vllm"])
