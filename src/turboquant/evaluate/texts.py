"""Texts, and the windows of tokens that are cut from them."""

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboquant.evaluate.errors import EvaluateError

CHARACTERS = 12  # characters of text that surely hold a token's worth, on average over a window


def bundled() -> str:
    """The public-domain text that the package ships: State of the Union addresses."""
    return (resources.files("turboquant") / "data" / "sotu.txt").read_text(encoding="utf-8")


def read_texts(texts: "str | Path | Sequence[str | Path]") -> list[tuple[str, str]]:
    """(name, content) of each text: a Path is read, a string is the text itself.

    Raises:
        EvaluateError: a file that does not exist or is not UTF-8 text.
    """
    out = []
    for i, item in enumerate([texts] if isinstance(texts, str | Path) else list(texts)):
        if isinstance(item, str):
            out.append((f"text {i + 1}", item))
            continue
        try:
            out.append((str(item), item.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as e:
            raise EvaluateError(f"text {str(item)!r} cannot be read: {e}") from e
    if not out:
        raise EvaluateError("texts is empty; at least one text is needed")
    return out


def digest(texts: list[tuple[str, str]]) -> str:
    """12 hexadecimal digits that identify the contents."""
    return hashlib.sha256("\0".join(content for _, content in texts).encode()).hexdigest()[:12]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text (a BOS token, or nothing)."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def windows(tokenizer: Any, texts: list[tuple[str, str]], ctx: int, tokens: int) -> Tensor:
    """Disjoint windows of `ctx` tokens, spread evenly over each text: (ceil(tokens/ctx), ctx) int64.

    Texts take turns; a window begins with the tokenizer's BOS token if it has the habit of putting one.

    Raises:
        EvaluateError: a text shorter than ctx, or texts that together hold too few windows.
    """
    if ctx < 2 or tokens < 1:
        raise EvaluateError(f"ctx={ctx}, tokens={tokens} is not allowed: ctx must be at least 2 and tokens at least 1")
    start = first_ids(tokenizer)
    size, count = ctx - len(start), -(-tokens // ctx)
    share = [count // len(texts) + (i < count % len(texts)) for i in range(len(texts))]
    rows: list[list[list[int]]] = []
    whole: dict[int, list[int]] = {}
    for i, (_, content) in enumerate(texts):
        cut = _from_segments(tokenizer, content, size, share[i])
        if cut is None:
            whole[i] = encode(tokenizer, content)
            cut = [whole[i][at : at + size] for at in _starts(len(whole[i]), size, share[i])]
        rows.append(cut)
    for i, ids in whole.items():
        if len(ids) < size:
            raise EvaluateError(f"{texts[i][0]}: the text has {len(ids)} tokens, ctx={ctx} needs at least {size}")
    short = count - sum(map(len, rows))
    if short:
        raise EvaluateError(
            f"tokens={tokens} needs {count} windows of ctx={ctx}, but {', '.join(name for name, _ in texts)} hold only "
            f"{count - short} in equal shares: name more text, or fewer tokens"
        )
    order = [rows[i][j] for j in range(max(share)) for i in range(len(texts)) if j < len(rows[i])]
    return torch.tensor([start + ids for ids in order])


def _from_segments(tokenizer: Any, content: str, size: int, count: int) -> list[list[int]] | None:
    """One window at the beginning of each of `count` equal parts of a long text; None if a part may be too short."""
    part = len(content) // max(1, count)
    if part < CHARACTERS * size:
        return None
    out = []
    for i in range(count):
        piece = content[i * part : i * part + CHARACTERS * size]
        piece = piece[piece.find(" ") + 1 :] if i else piece  # begin with a whole word
        out.append(encode(tokenizer, piece)[:size])
    return out if all(len(ids) == size for ids in out) else None


def _starts(length: int, size: int, count: int) -> list[int]:
    """Starts of up to `count` disjoint windows of `size`, spread evenly over `length`."""
    count = min(count, length // size)
    return [i * (length // count) for i in range(count)] if count else []
