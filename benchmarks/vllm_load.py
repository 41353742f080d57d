"""Memory while vLLM loads a bf16 checkpoint: peak of a process' own memory (RssAnon), for two depths of one random
model, each in a process of its own, which cancels what else is in it.

The difference is what a layer takes at the peak. Quantized while loading, that must be its packed bytes: of one layer
at a time the 16-bit weight exists. `python benchmarks/vllm_load.py [--recipe w4a8] [--layers 24]`; vLLM for CPUs.
"""

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FEW = 2  # layers of the smaller model
SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 4}


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """Within the context, `bytes` is the most memory above that at its start."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.bytes, self.start, self.on = 0, own_memory(), True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.on:
            self.bytes = max(self.bytes, own_memory() - self.start)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.on = False
        self.thread.join()


def checkpoint(folder: Path, layers: int) -> tuple[str, int]:
    """A random Llama in bf16 and the numbers of its linear layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, head_dim=128, **SIZES))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.save_pretrained(folder / str(layers))
    return str(folder / str(layers)), sum(p.numel() for n, p in model.named_parameters() if "proj" in n)


def load(model: str, recipe: str) -> tuple[int, int]:
    """(bytes at the peak, bytes of packed weights) of one engine; recipe "plain" for vLLM alone."""
    from vllm import LLM

    config = {} if recipe == "plain" else {"quantization_config": {"quant_method": "turboquant", "recipe": recipe}}
    small = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 2}
    with Peak() as peak:
        llm = LLM(model, enforce_eager=True, skip_tokenizer_init=True, dtype="bfloat16", hf_overrides=config, **small)
    return peak.bytes, llm.apply_model(packed_bytes)[0]


def packed_bytes(model: object) -> int:
    """Bytes of the packed weights of a model."""
    methods = {id(m.quant_method): m.quant_method for m in model.modules() if hasattr(m, "quant_method")}  # type: ignore[attr-defined]
    return sum(s.packed().nbytes for m in methods.values() for s in getattr(m, "slots", []) if s.recipe.weights)


def measured(model: str, recipe: str) -> tuple[int, int]:
    """`load` in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--one", model, recipe], capture_output=True, text=True, check=True)
    peak, packed = out.stdout.split("RESULT")[1].split()
    return int(peak), int(packed)


def main() -> None:
    """Print one row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", action="append", help="several times; default: w4a8, w8a8")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if given.one:
        print("RESULT", *load(*given.one))
        return
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit('vLLM is not installed: pip install "turboquant[vllm]"')
    with tempfile.TemporaryDirectory() as folder:
        few, many = (checkpoint(Path(folder), n) for n in (FEW, given.layers))
        more = (given.layers - FEW) * 2**20
        print(f"a layer in bf16: {(many[1] - few[1]) * 2 / more:.1f} MiB")
        for recipe in ("plain", *(given.recipe or ["w4a8", "w8a8"])):
            one, two = (measured(m, recipe) for m, _ in (few, many))
            print(
                f"{recipe}: packed {(two[1] - one[1]) / more:.1f} MiB a layer; at the peak of loading "
                f"{(two[0] - one[0]) / more:.1f} ({one[0] / 2**20:.0f} -> {two[0] / 2**20:.0f} MiB)", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
