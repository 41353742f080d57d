"""A whole model with quantized linear layers on the CPU: bf16, recipes and llama.cpp (Q4_0), in one run.

    python benchmarks/cpu_linear.py MODEL --recipe w4a8kv4 --recipe w4a8kv4:head=8 --threads 2 --json out.json \
        --llama model.gguf [--llama-python ENV/bin/python]

Prefill and decode tokens/s, medians; contestants one after another, each alone in memory. The GGUF file is requantized
to Q4_0 in a temporary folder. `--llama-python` names an interpreter that has llama-cpp-python, where this one has not.
Without `--clip` recipes get clip=0, which changes no speed and saves minutes of search. `--folders DIR` keeps what was
quantized, so that a second run measures without quantizing.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LLAMA = """
import ctypes, json, statistics, sys, time
import llama_cpp as L
source, folder, prompt, new, threads, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
p = L.llama_model_quantize_default_params()
p.ftype, p.allow_requantize, p.nthread = L.LLAMA_FTYPE_MOSTLY_Q4_0, True, threads
target = folder + "/q4_0.gguf"
if L.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(p)):
    sys.exit("llama.cpp could not requantize")
llm = L.Llama(target, n_ctx=prompt + new + 8, n_threads=threads, n_threads_batch=threads, n_batch=prompt,
              n_ubatch=min(prompt, 512), verbose=False)
ids, read, step = [100 + i % 1000 for i in range(prompt)], [], []
for i in range(rounds + 1):
    llm.reset()
    a = time.perf_counter()
    llm.eval(ids)
    b = time.perf_counter()
    for _ in range(new):
        llm.eval([11])
    c = time.perf_counter()
    if i:
        read.append(b - a), step.append((c - b) / new)
print(json.dumps([statistics.median(read), statistics.median(step)]))
"""


def ours(
    model: str, recipe: str, prompt: int, new: int, rounds: int, folders: Path | None
) -> tuple[float, float, int, str]:
    """Seconds of the prompt and of a step, bytes of the weights, the kernel."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from turboquant import TurboQuantCache, TurboQuantConfig
    from turboquant.evaluate.fidelity import linear_kernels

    more: dict[str, Any] = {} if recipe == "bf16" else {"quantization_config": TurboQuantConfig(recipe)}
    kept = folders / re.sub("[^a-z0-9]+", "-", recipe) if folders and more else None
    if kept and kept.exists():
        model, more = str(kept), {}
    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **more).eval()
    if kept and more:
        net.save_pretrained(kept)
    ids = torch.randint(0, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    read, step = [], []
    for i in range(rounds + 1):
        cache: Any = TurboQuantCache(net, recipe) if "kv" in recipe else DynamicCache(config=net.config)
        a = time.perf_counter()
        token = net(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        b = time.perf_counter()
        for _ in range(new):
            token = net(token, past_key_values=cache).logits.argmax(-1)
        if i:
            read.append(b - a), step.append((time.perf_counter() - b) / new)
    size = sum({t.data_ptr(): t.nbytes for t in (*net.parameters(), *net.buffers())}.values())
    kernel = "torch" if recipe == "bf16" else linear_kernels(net, torch.device("cpu"))
    return statistics.median(read), statistics.median(step), size, kernel


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="hub name or folder")
    p.add_argument("--recipe", action="append", help="several times for more")
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--new", type=int, default=24)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--clip", action="store_true", help="search the range of each group, as recipes do by default")
    p.add_argument("--folders", type=Path, metavar="DIR")
    p.add_argument("--llama", metavar="GGUF")
    p.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    p.add_argument("--json", type=Path, metavar="OUT")
    a = p.parse_args()

    import torch

    torch.set_num_threads(a.threads)
    rows: list[dict[str, Any]] = []

    def add(name: str, read: float, step: float, **more: Any) -> None:
        r = {"model": name, "prompt": a.prompt, "threads": a.threads, "prefill": a.prompt / read, "decode": 1 / step}
        base = rows[0] if rows else r
        times = [round(r[k] / base[k], 3) for k in ("prefill", "decode")]
        rows.append(r | {"times_bf16": times} | more)
        print(f"{name}: prefill {r['prefill']:.0f}, decode {r['decode']:.1f} tokens/s, {times} times bf16", flush=True)

    with torch.no_grad():
        for recipe in ["bf16", *(a.recipe or ["w4a8kv4"])]:
            asked = recipe if a.clip or recipe == "bf16" else recipe + ("," if ":" in recipe else ":") + "clip=0"
            read, step, size, kernel = ours(a.model, asked, a.prompt, a.new, a.rounds, a.folders)
            add(recipe, read, step, weight_bytes=size, kernel=kernel)
    if a.llama:
        with tempfile.TemporaryDirectory() as folder:
            args = [a.llama, folder, *map(str, (a.prompt, a.new, a.threads, a.rounds))]
            done = subprocess.run([a.llama_python, "-c", LLAMA, *args], stdout=subprocess.PIPE, check=True)
            read, step = json.loads(done.stdout.splitlines()[-1])
            add(
                "llama.cpp Q4_0",
                read,
                step,
                weight_bytes=(Path(folder) / "q4_0.gguf").stat().st_size,
                kernel="llama.cpp",
            )
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
