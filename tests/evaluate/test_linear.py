"""Instruments for linear layers: fidelity, baselines, what enters the layers, speed, quantizing into a folder."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.evaluate import EvaluateError, fidelity, quantizing
from turboquant.evaluate.inputs import linear_inputs
from turboquant.evaluate.linear import (
    LINEAR_BASELINES,
    check_folder,
    collect_moments,
    linear_bits,
    linear_scheme,
    stored_note,
)
from turboquant.evaluate.models import load
from turboquant.evaluate.quantizing import by_kind, quantize
from turboquant.evaluate.speed import bench
from turboquant.layers.convert import Quantized
from turboquant.layers.linear import QuantLinear
from turboquant.layers.moments import DAMPING, FeedbackError, moments_of, moments_without_data, own_words
from turboquant.recipe import RecipeError, parse_recipe

NAMES = ["a8", "a4", "w8", "w4", "w8a8", "w8a8kv4", "w4a4kv4", "w8a8:head=8", *LINEAR_BASELINES]


@pytest.fixture(scope="module")
def rows(tiny_llama, tiny_tokenizer, prose):
    return {r["recipe"]: r for r in fidelity(tiny_llama, tiny_tokenizer, NAMES, prose, 256, 512, name="tiny")}


def test_every_scheme_costs_something_and_more_with_fewer_bits(rows):
    assert list(rows) == NAMES and all(r["kl"] > 0 and r["kl_se"] > 0 for r in rows.values())
    order = [("a8", "a4"), ("w8", "w4"), ("w8a8", "w8a8kv4"), ("w8a8kv4", "w4a4kv4"), ("a8-token", "a4-token")]
    for less, more in (*order, ("w8", "nf4"), ("w8a8", "w8a8:head=8")):
        assert rows[less]["kl"] < rows[more]["kl"], (less, more)


def test_bits_and_kernels(rows):
    assert rows["w8"]["weight_bits"] == pytest.approx(8 + 24 / 64, abs=0.4) and rows["w8"]["activation_bits"] == 32
    assert 8 < rows["a8"]["activation_bits"] < 9 and rows["a8"]["weight_bits"] == 32
    assert rows["w8a8kv4"]["key_bits"] < 6 and rows["w8a8"]["key_bits"] == 32
    assert rows["nf4"]["kernel"] == "fake-quant" and rows["w8a8"]["kernel"] == rows["w8a8kv4"]["linear_kernel"]


def test_bits_count_embeddings_that_are_packed(tiny_llama):
    """In 4 bit the layers, in 8 bit the embeddings: 97 rows of 64 at either end, groups of 64 in both."""
    with linear_scheme(tiny_llama, parse_recipe("w4a8:head=8,embed=8")):
        found = linear_bits(tiny_llama, parse_recipe("w4a8:head=8,embed=8"))
        slots = [s for m in tiny_llama.modules() if isinstance(m, Quantized) for s in m.slots.values()]
        numbers = sum(s.shape[0] * s.shape[1] for s in slots)
        assert found["weight_bits"] == pytest.approx(8 * sum(s.packed().nbytes for s in slots) / numbers)
        assert len(slots) == 2 * 7 + 2 and found["activation_bits"] < 9


def test_the_model_is_itself_again(rows, tiny_llama):
    assert not any(isinstance(m, QuantLinear) for m in tiny_llama.modules())
    assert not any(m._forward_pre_hooks for m in tiny_llama.modules())


@pytest.mark.parametrize("name", LINEAR_BASELINES)
def test_baselines_by_hand(name):
    b, x = LINEAR_BASELINES[name], torch.randn(30, 128)
    for function, bits in ((b.weight, b.weight_bits), (b.activation, b.activation_bits)):
        if function is None:
            continue
        y = function(x)
        assert y.shape == x.shape and 3.9 < bits(128) < 9
        levels = max(len(row.unique()) for row in y[:, :32])
        assert levels <= 2 ** int(bits(128))
        large = (y - x).norm() / x.norm()
        assert (0.001 if bits(128) > 8 else 0.03) < large < (0.02 if bits(128) > 8 else 0.3)


def test_llm_int8_keeps_large_channels():
    x = torch.randn(20, 64)
    x[3, 7] = 50.0
    y = LINEAR_BASELINES["llm-int8"].activation(x)
    assert torch.equal(y[:, 7], x[:, 7]) and not torch.equal(y[:, 8], x[:, 8])


def test_baselines_refuse_stacks_of_experts():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 8, 4)), nn.Parameter(torch.ones(2, 4, 4))

    with pytest.raises(ValueError, match="stacks of experts"), linear_scheme(Model(), LINEAR_BASELINES["nf4"]):
        pass


def test_error_feedback_is_marked_in_the_rows(tiny_llama, tiny_tokenizer, prose):
    moments = collect_moments(tiny_llama, tiny_tokenizer, prose[20_000:], 1024)
    assert len(moments) == 2 * 7 and moments["model.layers.0.mlp.down_proj"].shape == (96, 96)
    x = moments["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(x, x.T)
    assert x.diagonal().mean() == pytest.approx(1 + DAMPING, abs=0.05), "behind a norm"
    (row,) = fidelity(tiny_llama, tiny_tokenizer, ["w4"], prose, 256, 512, moments=moments)
    assert row["recipe"] == "w4+feedback" and row["kl"] > 0


def test_a_text_gives_the_tokens_that_it_holds(tiny_llama, tiny_tokenizer, prose):
    """Fewer than a layer has inputs, or than were asked for, are refused."""
    said: list = []
    keep = lambda *what: said.append(what)  # noqa: E731
    found = collect_moments(tiny_llama, tiny_tokenizer, prose[:4000], ctx=64, progress=keep)
    assert len(found) == 2 * 7 and 128 < said[-1][2] < 4096
    with pytest.raises(FeedbackError, match=r"64 tokens do not span the 128 inputs of .*o_proj"):
        collect_moments(tiny_llama, tiny_tokenizer, prose[:120], ctx=64)
    with pytest.raises(EvaluateError, match="tokens=4096 needs"):
        collect_moments(tiny_llama, tiny_tokenizer, prose[:4000], 4096, 64)


def test_what_is_stored_quantized_is_not_quantized_again(tiny_folder, tiny_tokenizer, tmp_path, prose):
    folder = tmp_path / "packed"
    quantize(str(tiny_folder), folder, "w4a8kv4", overrides={"down_proj": "w8a8"}, dtype="float32")
    with pytest.raises(EvaluateError, match="quantized already"):
        quantize(str(folder), tmp_path / "again", "w8a8")
    assert not (tmp_path / "again").exists()
    with pytest.raises(EvaluateError, match="packs no weight"):
        quantize(str(tiny_folder), tmp_path / "none", "w4", overrides={".": "none"}, dtype="float32")
    assert not (tmp_path / "none").exists()
    model, _ = load(folder, "float32")
    for recipe in ("w8a8", "nf4"):
        with pytest.raises(EvaluateError, match="stored as 'w4a8kv4'"):
            fidelity(model, tiny_tokenizer, [recipe], prose, 256, 512)
    same = fidelity(model, tiny_tokenizer, ["w4a8", "kv4"], prose, 256, 512)
    assert same[0]["kl"] == 0 and same[1]["kl"] > 0
    assert "The linear layers are stored as 'w4a8kv4'" in stored_note(model)
    quantize(str(tiny_folder), tmp_path / "some", "w4", overrides={"mlp": "none"}, dtype="float32")
    assert "The linear layers (8 of them; 6 are as they were)" in stored_note(load(tmp_path / "some", "float32")[0])


def test_commands_refuse_a_folder_before_they_load_it(tiny_folder, tmp_path, monkeypatch):
    quantize(tiny_folder, tmp_path / "q", "w4a8kv4", dtype="float32")
    quantize(tiny_folder, tmp_path / "some", "w4a8", overrides={"mlp": "none"}, dtype="float32")
    monkeypatch.setattr("turboquant.evaluate.models.load", lambda *a: pytest.fail("loaded"))
    for command, *rest in (["bench", "-r", "w8"], ["generate", "Hello.", "-r", "w8a8kv4"], ["eval", "-r", "nf4"]):
        done = run(command, tmp_path / "q", *rest)
        assert done.exit_code == 2 and "are stored as 'w4a8kv4' and cannot be quantized again" in done.stderr
    assert "are stored as 'w4a8'" in run("bench", tmp_path / "some", "-r", "w4").stderr
    for recipe in ("kv4", "w4a8", "w4a8kv4:ring=64"):
        check_folder(tmp_path / "q", [parse_recipe(recipe)])
    check_folder(tiny_folder, [parse_recipe("w8")])


def test_an_override_may_have_options(tiny_folder, tmp_path):
    args = ["quantize", str(tiny_folder), str(tmp_path / "out"), "--recipe", "w4a8", "-q", "--dtype", "float32"]
    done = CliRunner().invoke(app, [*args, "--override", "down_proj=w4a8:group=32", "--json", "-"])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["overrides"] == {"down_proj": "w4a8:group=32"}


def test_an_override_that_decides_nothing_is_one_line(tiny_folder, tmp_path):
    """In a process of its own: pytest takes warnings away before they are shown."""
    code = f"from turboquant.cli import app; app(['quantize', {str(tiny_folder)!r}, {str(tmp_path / 'q')!r}, '-q', "
    code += "'--dtype', 'float32', '--override', 'lm_head=w8'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "decides nothing" in x]
    assert line.startswith("warning: the override 'lm_head' decides nothing: it names") and line.endswith("head=8")
    assert "UserWarning" not in done.stderr and "warnings.warn" not in done.stderr


def test_unknown_recipe_lists_the_baselines(tiny_llama, tiny_tokenizer, prose):
    with pytest.raises(RecipeError, match=r"nf4.*llm-int8"):
        fidelity(tiny_llama, tiny_tokenizer, ["w5"], prose, 256, 256)
    with pytest.raises(RecipeError, match="quantizes nothing"):
        fidelity(tiny_llama, tiny_tokenizer, [parse_recipe("kv4").__class__()], prose, 256, 256)


def test_inputs_of_each_layer(tiny_llama, tiny_tokenizer, prose):
    found = linear_inputs(tiny_llama, tiny_tokenizer, prose, ["kv4", "w8a8", "w4a4"], 256)
    assert len(found) == 2 * 2 * 7 and {r["recipe"] for r in found} == {"w8a8", "w4a4"}
    for a, b in zip(found[::2], found[1::2], strict=True):
        assert a["layer"] == b["layer"] and a["spread"] == b["spread"] >= 1 and a["peak"] > 1
        assert a["output_error"] < b["output_error"] and a["weight_error"] < b["weight_error"]
        assert a["hot"] is None and len(b["hot"]) == tiny_llama.get_submodule(a["layer"]).in_features // 16
    assert linear_inputs(tiny_llama, tiny_tokenizer, prose, ["kv4"], 256) == []


def test_bench_counts_bytes(tiny_llama):
    rows = bench(tiny_llama, ["w4a8kv4:page=16,ring=16,rewind=16", "w8"], prompt=64, new=3, repeats=1)
    base, packed, eight = rows
    assert base["recipe"] == "base" and base["decode_speedup"] == base["moved_share"] == 1
    numbers = sum(p.numel() for p in tiny_llama.parameters())
    assert base["weight_bytes"] >= 4 * numbers
    linear = sum(m.weight.numel() for m in tiny_llama.model.modules() if isinstance(m, nn.Linear))
    saved = base["weight_bytes"] - packed["weight_bytes"]
    assert saved == pytest.approx(linear * (4 - 4.5 / 8), rel=0.02)
    assert packed["weight_bytes"] < eight["weight_bytes"] and packed["cache_bytes"] < base["cache_bytes"] * 2
    embedding = tiny_llama.model.embed_tokens.weight.nbytes
    assert base["moved_bytes"] == base["weight_bytes"] + base["cache_bytes"] - embedding
    assert all(r["prefill_tokens_per_second"] > 0 and r["decode_tokens_per_second"] > 0 for r in rows)
    with pytest.raises(EvaluateError, match="new=0"):
        bench(tiny_llama, ["w4"], new=0)
    with pytest.raises(EvaluateError, match="only recipes"):
        bench(tiny_llama, ["nf4"])


def test_quantize_writes_a_folder_that_loads(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    rows, summary = quantize(tiny_folder, tmp_path / "q", "w4a8kv4", overrides={"down_proj": "w8a8"}, dtype="float32")
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "q").iterdir()}
    assert set(modes.values()) == {0o644} and "model.safetensors" in modes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(layers) == {r["name"] for r in rows} and summary["weights"] == len(rows) == 14
    assert summary["packed_bytes"] == sum(b.nbytes for m in layers.values() for b in m.buffers())
    assert summary["packed_bytes"] < summary["packed_before"] / 5 and summary["model_bytes"] < summary["model_before"]
    assert summary["folder_bytes"] >= summary["model_bytes"] and 0.02 < summary["error"] < 0.2
    assert layers["model.layers.0.mlp.down_proj"].recipe.name == "w8a8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"], "nothing is left beside it"


def test_a_tied_weight_counts_once(tmp_path, tiny_llama, tiny_tokenizer):
    model = copy.deepcopy(tiny_llama)
    model.config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    rows, summary = quantize(tmp_path / "tied", tmp_path / "q", "w8:head=8,embed=8", dtype="float32")
    before = {r["name"]: r["bytes_before"] for r in rows}
    assert before["model.embed_tokens"] == 97 * 64 * 4 and before["lm_head"] == 0
    assert summary["packed_before"] == sum(before.values()) <= summary["model_before"]


def test_a_fresh_process_loads_the_folder(tiny_folder, tmp_path):
    """Nothing has registered the method there but what loads models."""
    quantize(tiny_folder, tmp_path / "q", "w4a8", dtype="float32")
    code = f"from turboquant.evaluate.models import load; print(load({str(tmp_path / 'q')!r}, 'float32', 'cpu')[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "QuantLinear" in done.stdout


def test_a_folder_is_compared_with_itself_and_says_so(tiny_folder, tmp_path):
    """What `bench` and `eval` call base has the folder's weights, but a 16-bit cache."""
    quantize(tiny_folder, tmp_path / "q", "w4a8kv4:page=16,ring=16,rewind=16", dtype="float32", device="cpu")
    options = ["--prompt", 64, "--new", 2, "--repeats", 1, "--device", "cpu", "-q", "--json", "-"]
    done = run("bench", tmp_path / "q", "-r", "w4a8kv4:page=16,ring=16,rewind=16", *options)
    assert done.exit_code == 0, done.output
    base, row = json.loads(done.stdout)
    assert base["cache_kernel"] == "transformers" != row["cache_kernel"] and base["cache_bytes"] != row["cache_bytes"]
    assert base["weight_bytes"] == row["weight_bytes"] and "only the cache differs" in " ".join(done.stderr.split())
    done = run("bench", tiny_folder, "-r", "kv4", *options)
    assert "only the cache" not in " ".join(done.stderr.split())


