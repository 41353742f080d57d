"""Real keys, values and queries, see tests/data/README.md."""

from pathlib import Path

import pytest
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def real():
    """{"qwen_a.k": (1, tokens, head_dim) fp32, ...}"""
    data = load_file(Path(__file__).parents[1] / "data" / "qkv.safetensors")
    return {name: t.float() for name, t in data.items()}
