"""benchmarks/cpu_model.py looks into the native module's calls: that it still finds them."""

import importlib.util
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from turboquant.kernels.cpu import cache as cpu

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cpu_model.py"


def test_encoding_has_a_part_of_a_prompts_time():
    assert cpu._native is not None, "the native module, whose calls are timed, is not built"
    spec = importlib.util.spec_from_file_location("cpu_model", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, head_dim=16, **sizes)).eval()
    native = cpu._native
    whole, encode = module.prefill_rows(model, 130, 1, "kv4")
    assert cpu._native is native
    assert 0 < encode["ms"] < whole["ms"] and whole["cache_bytes"] > 0
