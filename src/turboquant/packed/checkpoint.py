"""Checkpoints of packed weights: safetensors files whose every tensor is checked before the first one is loaded.

A packed weight is three tensors beside each other, named as PackedTensor.NAMES names them; the format version stands in
the model's configuration. Only names, shapes and dtypes are read here, from the headers of the files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FORMAT = 2  # 2: output embeddings (head=8) are rotated where the inputs of the layers have 8 bit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
Spec = tuple[tuple[int, ...], torch.dtype | None]  # dtype None: any float


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the tensor. Nothing has been loaded."""


def check_format(value: object, where: object) -> None:
    """Refuse a format version this library does not know.

    Raises:
        CheckpointError.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= FORMAT:
        raise CheckpointError(
            f"{where}: format {value!r} is not known, this version of turboquant reads 1 to {FORMAT}; update turboquant"
        )


def headers(files: Iterable[str | Path]) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]]:
    """File, shape and dtype of every tensor.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file, or a tensor comes twice.
    """
    out: dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: packed weights are read from .safetensors files only")
        try:
            with safe_open(str(file), framework="pt") as f:
                for name in f.keys():  # noqa: SIM118
                    part = f.get_slice(name)
                    if name in out:
                        raise CheckpointError(f"{file}: tensor {name!r} stands also in {out[name][0].name}")
                    out[name] = (file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{file}: truncated or no safetensors file ({str(e).strip()})") from e
    return out


def check(files: Iterable[str | Path], expected: Mapping[str, Spec], optional: Iterable[str] = ()) -> None:
    """Compare what files hold with what a model expects.

    Args:
        expected: name -> (shape, dtype); every one must be there, in that shape and dtype.
        optional: names that may be missing (tied weights).

    Raises:
        CheckpointError: the first tensor that is missing, extra, or of another shape or dtype.
    """
    paths = [Path(f) for f in files]
    have, optional = headers(paths), set(optional)
    where = paths[0].parent if len(paths) > 1 else paths[0] if paths else "checkpoint"
    for name, (shape, dtype) in expected.items():
        if name not in have:
            if name in optional:
                continue
            raise CheckpointError(f"{where}: tensor {name!r} is missing")
        file, got, kind = have[name]
        wrong = kind != dtype if dtype is not None else not (kind and kind.is_floating_point)
        if got != tuple(shape) or wrong:
            is_, want = (str(d or "a float type").removeprefix("torch.") for d in (kind, dtype))
            raise CheckpointError(f"{file}: tensor {name!r} is {list(got)} {is_}, expected {list(shape)} {want}")
    extra = sorted(set(have) - set(expected))
    if extra:
        raise CheckpointError(f"{have[extra[0]][0]}: tensor {extra[0]!r} is not part of this model and recipe")
