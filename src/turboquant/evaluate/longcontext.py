"""Needle in a haystack: does a fact in a long prompt survive the cache?

A sentence with a random five-digit number is put into running text at a given depth and asked for at the end. The
prompt is read as users read it (in one piece), the answer is decoded greedily from the quantized cache.
"""

import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from turboquant.evaluate.attention import implementation
from turboquant.evaluate.baselines import Baseline
from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import BASE, Scheme, scheme_name, schemes
from turboquant.evaluate.linear import linear_scheme
from turboquant.evaluate.texts import bundled, encode, read_texts
from turboquant.recipe import Recipe

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
CITIES = ("Lisbon", "Nairobi", "Kyoto", "Bergen", "Quito", "Tunis", "Perth", "Zagreb", "Havana", "Oslo")
NEEDLE = " The secret number of {city} is {number}. "
QUESTION = "What is the secret number of {city} in the text? Answer with the number alone."
ANSWER_TOKENS = 12


@torch.no_grad()
def needle(
    model: Any,
    tokenizer: Any,
    recipes: str | Recipe | Sequence[str | Recipe] = ("kv4",),
    ctx: int = 8192,
    depths: Sequence[float] = DEPTHS,
    n: int = 4,
    seed: int = 0,
    *,
    texts: str | Path | Sequence[str | Path] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Share of needles found by each recipe at each depth, the unquantized model first.

    Args:
        model, tokenizer, recipes: as for `fidelity`.
        ctx: tokens of the prompt with its answer.
        depths: where the needle stands, 0 for the beginning of the text and 1 for its end.
        n: prompts at each depth; every recipe gets the same ones.
        seed: of numbers, cities and stretches of text.
        texts: the haystack; by default the bundled text.

    Returns:
        rows {"recipe", "ctx", "depth", "n", "found", "accuracy" (percent), "seconds"}.

    Raises:
        EvaluateError, RecipeError: before any work.
    """
    plan = schemes(recipes)
    plan = [BASE, *(s for s in plan if s != BASE)]
    if n < 1 or not depths or not all(0 <= d <= 1 for d in depths):
        raise EvaluateError(f"n={n}, depths={list(depths)} is not allowed: n at least 1 and depths from 0 to 1")
    check_ctx(tokenizer, ctx)
    contents = read_texts(bundled() if texts is None else texts)
    ids = [t for _, text in contents for t in encode(tokenizer, text[: 12 * ctx * 4])]
    if len(ids) < ctx:
        raise EvaluateError(f"{contents[0][0]}: the haystack has {len(ids)} tokens, ctx={ctx} needs as many")
    draw = random.Random(seed)
    tasks = {d: [_task(tokenizer, ids, ctx, d, draw) for _ in range(n)] for d in depths}
    rows = []
    for s in plan:
        done = 0
        with linear_scheme(model, s):
            for depth, prompts in tasks.items():
                began = time.perf_counter()
                found = 0
                for prompt, number in prompts:
                    found += _number(_answer(model, tokenizer, s, prompt)) == number
                    done += 1
                    if progress:
                        progress(f"needle, {scheme_name(s)}", done, n * len(depths))
                row = {"recipe": scheme_name(s), "ctx": ctx, "depth": depth, "n": n, "found": found}
                rows.append(row | {"accuracy": 100 * found / n, "seconds": round(time.perf_counter() - began, 2)})
    return rows


def check_ctx(tokenizer: Any, ctx: int) -> None:
    """Raises:
    EvaluateError: the question does not fit.
    """
    longest = max(len(_prompt(tokenizer, NEEDLE.format(city=c, number=99999), QUESTION.format(city=c))) for c in CITIES)
    if ctx < longest + ANSWER_TOKENS + 16:
        raise EvaluateError(
            f"ctx={ctx} is too short for the question: at least {longest + ANSWER_TOKENS + 16} are needed"
        )


def _number(answer: str) -> str:
    """The first whole number in an answer; "" if there is none."""
    match = re.search(r"\d+", answer.replace(",", ""))
    return match[0] if match else ""


def _task(tokenizer: Any, ids: list[int], ctx: int, depth: float, draw: random.Random) -> tuple[torch.Tensor, str]:
    """(prompt ids (1, <= ctx - ANSWER_TOKENS), the number to be found)."""
    city, number = draw.choice(CITIES), str(draw.randint(10000, 99999))
    sentence, question = NEEDLE.format(city=city, number=number), QUESTION.format(city=city)
    room = ctx - ANSWER_TOKENS - len(_prompt(tokenizer, sentence, question))
    start = draw.randint(0, len(ids) - room - 1)
    while True:
        hay = tokenizer.decode(ids[start : start + room])
        at = hay.find(". ", int(depth * len(hay)))  # between two sentences, if one ends after that place
        at = at + 1 if 0 <= at < len(hay) else int(depth * len(hay))
        prompt = _prompt(tokenizer, hay[:at] + sentence + hay[at:], question)
        over = len(prompt) - (ctx - ANSWER_TOKENS)
        if over <= 0:
            return torch.tensor([prompt]), number
        room -= over


def _prompt(tokenizer: Any, text: str, question: str) -> list[int]:
    """Ids of the whole prompt, in the model's chat template if it has one."""
    body = f"{text}\n\n{question}"
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": body}]
        body = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return encode(tokenizer, body)
    return tokenizer(f"{body}\nAnswer: The secret number is", verbose=False)["input_ids"]


def _answer(model: Any, tokenizer: Any, s: Scheme, prompt: torch.Tensor) -> str:
    """Greedy answer under a scheme."""
    from turboquant.integrations.transformers import TurboQuantCache

    ids = prompt.to(model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS}
    options["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with implementation(model, s.attention if isinstance(s, Baseline) else None):
        if isinstance(s, Recipe) and s.kv is not None:
            options["past_key_values"] = TurboQuantCache(model, s)
        elif isinstance(s, Baseline):
            options["use_cache"] = False
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
