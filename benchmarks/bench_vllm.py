"""Decoding inside vLLM on a GPU: our cache against vLLM's own, a Llama-3-8B-shaped model with made-up weights.

    python benchmarks/bench_vllm.py --cache auto --cache fp8 --cache turboquant_4bit_nc --cache kv4 --json out.json
    python benchmarks/bench_vllm.py --tiny --cache kv4          # a toy: that the script runs; times mean nothing

`--cache` is a --kv-cache-dtype of vLLM or a recipe of ours (with linear layers, if it names any); each runs in a
process of its own. Prompts are random tokens, all different. A step is timed once every request has its first token;
tokens/s are those of the median step. `blocks` and `capacity` are what vLLM makes of the memory that it is given.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

quiet = contextlib.nullcontext  # around the timed steps
VLLM = ("auto", "fp8", "turboquant_4bit_nc")
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024}


def settings(cache: str, model: str, shapes: list[tuple[int, int]], args: argparse.Namespace) -> dict[str, Any]:
    """What LLM() is called with."""
    graph = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted({b for b, _ in shapes})}
    out: dict[str, Any] = {
        "model": model, "load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": max(b for b, _ in shapes),
        "max_model_len": max(n for _, n in shapes) + args.tokens + 8, "gpu_memory_utilization": args.memory,
        "compilation_config": {"mode": args.compile, **graph}, "disable_log_stats": False,
        "tensor_parallel_size": args.tensor_parallel,
    }  # fmt: skip
    if args.tensor_parallel > 1:
        out["distributed_executor_backend"] = args.backend
    if args.cache_gib:
        out |= {"kv_cache_memory_bytes": int(args.cache_gib * 2**30), "gpu_memory_utilization": 0.2}
    if args.eager:
        out |= {"enforce_eager": True}
        out.pop("compilation_config")
    if cache in VLLM:
        return out | {"kv_cache_dtype": cache}
    config = {"quant_method": "turboquant", "recipe": cache}
    return out | {"quantization": "turboquant", "hf_overrides": {"quantization_config": config}}


def decode(llm: Any, batch: int, length: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Times of one shape."""
    import torch
    from vllm import SamplingParams

    make = torch.Generator().manual_seed(batch)
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i in range(batch):
        prompt = torch.randint(vocabulary, (length,), generator=make).tolist()
        engine.add_request(f"{batch}x{length}-{i}", {"prompt_token_ids": prompt}, params)
    seen: dict[str, int] = {}

    def step() -> float:
        at = time.perf_counter()
        for out in engine.step():
            seen[out.request_id] = len(out.outputs[0].token_ids)
        return time.perf_counter() - at

    first, steps = 0.0, []
    while len(seen) < batch:
        first += step()
    with quiet():
        while max(seen.values()) < tokens:
            before = sum(seen.values())
            took = step()
            if sum(seen.values()) - before == batch:
                steps.append(took)
    while engine.has_unfinished_requests():
        step()
    if len(steps) < 8:
        raise SystemExit(f"only {len(steps)} steps of all {batch} requests: too little memory for them at a time?")
    median = statistics.median(steps)
    row = {"shape": f"{batch}x{length}", "step_ms": 1e3 * median, "tokens_s": batch / median, "steps": len(steps)}
    return row | {"prefill_s": first, "prompt_tokens_s": batch * length / first}


def run(args: argparse.Namespace) -> None:
    """One cache, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import vllm
    import vllm.platforms

    [cache], config = args.cache, LLAMA3_8B | (TINY if args.tiny else {})
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = vllm.LLM(**settings(cache, folder, shapes, args))
    ready, made = time.perf_counter() - begin, llm.llm_engine.vllm_config
    row = {
        "cache": cache, "device": vllm.platforms.current_platform.get_device_name(), "vllm": vllm.__version__,
        "torch": torch.__version__, "graphs": str(made.compilation_config.cudagraph_mode), "start_s": ready,
        "blocks": made.cache_config.num_gpu_blocks, "capacity": made.cache_config.kv_cache_size_tokens,
        "ranks": args.tensor_parallel, "backend": args.backend if args.tensor_parallel > 1 else None,
    }  # fmt: skip
    for batch, length in shapes:
        decode(llm, batch, min(length, 256), 16, config["vocab_size"])  # what is compiled at first use
        print("ROW " + json.dumps(row | decode(llm, batch, length, args.tokens, config["vocab_size"])), flush=True)
    if args.tensor_parallel > 1 and args.backend == "ray":
        import ray

        ray.shutdown()  # with what it has started
    sys.stdout.flush()
    os._exit(0)  # an engine takes its time to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", action="append", required=True)
    parser.add_argument("--shape", action="append", help="BATCHxTOKENS; 8x32768 and 64x4096")
    parser.add_argument("--tokens", type=int, default=96, help="each request writes")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--cache-gib", type=float, help="of the cache, instead of --memory")
    parser.add_argument("--compile", type=int, default=0, help="vLLM's compilation mode, 3 for its default")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks, a GPU each")
    parser.add_argument("--backend", choices=("mp", "ray"), default="mp", help="what starts the ranks")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or (["4x100"] if args.tiny else ["8x32768", "64x4096"])
    if args.one:
        return run(args)
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit('vLLM is not installed: pip install "turboquant[vllm]"')
    rows, failed = [], []
    for cache in args.cache:
        command = [sys.executable, __file__, "--one", "--cache", cache, "--tokens", str(args.tokens)]
        command += [x for s in args.shape for x in ("--shape", s)] + ["--tiny"] * args.tiny + ["--eager"] * args.eager
        command += ["--memory", str(args.memory), "--compile", str(args.compile)]
        command += ["--tensor-parallel", str(args.tensor_parallel), "--backend", args.backend]
        command += ["--cache-gib", str(args.cache_gib)] if args.cache_gib else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            if line.startswith("ROW "):
                rows.append(json.loads(line[4:]))
                print(json.dumps(rows[-1]), flush=True)
        if process.wait():
            failed.append(f"{cache} ({process.returncode})")
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed, with exit status: {', '.join(failed)}")


if __name__ == "__main__":
    main()
