"""`turboquant serve`: vLLM's OpenAI-compatible server, in this process' place. Imports no vLLM."""

import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from turboquant.recipe import Recipe, parse_recipe

SERVER = ("vllm.entrypoints.cli.main", "serve")  # `vllm serve`
MODULE = ("vllm.entrypoints.openai.api_server", "--model")  # the same server by its module, deprecated
DEFAULT = "kv4"
CONFIGS = ("config.json", "params.json")  # of folders that vLLM reads
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class ServeError(RuntimeError):
    """A model cannot be served; the message says what to do."""


def quantization(model: str) -> dict[str, Any]:
    """The `quantization_config` in config.json of a folder or of a hub's model, {} where there is none to be read: vLLM
    reads the file again and says what is wrong with it, or that no such model can be had.
    """
    folder = Path(model)
    try:
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(model, "config.json")).parent
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (config.get("quantization_config") or {}) if isinstance(config, dict) else {}


def command(
    model: str, recipe: str | None = None, host: str | None = None, port: int | None = None, extra: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """The recipe that is served, and what starts the server.

    Args:
        model: hub name or folder.
        recipe: None for the one that a quantized model was written with, or DEFAULT.
        host, port: None for vLLM's own.
        extra: arguments of vLLM's own.

    Raises:
        ServeError: no vLLM; a model or arguments that cannot go with the recipe. RecipeError: an unknown recipe.
        CheckpointError: a file of a folder that is cut short.
    """
    if model.endswith(".gguf") or model == "smollm2":  # which is one, for the other commands
        raise ServeError(f"{model}: vLLM serves folders and hub names; quantize it: turboquant quantize {model} OUT")
    asked = parse_recipe(recipe or DEFAULT)
    model = str(Path(model).expanduser()) if model.startswith("~") else model
    _check_folder(model)
    written = quantization(model)
    ours = written.get("quant_method") == "turboquant"
    if written.get("quant_method") and not ours:
        raise ServeError(f"{model} is quantized by {written['quant_method']!r}: name the float model it was made from")
    if ours and recipe is not None:
        raise ServeError(
            f"{model} is stored as {written.get('recipe')!r} and served so: leave --recipe out, or name its float model"
        )
    parsed = parse_recipe(str(written.get("recipe"))) if ours else asked
    if parsed.weights is not None and (parsed.weights.head or parsed.weights.embed):
        raise ServeError(
            f"{parsed.name!r}: embeddings in 8 bit (head=8, embed=8) are not served by vLLM: quantize without them"
        )
    if importlib.util.find_spec("vllm") is None:
        raise ServeError(
            "vLLM is not installed: pip install '.[vllm]' in a clone of turboquant, or make vllm for a CPU. The server "
            "of transformers cannot take its place: of all quantizations it passes only bitsandbytes' on to a model, "
            "and so never this cache"
        )
    start = _start()
    _check_extra(extra, parsed, start)
    out = [sys.executable, "-m", *start, model]
    out += ["--port", str(port)] if port else []
    out += ["--host", host] if host else []
    if not ours:
        config = {"quantization_config": {"quant_method": "turboquant", "recipe": parsed.name}}
        out += ["--hf-overrides", json.dumps(config)]
    return parsed.name, [*out, *extra]


def _start() -> tuple[str, str]:
    """SERVER, which asks for the version of a distribution named vllm and ends without it: the wheels for CPUs have
    another name, and MODULE is what starts theirs.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return MODULE
    return SERVER


def _check_folder(model: str) -> None:
    """Refuse a folder that vLLM would look into for half a minute before it says that there is no model in it."""
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith(("/", ".")):
            raise ServeError(f"MODEL {model!r}: no such folder")
        return
    if not any((folder / name).exists() for name in CONFIGS):
        raise ServeError(f"MODEL {model!r}: a folder without {' or '.join(CONFIGS)} holds no model")
    if not any(f.suffix in WEIGHTS for f in folder.iterdir()):
        raise ServeError(f"MODEL {model!r}: a folder without weights ({', '.join(WEIGHTS)})")

    from turboquant.packed.checkpoint import headers

    for file in sorted(folder.glob("*.safetensors")):
        headers([file])


def _check_extra(extra: Sequence[str], recipe: Recipe, start: tuple[str, str]) -> None:
    """Refuse arguments of vLLM's that would undo what this command asks vLLM for, or that MODULE does not look at."""
    for arg, following in zip_longest(extra, extra[1:], fillvalue=""):
        given, equals, inline = arg.partition("=")
        if _means(given, "--host", "--port", "--recipe"):
            raise ServeError(f"{given} is an option of turboquant serve: it goes before the --")
        if _means(given, "--hf-overrides", "--quantization", "--model") or given.startswith("-q"):
            raise ServeError(f"{given} is set from MODEL and --recipe; call vLLM's own command to set it yourself")
        dtype = inline if equals else following
        if _means(given, "--kv-cache-dtype") and recipe.kv is not None and dtype != "auto":
            raise ServeError(
                f"{given} {dtype}: {recipe.name!r} has a cache of its own; leave it out, or kv out of the recipe"
            )
        if start is MODULE and (_means(given, "--api-server-count", "--headless", "--grpc") or given == "-asc"):
            raise ServeError(f"{given} is an argument of `vllm serve`, which vLLM's wheels for CPUs cannot run")


def _means(given: str, *options: str) -> bool:
    """Whether vLLM's parser takes an argument for one of these: --hf_overrides, --hf-overrides.KEY, --hf-over too."""
    name = given.split(".")[0].replace("_", "-")
    return len(name) > 2 and any(option.startswith(name) for option in options)


def _check_free(host: str | None, port: int) -> None:
    """Refuse a port that another program listens on, which vLLM would find once the model is loaded."""
    with socket.socket(socket.AF_INET6 if host and ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host or "", port))
        except OSError as e:
            raise ServeError(f"--port {port} of {host or 'all addresses'} cannot be listened on: {e.strerror}") from e


def serve(
    model: str, recipe: str | None = None, host: str | None = None, port: int | None = None, extra: Sequence[str] = ()
) -> None:
    """Become the server; arguments as of `command`. Does not return."""
    name, args = command(model, recipe, host, port, extra)
    if port or not any(arg.startswith("--config") for arg in extra):  # a file of vLLM's that may name the port
        _check_free(host, port or 8000)
    print(f"{model}: recipe {name}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(args[0], args)
