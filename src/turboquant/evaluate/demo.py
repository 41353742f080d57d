"""The main job on a real model, offline, in minutes: generate from a 4-bit cache, and show what that cost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import Progress, fidelity
from turboquant.evaluate.generation import generate
from turboquant.evaluate.memory import from_fidelity
from turboquant.evaluate.models import load, smollm2_path
from turboquant.evaluate.report import Section, fidelity_sections, page, tracking_sections
from turboquant.evaluate.results import dumps, write
from turboquant.evaluate.texts import bundled
from turboquant.evaluate.tracking import tracking

MODEL = "SmolLM2-135M-Instruct"
SCHEMES = ("base", "int8-token", "plain4", "kv4")
READ = 2400  # characters of the bundled text that the answer is about: several pages of cache
QUESTION = "Summarize in two sentences what the speaker says here."
LEAD = (
    "A real language model ran from a live 4-bit key-value cache, without calibration. Below: what it wrote, how far "
    "its next-token distributions moved, beside int8 and plain TurboQuant (the paper), and what the caches take."
)


def demo(
    out: str | Path,
    ctx: int = 2048,
    tokens: int = 4096,
    new_tokens: int = 80,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    emit: Callable[[str], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run everything and write index.html, the PNGs and rows.json into the folder `out`.

    Args:
        emit: called with each piece of generated text.
        say: called with a line before each step.
        progress: as for `fidelity`.

    Returns:
        {"generation", "fidelity", "memory", "errors"}: a row, and lists of rows.

    Raises:
        EvaluateError: the model's package is missing, or `out` cannot be made.
    """
    path, folder = smollm2_path(), Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EvaluateError(f"out={str(out)!r} is not a folder that can be made: {e.strerror}") from e
    say(f"Loading {MODEL}")
    model, tokenizer = load(path, dtype, device)
    text = bundled()
    start = text.index(" ", len(text) // 3) + 1
    prompt = f"{text[start : start + READ]}\n\n{QUESTION}"
    say("Generating from a kv4 cache")
    made = generate(model, tokenizer, prompt, "kv4", new_tokens, seed=seed, emit=emit)
    say(f"Measuring fidelity: {tokens} tokens, ctx {ctx}")
    rows = fidelity(model, tokenizer, SCHEMES, text, ctx, tokens, stride=2, name=MODEL, progress=progress)
    say("Looking at what the tracker follows")
    tracks = tracking(model, tokenizer, text, [s for s in SCHEMES if s != "base"], 2048, progress)
    result = {"generation": made, "fidelity": rows, "memory": from_fidelity(rows), "errors": tracks.errors}
    speed = f"{made['tokens_per_second']:.1f} tokens/s" if made["tokens_per_second"] else "one token"
    about = f"{made['prompt_tokens']} tokens read, {made['new_tokens']} written, {speed}, kernel {made['kernel']}."
    sections = [
        Section("What it wrote", f"{QUESTION} {about}", quote=made["text"].strip()),
        *fidelity_sections(rows),
        *tracking_sections(tracks, every_head=False),
    ]
    r = rows[0]
    footer = f"turboquant {r['version']}, {r['model']} in {r['dtype']} on {r['device']}; rows in rows.json"
    write(folder / "rows.json", dumps(result))
    for section in sections:
        for name, data in section.images:
            write(folder / f"{name}.png", data)
    page(folder / "index.html", f"TurboQuant on {MODEL}", LEAD, sections, footer)
    return result
