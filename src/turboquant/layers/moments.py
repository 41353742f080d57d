"""Second moments of the inputs of linear layers, for error feedback: along token ids that are given, or that need no
data, drawn at random or said by the model itself."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FEEDBACK = ("self", "random")
ROUND = 8  # rows that a model says at a time
LEAST, PER_INPUT = 4096, 2  # tokens that moments are of: at least, and for each input of the widest layer
DAMPING = 0.3  # of an input's mean power is added to every channel's: other texts differ from the tokens that were read
Progress = Callable[[str, int, int], None]  # (what, done, of)


class FeedbackError(ValueError):
    """What error feedback was asked for cannot be had; the message says what is allowed."""


def check_feedback(feedback: str) -> tuple[str, Path | None]:
    """ "random", "self" or "self:FILE" -> its kind, and the file.

    Raises:
        FeedbackError: none of them, or there is no such folder.
    """
    kind, colon, file = feedback.partition(":") if isinstance(feedback, str) else ("", "", "")
    if kind not in FEEDBACK or (colon and (kind != "self" or not file)):
        raise FeedbackError(f"feedback={feedback!r} is not allowed: 'self', 'self:FILE' or 'random'")
    if file and not Path(file).absolute().parent.is_dir():
        raise FeedbackError(f"feedback={feedback!r}: there is no folder for this file")
    return kind, Path(file) if file else None


def moments_without_data(model: Any, feedback: str, progress: Progress | None = None) -> dict[str, Tensor]:
    """Second moments on `tokens_for` tokens: "random" ones, or those that the model says ("self"), which "self:FILE"
    keeps as they come, so that a run that was stopped goes on, and another recipe needs none.

    Raises:
        FeedbackError: as `check_feedback` and `own_words`.
    """
    kind, file = check_feedback(feedback)
    tokens = tokens_for(model)
    ids = random_ids(model, tokens) if kind == "random" else own_words(model, tokens, file=file, progress=progress)
    return moments_of(model, ids, progress)


def tokens_for(model: Any) -> int:
    """Tokens that the second moments of a model are taken of: several for each input of its widest linear layer."""
    return max(LEAST, PER_INPUT * _widest(model)[1])


def _widest(model: Any) -> tuple[str, int]:
    """Name and inputs of the decoder's linear layer with the most."""
    return max(((name, m.in_features) for name, m in _layers(model)), key=lambda x: x[1], default=("", 0))


def _layers(model: Any) -> list[tuple[str, nn.Linear]]:
    read = {id(m) for m in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in read]


def random_ids(model: Any, tokens: int = 4096, ctx: int = 256, seed: int = 0) -> Tensor:
    """(tokens/ctx, ctx) token ids drawn uniformly."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, _vocabulary(model), (-(-tokens // ctx), ctx), generator=draw)


@torch.no_grad()
def own_words(
    model: Any, tokens: int = 4096, ctx: int = 128, seed: int = 0, file: Path | None = None,
    progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """(tokens/ctx, ctx) token ids that a model says itself, at temperature 1, each row after one random token.

    The ids depend on the seed alone for a given model and device; torch's own random state is left as it was.

    Args:
        file: JSON that finished rows are kept in; rows that it holds are not said again.
        progress: called with ("own words", tokens said, tokens of all).

    Raises:
        FeedbackError: the file holds something else, or what another model, dtype, seed or length gave.
    """
    count = -(-tokens // ctx)
    first = torch.randint(0, _vocabulary(model), (count, 1), generator=torch.Generator().manual_seed(seed))
    what: dict[str, Any] = {}
    rows: list[list[int]] = []
    if file:
        dtype = str(model.dtype).removeprefix("torch.")
        what = {"model": _fingerprint(model), "dtype": dtype, "ctx": ctx, "seed": seed}
        rows = _read(file, what)
    while len(rows) < count:
        ids = first[len(rows) : len(rows) + ROUND].to(model.device)
        draw, cache = torch.Generator(model.device).manual_seed(seed + len(rows)), None
        for i in range(1, ctx):
            out = model(ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chance = torch.softmax(out.logits[:, -1].float(), -1)
            ids = torch.cat([ids, torch.multinomial(chance, 1, generator=draw)], 1)
            if progress:
                progress("own words", len(rows) * ctx + (i + 1) * len(ids), count * ctx)
        rows += ids.tolist()
        if file:
            _write(file, what | {"rows": rows})
    return torch.tensor(rows[:count])


@torch.no_grad()
def moments_of(model: Any, ids: Tensor, progress: Progress | None = None) -> dict[str, Tensor]:
    """Second moments of the inputs of a model's linear layers on token ids (rows, ctx), damped (DAMPING): name ->
    (K, K) fp32, all at once on the model's device. None of stacks of experts, of the output embeddings, and of layers
    that read fewer tokens than they have inputs (an expert by itself).

    Args:
        progress: called with ("second moments", tokens read, tokens of all).

    Raises:
        FeedbackError: fewer tokens than a layer has inputs: their moments say nothing of some directions of the input,
            into which feedback pushes the errors of all others.
    """
    name, inputs = _widest(model)
    if ids.numel() < inputs:
        raise FeedbackError(
            f"{ids.numel():,} tokens do not span the {inputs:,} inputs of {name}: too few for error feedback, give it "
            f"{tokens_for(model):,}"
        )
    ids = ids.to(model.device)
    handles = []
    out: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().float().flatten(0, -2)
            new = x.T @ x / ids.numel()
            out[name] = out[name] + new if name in out else new
            rows[name] = rows.get(name, 0) + len(x)

        return add

    for name, m in _layers(model):
        handles.append(m.register_forward_pre_hook(hook(name)))
    try:
        for i in range(0, len(ids), 4):
            model.get_decoder()(input_ids=ids[i : i + 4], use_cache=False)
            if progress:
                progress("second moments", ids[: i + 4].numel(), ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    enough = {name: found for name, found in out.items() if rows[name] >= len(found)}
    for found in enough.values():
        found.diagonal().add_(DAMPING * found.diagonal().mean())
    return enough


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _fingerprint(model: Any) -> str:
    """A hash over 64 numbers of every parameter."""
    out = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        at = torch.arange(64, device=p.device) * (p.numel() - 1) // 63
        out.update(name.encode() + p.detach().flatten()[at].double().cpu().numpy().tobytes())
    return out.hexdigest()


def _read(file: Path, what: dict[str, Any]) -> list[list[int]]:
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = found["rows"]
        sound = all(len(row) == what["ctx"] and all(isinstance(t, int) for t in row) for row in rows)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise FeedbackError(f"{file} exists and holds no words of a model: move it away first") from e
    if sound and found.get("dtype") != what["dtype"]:
        dtypes = f"{found.get('dtype', 'a dtype that it does not name')}, not {what['dtype']}"
        raise FeedbackError(f"{file} holds the words of a model in {dtypes}: name another file or the same dtype")
    if not sound or {k: found.get(k) for k in what} != what:
        raise FeedbackError(f"{file} holds the words of another model: name another file")
    return list(rows)


def _write(file: Path, value: dict[str, Any]) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, file)