def test_weights_add_up_by_kind():
    one = {"recipe": "w4", "shape": (8, 8), "bits": 4.5, "bytes": 36, "bytes_before": 128, "error": 0.3}
    rows = [one | {"name": "l.0.q_proj"}, one | {"name": "l.1.q_proj", "error": 0.4}, one | {"name": "l.0.up"},
            one | {"name": "l.2.q_proj", "recipe": "none", "bits": None, "error": None}]  # fmt: skip
    kinds = by_kind(rows)
    assert [(k["kind"], k["weights"], k["bytes"]) for k in kinds] == [
        ("q_proj", 2, 72),
        ("up", 1, 36),
        ("q_proj", 1, 36),
    ]
    assert kinds[0]["error"] == pytest.approx(0.125**0.5) and kinds[2]["error"] is None


def test_quantize_refuses_before_any_work(tiny_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for out, recipe, words in (
        ("full", "w4", "not an empty folder"),
        ("no/q", "w4", "no folder"),
        ("q", "a8", "leaves the weights alone"),
    ):
        with pytest.raises(EvaluateError, match=words):
            quantize(tiny_folder, tmp_path / out, recipe)
    assert not (tmp_path / "q").exists()


def test_quantize_refuses_names_before_the_model_says_anything(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "feedback_moments", lambda *a: pytest.fail("minutes for nothing"))
    for wrong in ({"keep": ["no_proj"]}, {"overrides": {"no_proj": "w8"}}):
        with pytest.raises(RecipeError, match="no_proj"):
            quantize(tiny_folder, tmp_path / "q", "w4a8", feedback="self", **wrong)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_commands(tiny_folder, tmp_path, prose):
    book = tmp_path / "book.txt"
    book.write_text(prose[:20_000])
    options = ["--keep", "up_proj", "--override", "o_proj=w4a8", "--dtype", "float32", "--device", "cpu", "-q"]
    options = [tiny_folder, tmp_path / "q", *options, "--json", tmp_path / "q.json"]
    done = run("quantize", *options, "-r", "w8a8", "--feedback", "itself")
    assert done.exit_code == 2 and "no such file; give a text, 'self', 'self:FILE' or 'random'" in done.stderr
    done = run("quantize", *options, "-r", "w8a8")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["summary"]["weights"] == 12 and {r["recipe"] for r in found["weights"]} == {"w8a8", "w4a8"}
    assert "bits/weight" in done.output and "q_proj" in done.output and "layers.0" not in done.output
    done = run("quantize", tiny_folder, tmp_path / "all", "-r", "w8a8", "--layers", "--dtype", "float32", "-q")
    assert done.exit_code == 0 and "layers.0" in done.output
    done = run("bench", tiny_folder, "-r", "w4a8", "--prompt", 16, "--new", 2, "--repeats", 1, "--dtype", "float32",
               "--device", "cpu", "-q", "--json", "-", "--png", tmp_path / "b.png")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [r["recipe"] for r in json.loads(done.stdout)] == ["base", "w4a8"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    done = run("inspect", tiny_folder, "--text", book, "--tokens", 256, "-r", "w4a8kv4", "-q", "--json", "-")
    assert done.exit_code == 0 and len(json.loads(done.stdout)["linear"]) == 14
    done = run("generate", tiny_folder, "Hello there.", "-r", "w8a8", "--max-new-tokens", 3, "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["new_tokens"] == 3 and json.loads(done.stdout)["pages_bytes"] == 0
    assert "w8a8 leaves it alone" in done.stderr and "0.00 packed" not in done.stderr


def test_generate_takes_the_recipe_of_the_folder(tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "q", "w8a8kv4:ring=64", dtype="float32", device="cpu")
    done = run("generate", tmp_path / "q", "Hello there.", "--max-new-tokens", 3, "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"] == "w8a8kv4:ring=64"
    assert "recipe w8a8kv4:ring=64, as the folder was written" in done.stderr
    done = run("generate", tmp_path / "q", "Hello there.", "-r", "kv4", "--max-new-tokens", 3, "--json", "-")
    assert json.loads(done.stdout)["recipe"] == "kv4" and "as the folder" not in done.stderr
    done = run("generate", tiny_folder, "Hello there.", "--max-new-tokens", 3, "--json", "-")
    assert json.loads(done.stdout)["recipe"] == "kv4" and "as the folder" not in done.stderr


def test_second_moments_without_a_text(tiny_llama, tmp_path, tiny_folder):
    """Of random tokens, or of what the model says: the same every time, and no other random number moves."""
    state = torch.get_rng_state()
    for make in (lambda m: moments_without_data(m, "random"), lambda m: moments_of(m, own_words(m, 256, 32))):
        one, two = make(tiny_llama), make(tiny_llama)
        assert set(one) == {n for n, m in tiny_llama.named_modules() if type(m) is nn.Linear and n != "lm_head"}
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert all((torch.linalg.eigvalsh(m) > -1e-4 * m.diagonal().max()).all() for m in one.values())
    assert torch.equal(torch.get_rng_state(), state)
    plain, fed = (
        quantize(tiny_folder, tmp_path / str(f), "w4a8", feedback=f, device="cpu")[0] for f in (None, "random")
    )
    assert all(a["error"] <= b["error"] for a, b in zip(plain, fed, strict=True)), (
        "feedback serves outputs, not weights"
    )
    assert any(a["error"] < b["error"] for a, b in zip(plain, fed, strict=True))


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_hushes_the_bars_of_loading(quiet):
    """transformers draws them with tqdm, while it reads a GGUF file for one."""
    draw = "from transformers.utils.logging import tqdm; from tqdm.auto import tqdm as t; [*t([1]), *tqdm([1])]"
    code = f"from turboquant.cli import app\ntry: app(['bench', 'x', *{['-q'] * quiet}])\nexcept SystemExit: {draw}"
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=env)
    assert ("1/1" in done.stderr) != quiet, done.stderr
