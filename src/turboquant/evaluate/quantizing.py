"""Quantize a model's weights into a folder, and say what is stored."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.linear import collect_moments
from turboquant.evaluate.models import load
from turboquant.layers.convert import Quantized
from turboquant.layers.moments import FEEDBACK, Progress, check_feedback, moments_without_data
from turboquant.recipe import parse_recipe


def quantize(
    name: str | Path,
    out: str | Path,
    recipe: str = "w4a8kv4",
    keep: Sequence[str] = (),
    overrides: dict[str, str] | None = None,
    feedback: Path | str | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Load a model, quantize its linear layers one by one and save it for `from_pretrained`.

    Args:
        name, dtype, device: as for `models.load`; GGUF files too.
        out: a folder that does not exist yet or is empty; written whole or not at all.
        keep: modules whose weights stay as they are. overrides: pattern -> recipe, as of TurboQuantConfig.
        feedback: what second moments are collected on, for error feedback: a text; "self" for tokens that the model
            says itself ("self:FILE" keeps them, and goes on with what the file holds), "random" for random ones: these
            need no data. 4,096 tokens are taken, or two for each input of the widest layer if that is more.

    Returns:
        rows of `layers.convert.quantize_model`, and {"recipe", "weights", "bits_per_weight", "packed_before",
        "packed_bytes", "model_before", "model_bytes", "folder_bytes", "error"} (bytes; error relative; of all packed
        weights, embeddings among them with head=8 and embed=8).

    Raises:
        EvaluateError, RecipeError: before any work.
    """
    from turboquant.integrations.transformers import TurboQuantConfig
    from turboquant.integrations.transformers import quantize as quantize_loaded

    config = TurboQuantConfig(recipe, list(keep), overrides)
    if parse_recipe(recipe).weights is None:
        raise EvaluateError(f"recipe {recipe!r} leaves the weights alone: name one with w4 or w8, nothing needs saving")
    check_source(feedback)
    out = Path(out)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise EvaluateError(f"{out} exists and is not an empty folder")
        if not out.parent.is_dir():
            raise EvaluateError(f"{out} cannot be written: there is no folder {out.parent}")
        tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".").cleanup()
    except OSError as e:
        raise EvaluateError(f"{out} cannot be written: {e.strerror}") from e
    model, tokenizer = load(name, dtype, device)
    if any(isinstance(m, Quantized) for m in model.modules()):
        raise EvaluateError(f"{name} is quantized already: name the model that it was made from")
    before = _bytes(model)
    moments = (lambda: feedback_moments(model, tokenizer, feedback, progress)) if feedback else None
    rows = quantize_loaded(model, config, moments, progress)
    packed = [r for r in rows if r["bits"] is not None]
    if not packed:
        raise EvaluateError(f"recipe {recipe!r} with these --keep and --override packs no weight: nothing to save")
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + "."))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.chmod(folder, 0o755)
        for file in folder.iterdir():
            os.chmod(file, 0o644)  # safetensors writes for its user alone, a server may be another
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    numbers = sum(_numbers(r) for r in packed)
    size = sum(r["bytes"] for r in packed)
    summary = {
        "recipe": config.recipe,
        "feedback": str(feedback) if feedback else None,
        "weights": len(packed),
        "bits_per_weight": 8 * size / numbers,
        "packed_before": sum(r["bytes_before"] for r in packed),
        "packed_bytes": size,
        "model_before": before,
        "model_bytes": _bytes(model),
        "folder_bytes": sum(f.stat().st_size for f in out.iterdir()),
        "error": (sum(r["error"] ** 2 * _numbers(r) for r in packed) / numbers) ** 0.5,
    }
    return rows, summary


def by_kind(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `quantize` added up over weights of one last name, recipe and shape.

    Returns:
        rows {"kind", "weights", "recipe", "shape", "bits", "bytes", "bytes_before", "error"}: bytes are sums, the error
        is the root of the mean square over the weights; None where nothing was packed.
    """
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        name = r["name"].removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault((name, r["recipe"], tuple(r["shape"]), r["bits"]), []).append(r)
    return [
        {
            "kind": name, "weights": len(some), "recipe": recipe, "shape": shape, "bits": bits,
            "bytes": sum(r["bytes"] for r in some), "bytes_before": sum(r["bytes_before"] for r in some),
            "error": None if bits is None else (sum(r["error"] ** 2 for r in some) / len(some)) ** 0.5,
        }
        for (name, recipe, shape, bits), some in kinds.items()
    ]  # fmt: skip


def check_source(feedback: Path | str | None) -> None:
    """Refuse what `feedback_moments` could not use.

    Raises:
        EvaluateError, FeedbackError: no such text, or a word that is not known.
    """
    if feedback is None:
        return
    if _needs_no_text(feedback):
        check_feedback(str(feedback))
    elif not Path(feedback).is_file():
        raise EvaluateError(f"feedback={str(feedback)!r}: no such file; give a text, 'self', 'self:FILE' or 'random'")


def feedback_moments(
    model: Any, tokenizer: Any, feedback: Path | str, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Second moments for error feedback, from what `quantize` takes as `feedback`."""
    if _needs_no_text(feedback):
        return moments_without_data(model, str(feedback), progress)
    return collect_moments(model, tokenizer, feedback, progress=progress)


def _needs_no_text(feedback: Path | str) -> bool:
    return str(feedback).partition(":")[0] in FEEDBACK


def _numbers(row: dict[str, Any]) -> int:
    out = 1
    for n in row["shape"]:
        out *= n
    return out


def _bytes(model: Any) -> int:
    """Bytes of all parameters and saved buffers, tied ones once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
