"""Needle retrieval: the task is what it says it is, and the scores are counted right."""

import pytest
import torch

from turboquant.evaluate import EvaluateError, longcontext, needle
from turboquant.recipe import RecipeError


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_the_needle_stands_at_its_depth_and_the_prompt_fits(tiny_tokenizer, prose, depth):
    import random

    ids = tiny_tokenizer(prose[:9000])["input_ids"]
    prompt, number = longcontext._task(tiny_tokenizer, ids, 2048, depth, random.Random(1))
    text = tiny_tokenizer.decode(prompt[0])
    assert 1900 < prompt.shape[1] <= 2048 - longcontext.ANSWER_TOKENS
    assert text.count(number) == 1 and "secret number" in text
    assert text.index(number) / len(text) == pytest.approx(depth, abs=0.2)


@pytest.mark.parametrize(
    ("answer", "number"), [("12345", "12345"), (" It is 12,345.", "12345"), ("none", ""), ("1 2345", "1")]
)
def test_number_of_an_answer(answer, number):
    assert longcontext._number(answer) == number


def test_rows_come_base_first_and_count_what_was_found(tiny_llama, tiny_tokenizer, prose, monkeypatch):
    asked = []

    def answer(model, tokenizer, s, prompt):
        text = tokenizer.decode(prompt[0])
        at = text.index("secret number of ")
        asked.append((longcontext.scheme_name(s), text))
        number = text[text.index(" is ", at) + 4 :][:5]
        return number if s == "base" or len(asked) % 2 else "no"

    monkeypatch.setattr(longcontext, "_answer", answer)
    rows = needle(tiny_llama, tiny_tokenizer, ["kv4"], 512, [0.2, 0.8], 2, texts=prose)
    assert [(r["recipe"], r["depth"]) for r in rows] == [("base", 0.2), ("base", 0.8), ("kv4", 0.2), ("kv4", 0.8)]
    assert [r["found"] for r in rows] == [2, 2, 1, 1]
    assert [r["accuracy"] for r in rows] == [100, 100, 50, 50]
    assert [t for n, t in asked if n == "base"] == [t for n, t in asked if n == "kv4"], "the same prompts for all"


def test_answers_are_decoded_under_every_kind_of_scheme(tiny_llama, tiny_tokenizer, prose):
    torch.manual_seed(0)
    rows = needle(tiny_llama, tiny_tokenizer, ["kv8", "int8-token"], 256, [0.5], 1, texts=prose)
    assert [r["recipe"] for r in rows] == ["base", "kv8", "int8-token"]


def test_bad_arguments(tiny_llama, tiny_tokenizer, prose):
    with pytest.raises(EvaluateError, match="depths"):
        needle(tiny_llama, tiny_tokenizer, ["kv4"], 512, [1.5], texts=prose)
    with pytest.raises(EvaluateError, match="ctx=4000"):
        needle(tiny_llama, tiny_tokenizer, ["kv4"], 4000, texts=prose[:1000])
    with pytest.raises(EvaluateError, match="too short for the question"):
        needle(tiny_llama, tiny_tokenizer, ["kv4"], 60, texts=prose)
    with pytest.raises(RecipeError, match="kv5"):
        needle(tiny_llama, tiny_tokenizer, ["kv5"], 512, texts=prose)
