"""What commands refuse before they work, rather than after it."""

import copy
import json

import pytest
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.evaluate import fidelity
from turboquant.evaluate.errors import EvaluateError
from turboquant.evaluate.models import load
from turboquant.evaluate.results import Rows
from turboquant.recipe import RecipeError, parse_recipe


@pytest.fixture
def refused(monkeypatch):
    """(*args) -> what a command says that must not come to load a model."""
    monkeypatch.setattr("turboquant.evaluate.models.load", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr("turboquant.evaluate.quantizing.load", lambda *a: pytest.fail("loaded"))

    def run(*args):
        done = CliRunner().invoke(app, [str(a) for a in args])
        assert done.exit_code == 2, done.output
        return done.stderr

    return run


@pytest.mark.parametrize("option", ["--json", "--html", "--needle"])
def test_outputs_that_cannot_be_written(option, refused, tmp_path):
    assert "cannot be written: File name too long" in refused("eval", "m", option, tmp_path / ("x" * 300))


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    assert "cannot be written: File name too long" in refused("quantize", "m", tmp_path / ("x" * 300))
    assert not list(tmp_path.iterdir())


def test_schemes_that_cannot_generate(refused):
    assert "'kivi-g32' is a scheme that eval compares with, and cannot generate" in refused(
        "generate", "m", "Hello.", "-r", "kivi-g32"
    )
    said = refused("generate", "m", "Hello.", "-r", "kv9")
    assert "unknown recipe 'kv9'" in said and "To compare with" not in said


def test_the_papers_codec_generates(tiny_folder):
    """By the name that eval has for it without pages too."""
    done = CliRunner().invoke(
        app, ["generate", str(tiny_folder), "Hello there.", "-r", "plain4", "--max-new-tokens", "2", "--device", "cpu"]
    )
    assert done.exit_code == 0 and "plain4: " in done.output


def test_a_question_that_does_not_fit(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("turboquant.evaluate.fidelity", lambda *a, **k: pytest.fail("measured"))
    done = CliRunner().invoke(
        app, ["eval", str(tiny_folder), "--ctx", "8", "--needle", str(tmp_path / "n"), "--device", "cpu", "-q"]
    )
    assert done.exit_code == 2 and "ctx=8 is too short for the question" in done.stderr


def test_rows_of_another_command_are_left_alone(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps([{"recipe": "base", "decode_tokens_per_second": 1.0}]))
    with pytest.raises(EvaluateError, match="is no list of rows of eval: move it away first"):
        Rows(file, {"ctx": 1})


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "prose.txt").write_text("Once upon a time")
    with pytest.raises(EvaluateError, match=r"prose\.txt' is a file: a model is a folder, a \.gguf file or a hub name"):
        load(tmp_path / "prose.txt")


def test_windows_in_which_nothing_packed_is_read(tiny_llama, tiny_tokenizer, prose):
    with pytest.warns(UserWarning, match="ctx=128: kv4 reads nothing packed .* its newest 128 tokens are as they were"):
        (row,) = fidelity(tiny_llama, tiny_tokenizer, "kv4", prose, 128, 256)
    assert row["kl"] < 1e-6
    (row,) = fidelity(tiny_llama, tiny_tokenizer, "kv4:ring=64", prose, 256, 256)
    assert row["kl"] > 1e-6


def test_input_embeddings_that_are_output_ones_too(tiny_llama, tiny_tokenizer, prose, tmp_path):
    model = copy.deepcopy(tiny_llama)
    model.config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    with pytest.raises(RecipeError, match="embed=8 alone would make a second copy"):
        fidelity(model, tiny_tokenizer, "w8:embed=8", prose, 64, 64)


def test_options_that_stand_twice_and_small_pages():
    with pytest.raises(RecipeError, match="option 'ring' stands twice in recipe 'kv4:ring=64,ring=32'"):
        parse_recipe("kv4:ring=64,ring=32")
    assert parse_recipe("kv4:page=16").kv.rewind == 16 and parse_recipe("kv4:page=128").kv.rewind == 32
    with pytest.raises(RecipeError, match="rewind=17"):
        parse_recipe("kv4:page=16,rewind=17")
