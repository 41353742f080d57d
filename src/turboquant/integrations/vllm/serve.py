"""`turboquant serve`: vLLM's OpenAI-compatible server, in this process' place. Imports no vLLM."""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from turboquant.recipe import Recipe, parse_recipe

SERVER = ("vllm.entrypoints.cli.main", "serve")  # `vllm serve`
MODULE = ("vllm.entrypoints.openai.api_server", "--model")  # the same server by its module, deprecated
DEFAULT = "kv4"
CONFIGS = ("config.json", "params.json")  # of folders that vLLM reads


class ServeError(RuntimeError):
    """A model cannot be served; the message says what to do."""


def stored_recipe(model: str) -> str | None:
    """The recipe of a folder that `turboquant quantize` wrote, None for other models."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError):
        return None
    return str(config.get("recipe")) if config.get("quant_method") == "turboquant" else None


def served(model: str, recipe: str | None) -> Recipe:
    """What a model is served with: `recipe`, else the one it is stored with, else DEFAULT."""
    return parse_recipe(recipe or stored_recipe(model) or DEFAULT)


def command(
    model: str, recipe: str | None = None, host: str | None = None, port: int = 8000, extra: Sequence[str] = ()
) -> list[str]:
    """What starts the server.

    Args:
        model: hub name or folder.
        recipe: None for the one that a quantized folder was written with, or DEFAULT.
        extra: arguments of vLLM's own.

    Raises:
        ServeError: no vLLM; a model or arguments that cannot go with the recipe. RecipeError: an unknown recipe.
    """
    stored, parsed = stored_recipe(model), served(model, recipe)
    if recipe is not None and stored is not None:
        raise ServeError(f"{model} is stored as {stored!r} and served so: leave --recipe out, or name its float model")
    if model.endswith(".gguf") or model == "smollm2":  # which is one, for the other commands
        raise ServeError(f"{model}: vLLM serves folders and hub names; quantize it: turboquant quantize {model} OUT")
    folder = Path(model).expanduser()
    if model.startswith(("/", ".", "~")) and not folder.is_dir():
        raise ServeError(f"MODEL {model!r}: no such folder")
    if folder.is_dir() and not any((folder / name).exists() for name in CONFIGS):
        raise ServeError(f"MODEL {model!r}: a folder without {' or '.join(CONFIGS)} holds no model")
    name = parsed.name
    if parsed.weights is not None and (parsed.weights.head or parsed.weights.embed):
        raise ServeError(
            f"{name!r}: embeddings in 8 bit (head=8, embed=8) are not served by vLLM: quantize without these options"
        )
    for arg in extra:
        if arg.split("=")[0] in ("--host", "--port"):
            raise ServeError(f"{arg.split('=')[0]} is an option of turboquant serve: it goes before the --")
        if _is_set_here(arg):
            raise ServeError(
                f"{arg.split('=')[0]} is set from MODEL and --recipe; call `vllm serve` to set it yourself"
            )
    if importlib.util.find_spec("vllm") is None:
        raise ServeError(
            "vLLM is not installed: pip install 'turboquant[vllm]'. transformers' own server cannot take its place: of "
            "all quantizations it passes only bitsandbytes' on to a model, and so never this cache"
        )
    out = [sys.executable, "-m", *_server(), model, "--port", str(port)]
    out += ["--host", host] if host else []
    if stored is None:
        config = {"quantization_config": {"quant_method": "turboquant", "recipe": name}}
        out += ["--hf-overrides", json.dumps(config)]
    return [*out, *extra]


def _server() -> tuple[str, str]:
    """SERVER, which asks for the version of a distribution named vllm and ends without it: the wheels for CPUs have
    another name, and MODULE is what starts theirs.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return MODULE
    return SERVER


def _is_set_here(arg: str) -> bool:
    """Whether an argument of vLLM's is one that `command` sets, the last of which would win. vLLM's parser takes it as
    --hf_overrides, --hf-overrides.KEY, --hf-over and -qVALUE too.
    """
    name = arg.split("=")[0].split(".")[0].replace("_", "-")
    known = ("--hf-overrides", "--quantization", "--model")
    return arg.startswith("-q") or any(len(name) > len("--mode") and full.startswith(name) for full in known)


def serve(
    model: str, recipe: str | None = None, host: str | None = None, port: int = 8000, extra: Sequence[str] = ()
) -> None:
    """Become the server; arguments as of `command`. Does not return."""
    args = command(model, recipe, host, port, extra)
    print(f"{model}: recipe {served(model, recipe).name}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(args[0], args)
