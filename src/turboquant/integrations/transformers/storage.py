"""A TurboQuantCache in a safetensors file: named tensors, and everything else as JSON in the file's metadata."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import RecipeError

FORMAT = 1
NAMES = [n for n in CacheBuffers.__dataclass_fields__ if n != "table"]


class CacheFileError(ValueError):
    """A saved cache cannot be used; the message names the file and what is wrong with it."""


def fingerprint(model: Any, layer_types: list[str]) -> dict[str, Any]:
    """What identifies a model: its shape, and a hash over 64 rows of its input embedding."""
    config = model.config.get_text_config(decoder=True)
    weight = model.get_input_embeddings().weight
    rows = weight[torch.arange(64, device=weight.device) * (weight.shape[0] - 1) // 63]
    digest = hashlib.sha256(rows.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
    dtype = str(weight.dtype).removeprefix("torch.")
    return {"model_type": config.model_type, "layer_types": list(layer_types), "embedding": digest, "dtype": dtype}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bytes of all tensors."""
    out = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        out.update(name.encode())
        out.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def save(cache: Any, path: Path) -> None:
    """See TurboQuantCache.save."""
    if len(cache.ours) != len(cache.layers):
        raise CacheFileError(f"{path}: this model has layers that are not TurboQuant's; saving them is not supported")
    if not path.parent.is_dir():
        raise CacheFileError(f"{path}: there is no folder {path.parent}")
    tensors, values = {}, []
    for i, layer in enumerate(cache.ours):
        some, rest = layer.cache.state()
        tensors.update({f"{i}.{name}": t for name, t in some.items()})
        values.append(rest)
    header = {"format": FORMAT, "recipe": cache.recipe.name, "model": cache.fingerprint, "layers": values}
    header["sha256"] = _digest(tensors)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"turboquant": json.dumps(header)})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(cls: type, path: Path, model: Any) -> Any:
    """See TurboQuantCache.load."""
    if not path.is_file():
        raise CacheFileError(f"{path}: no such file")
    device = str(model.device)
    try:
        with safe_open(str(path), framework="pt", device=device) as f:
            header = json.loads((f.metadata() or {}).get("turboquant", "null"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as e:
        raise CacheFileError(f"{path}: not a readable safetensors file, or truncated ({e})") from e
    if not isinstance(header, dict) or "format" not in header:
        raise CacheFileError(f"{path}: not a cache saved by TurboQuant")
    if header["format"] != FORMAT:
        raise CacheFileError(f"{path}: format {header['format']}, this version reads format {FORMAT}")
    if header.get("sha256") != _digest(tensors):
        raise CacheFileError(f"{path}: corrupt: its contents do not have the checksum that was saved with them")
    try:
        cache = cls(model, header["recipe"])
        saved, layers = header["model"], header["layers"]
        if saved != cache.fingerprint:
            raise CacheFileError(
                f"{path}: saved with another model ({saved['model_type']}); its layers, weights or dtype differ from "
                f"this {cache.fingerprint['model_type']}"
            )
        if len(layers) != len(cache.ours):
            raise CacheFileError(f"{path}: holds {len(layers)} layers, the model has {len(cache.ours)}")
        parts = [_part(path, layer.cache.kv, i, tensors, layers[i]) for i, layer in enumerate(cache.ours)]
    except (KeyError, IndexError, TypeError, AttributeError, RecipeError) as e:
        raise CacheFileError(f"{path}: its header is damaged ({type(e).__name__}: {e})") from e
    if tensors:
        raise CacheFileError(f"{path}: unknown tensor {next(iter(tensors))!r}")
    for layer, part, value in zip(cache.ours, parts, layers, strict=True):
        layer.cache.load(part, value)
    return cache


def _part(path: Path, kv: Any, i: int, tensors: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Take layer i's tensors out of `tensors`, each checked against the shape and dtype that the recipe implies."""
    if values["columns"] == 0:
        return {}
    part = {}
    for name in NAMES:
        if f"{i}.{name}" not in tensors:
            raise CacheFileError(f"{path}: tensor '{i}.{name}' is missing")
        part[name] = tensors.pop(f"{i}.{name}")
    if part["ring_k"].dim() != 4:
        raise CacheFileError(f"{path}: tensor '{i}.ring_k' has shape {tuple(part['ring_k'].shape)}")
    b, h, _, d = part["ring_k"].shape
    n_pages = max((p for row in values["table"] for p in row), default=-1) + 1
    want = CacheBuffers.specs(PageLayout(kv, d), b, h, part["ring_k"].dtype, n_pages)
    del want["table"]
    for name, (shape, kind) in want.items():
        if tuple(part[name].shape) != shape or part[name].dtype != kind:
            raise CacheFileError(
                f"{path}: tensor '{i}.{name}' is {tuple(part[name].shape)} {part[name].dtype}, expected {shape} {kind}"
            )
    full = [n // kv.page for n in values["lengths"]]
    sound = (
        len(values["reach"]) == len(values["padding"]) == b
        and min((i for p in values["table"] for i in p), default=0) >= -1
    )
    if part["length"].tolist() != values["lengths"] or [len(p) for p in values["table"]] != full or not sound:
        raise CacheFileError(f"{path}: lengths and page table of layer {i} contradict each other")
    return part
