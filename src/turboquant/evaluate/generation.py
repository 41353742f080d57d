"""Generate text from a quantized cache and say what it took."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.fidelity import linear_kernels, scheme
from turboquant.evaluate.linear import linear_scheme
from turboquant.evaluate.memory import sixteen_bit_bytes
from turboquant.kernels.ops import explain
from turboquant.recipe import parse_recipe


class _Streamer(TextStreamer):
    """Hands on each finished piece of text, and remembers when tokens came."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit, self.times, self.pieces = emit, list[float](), list[str]()

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.emit(text)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    recipe: str = "kv4",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
    emit: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One answer, streamed.

    Args:
        prompt: the user's turn where the tokenizer has a chat template (unless chat=False), else the text to go on.
        temperature: 0 for greedy.
        emit: called with each piece of text as it comes.

    Returns:
        {"recipe", "text", "prompt_tokens", "new_tokens", "prompt_seconds", "tokens_per_second", "cache_bytes",
        "ring_bytes", "state_bytes", "pages_bytes", "dtype", "sixteen_bit_bytes", "kernel"}.

    Raises:
        EvaluateError, RecipeError: before any work.
    """
    if not prompt:
        raise EvaluateError("prompt is empty; give at least one word")
    if max_new_tokens < 1 or temperature < 0:
        raise EvaluateError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature} is not allowed: at least 1, and 0 or more"
        )
    with linear_scheme(model, scheme(recipe)):
        return _generate(model, tokenizer, prompt, recipe, max_new_tokens, temperature, seed, chat, emit)


def _generate(
    model: Any, tokenizer: Any, prompt: str, recipe: str, max_new_tokens: int, temperature: float, seed: int,
    chat: bool, emit: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    from transformers import DynamicCache

    from turboquant.integrations.transformers import TurboQuantCache

    parsed = parse_recipe(recipe)
    cache: Any = TurboQuantCache(model, parsed) if parsed.kv else DynamicCache(config=model.config)
    text = prompt
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=text == prompt)["input_ids"].to(model.device)
    options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    options["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if temperature > 0:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    streamer = _Streamer(tokenizer, emit)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=streamer, **options)
    times = streamer.times  # times[0] is the prompt
    if parsed.kv:
        size, sixteen = cache.nbytes(), sixteen_bit_bytes(cache)
        kernels = {row["kernel"] for row in explain(cache.ours[0].cache.layout, model.device, model.dtype)}
    else:
        held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if getattr(x, "keys", None) is not None)
        size, kernels = {"total": held, "pages": 0, "ring": held, "state": 0}, set()
        sixteen = held * 2 // model.dtype.itemsize
    kernels |= {k for k in (linear_kernels(model, model.device),) if k}
    return {
        "recipe": parsed.name,
        "text": "".join(streamer.pieces),
        "prompt_tokens": ids.shape[1],
        "new_tokens": out.shape[1] - ids.shape[1],
        "prompt_seconds": times[1] - times[0],
        "tokens_per_second": (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None,
        "cache_bytes": size["total"],
        "pages_bytes": size["pages"],
        "ring_bytes": size["ring"],
        "state_bytes": size["state"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "sixteen_bit_bytes": sixteen,
        "kernel": ", ".join(sorted(kernels)),
    }
