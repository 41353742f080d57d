"""Rows on disk: JSON and other files written whole or not at all, and runs that go on where they stopped."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from turboquant.evaluate.errors import EvaluateError


def write(path: str | Path, data: str | bytes) -> Path:
    """Write to a temporary file beside `path`, then rename, so that nobody ever reads half a file.

    Raises:
        EvaluateError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    except OSError as e:
        raise EvaluateError(f"{path} cannot be written: {e.strerror}") from e
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def check_output(path: "str | Path | None") -> None:
    """Refuse early what `write` could not write.

    Raises:
        EvaluateError: the folder does not exist or cannot be written, or the path is a folder.
    """
    if path is None or str(path) == "-":
        return
    path = Path(path)
    try:
        if path.is_dir():
            raise EvaluateError(f"{path} cannot be written: it is a folder, give a file name")
        if not path.parent.is_dir():
            raise EvaluateError(f"{path} cannot be written: there is no folder {path.parent}")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp"):
            pass
    except OSError as e:
        raise EvaluateError(f"{path} cannot be written: {e.strerror}") from e


def finite(x: Any) -> Any:
    """None for NaN and infinities, which JSON does not have."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def dumps(value: Any) -> str:
    """JSON as people can read it."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


class Rows:
    """Rows by recipe, kept in a JSON file (a list of objects) if there is one.

    Args:
        path: of the file, or None. Rows in it that were made with `settings` count as done; a recipe that is measured
            again takes its old row's place. Rows of other settings stay in the file.
        settings: what every row carries and what must agree.

    Raises:
        EvaluateError: the file exists and is no list of rows (it is left alone).
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path) if path else None, settings
        self.rows: dict[str, dict[str, Any]] = {}
        self.others: list[dict[str, Any]] = []
        if self.path is None:
            return
        check_output(self.path)
        if self.path.exists():
            try:
                old = json.loads(self.path.read_text(encoding="utf-8"))
                if not all("ppl_base" in row for row in old):
                    raise ValueError("rows of something else")
                self.rows = {row["recipe"]: row for row in old if settings.items() <= row.items()}
                self.others = [row for row in old if not settings.items() <= row.items()]
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
                raise EvaluateError(f"{self.path} exists and is no list of rows of eval: move it away first") from e

    def __contains__(self, recipe: str) -> bool:
        return recipe in self.rows

    def __getitem__(self, recipe: str) -> dict[str, Any]:
        return self.rows[recipe]

    def add(self, recipe: str, values: dict[str, Any]) -> None:
        """Put a finished row in, and on disk."""
        values = {k: v for k, v in values.items() if k != "shapes"}
        self.rows[recipe] = {"recipe": recipe} | self.settings | values
        if self.path is not None:
            write(self.path, dumps([*self.others, *self.rows.values()]))
