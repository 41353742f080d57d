"""Run a model: generate, serve."""

from typing import Annotated

import typer

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
    from turboquant.recipe import parse_recipe

    if not prompt:
        raise EvaluateError("PROMPT is empty; give at least one word")
    if recipe:
        parse_recipe(recipe)  # a scheme to compare with cannot generate
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


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder.", show_default=False)],
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM ARGS]", help="Arguments of vLLM's server.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Default: what a quantized folder was written with, else kv4."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: vLLM's, all.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve a model with vLLM: an OpenAI-compatible server with this recipe.

    Needs vLLM: pip install "turboquant\\[vllm]"

    Example: turboquant serve Qwen/Qwen3-8B --recipe w8a8kv4

    Example: turboquant serve ./qwen-w4 --port 8001 -- --tensor-parallel-size 2 --max-model-len 32768
    """
    from turboquant.integrations.vllm.serve import serve as start

    start(model, recipe, host, port, vllm_args or [])
