"""Importing does nothing, names resolve, and imports go downwards only; tried in fresh processes."""

import hashlib
import subprocess
import sys
import textwrap
from importlib import resources
from pathlib import Path

import pytest

import turboquant

ROOT = Path(__file__).resolve().parents[1]
CORE = [f"turboquant.{name}" for name in ("recipe", "maths", "packed", "kernels", "layers")]


def run_fresh(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "importing printed something"


def test_import_turboquant_loads_no_framework():
    run_fresh("""
        import sys
        import turboquant
        assert turboquant.__version__
        assert set(turboquant.__all__) == set(dir(turboquant))
        heavy = {"torch", "transformers", "triton", "vllm", "numpy", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_recipe_needs_no_framework():
    run_fresh("""
        import sys
        import turboquant
        turboquant.parse_recipe("kv4")
        heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """)


@pytest.mark.parametrize("name", sorted(turboquant.__all__))
def test_public_name_resolves(name):
    value = getattr(turboquant, name)
    assert isinstance(value, str) if name == "__version__" else callable(value)
    assert getattr(turboquant, name) is value


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = turboquant.no_such_name


@pytest.mark.parametrize("module", CORE)
def test_core_loads_no_engine_and_asks_nothing_of_cuda(module):
    """Everything below the integrations imports without transformers or vllm and without a CUDA query."""
    run_fresh(f"""
        import importlib, pkgutil, sys
        import torch
        import torch._dynamo  # torch.compiler.disable loads it, and with it Triton where torch brings one

        def refuse(*args, **kwargs):
            raise AssertionError("CUDA was asked at import")

        for query in ("init", "is_available", "device_count", "current_device", "get_device_capability",
                      "get_device_name", "get_device_properties", "current_stream"):
            setattr(torch.cuda, query, refuse)
        already = set(sys.modules)
        before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()

        module = importlib.import_module({module!r})
        for info in pkgutil.walk_packages(getattr(module, "__path__", ()), {module!r} + "."):
            if not info.name.startswith("turboquant.kernels.triton"):
                importlib.import_module(info.name)

        unwanted = {{"transformers", "vllm", "triton", "matplotlib", "cuda", "humming", "auto_round_kernel"}}
        loaded = unwanted & set(sys.modules) - already  # torch may have loaded some itself
        assert not loaded, loaded
        assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    """)


def test_import_contract():
    pytest.importorskip("importlinter")
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bundled_text_is_the_one_we_measure_with():
    folder = resources.files("turboquant") / "data"
    sha256 = hashlib.sha256((folder / "sotu.txt").read_bytes()).hexdigest()
    assert sha256 in (folder / "README.md").read_text(encoding="utf-8")
