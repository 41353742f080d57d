"""Whether vLLM writes the same tokens however it runs: several ranks, Ray, without graphs, with drafts, prefix hits.

    python benchmarks/vllm_same.py --cache auto --cache kv4 --way eager --way prefix --way ngram --way self
    python benchmarks/vllm_same.py --cache auto --cache kv4 --way tp=2 --way tp=2,ray --way pp=2,ray # 2 GPUs

A way is words with commas: tp=N and pp=N ranks (by multiprocessing, or `ray`, which also starts a single one), `nccl`
(no all-reduce of vLLM's own), `eager` (no CUDA graphs), `prefix` (prefix caching), `chunks` (steps of up to 512
tokens), `few=N` (N blocks, so that requests are preempted), `ngram` (n-gram drafts), `self` (the model, unpacked and
with vLLM's cache, drafts for itself), `draft` (a smaller one of other random weights drafts). `--cache` is a recipe,
with linear layers if it names any (packed once, so that all ranks hold the same weights), or auto for vLLM's own cache.
Each way is a process of its own, and each writes twice after the same prompts. All is compared with what one rank
writes the first time, with CUDA graphs, without prefix caching. The model is a small Llama with random weights in bf16,
whose logits lie close together, so another order of sums gives other tokens sooner or later: shown are the tokens up to
the first that differs in a request, how far the logprobs of these are apart and from which token on, and by how much
the first run preferred its own token.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BASE = "tp=1"
WORDS = ("ray", "nccl", "eager", "prefix", "chunks", "ngram", "self", "draft")  # and tp=, pp=, few=
DRAFTS = 3  # tokens a step
MODEL = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
         "initializer_range": 0.05, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


def make(folder: Path, recipe: str) -> Path:
    """A folder with the model, its weights packed if the recipe has any, beside what drafts for it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from turboquant import TurboQuantConfig
    from turboquant.recipe import parse_recipe

    plain = folder / "plain"
    if not plain.exists():
        for name, config in (("plain", MODEL), ("draft", MODEL | SMALL)):
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder / name)
    if recipe == "auto" or parse_recipe(recipe).weights is None:
        return plain
    packed = folder / recipe
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TurboQuantConfig(recipe)
    net = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.bfloat16, device_map=device
    )
    net.save_pretrained(packed)
    return packed


def prompts(count: int) -> list[list[int]]:
    """Of 40 to 1500 random tokens; in half of them a stretch returns, so that n-gram drafts find something."""
    import torch

    make = torch.Generator().manual_seed(1)
    lengths = torch.randint(40, 1500, (count,), generator=make).tolist()
    out = [torch.randint(3, MODEL["vocab_size"], (n,), generator=make).tolist() for n in lengths]
    return [ids if i % 2 else ids[: len(ids) // 2] + ids[: len(ids) - len(ids) // 2] for i, ids in enumerate(out)]


def words_of(way: str) -> dict[str, str]:
    """The words of a way, with what follows "=".

    Raises:
        SystemExit: one that is not known.
    """
    words = dict([*w.split("="), ""][:2] for w in way.split(","))
    for word, n in words.items():
        if not (n.isdecimal() if word in ("tp", "pp", "few") else word in WORDS and not n):
            raise SystemExit(f"--way {way}: {word!r} is not one of tp=N, pp=N, few=N, {', '.join(WORDS)}")
    return words


def settings(job: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """What LLM() is called with."""
    words = words_of(job["way"])
    ranks = {k: int(words.get(k, 1)) for k in ("tp", "pp")}
    out: dict[str, Any] = {
        "model": job["model"], "skip_tokenizer_init": True, "dtype": job["dtype"], "max_model_len": 2048, "seed": 0,
        "kv_cache_memory_bytes": job["cache_mib"] << 20, "max_num_seqs": 16, "disable_log_stats": False,
        "tensor_parallel_size": ranks["tp"], "pipeline_parallel_size": ranks["pp"],
        "enable_prefix_caching": "prefix" in words, "disable_custom_all_reduce": "nccl" in words,
    }  # fmt: skip
    if "ray" in words or ranks["tp"] * ranks["pp"] > 1:
        out["distributed_executor_backend"] = "ray" if "ray" in words else "mp"
    if "chunks" in words:
        out["max_num_batched_tokens"] = 512
    if "few" in words:
        out["num_gpu_blocks_override"] = int(words["few"])
    if "ngram" in words:
        out["speculative_config"] = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    for name, folder in (("self", "plain"), ("draft", "draft")):
        if name in words:
            out["speculative_config"] = {"model": str(Path(job["model"]).parent / folder)}
    if "speculative_config" in out:
        out["speculative_config"]["num_speculative_tokens"] = DRAFTS
    if not cpu:
        out["gpu_memory_utilization"] = 0.1  # of what must be free
    if cpu or "eager" in words:
        out["enforce_eager"] = True
    else:
        sizes = [1, 2, 4, 8, 16, 32, 64]
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        out["compilation_config"] = {"mode": 0} | graphs
    if job["cache"] != "auto" and not job["packed"]:
        config = {"quant_method": "turboquant", "recipe": job["cache"]}
        out |= {"quantization": "turboquant", "hf_overrides": {"quantization_config": config}}
    return out


def run(job: dict[str, Any]) -> None:
    """One way, in this process."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.platforms import current_platform

    begin = time.perf_counter()
    llm = LLM(**settings(job, current_platform.is_cpu()))
    ready = time.perf_counter() - begin
    how = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, logprobs=2)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts(job["prompts"])]
    times = []
    for again in (False, True):
        begin = time.perf_counter()
        out = llm.generate(asked, how, use_tqdm=False)
        took = time.perf_counter() - begin
        row = {"tokens": [list(x.outputs[0].token_ids) for x in out], "s": took, "again": again}
        row |= {"top": [[{t: p.logprob for t, p in at.items()} for at in x.outputs[0].logprobs] for x in out]}
        times.append(row | {"hits": sum(x.num_cached_tokens or 0 for x in out)})
    metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    row = {"ready_s": ready, "times": times, "device": current_platform.get_device_name()}
    row |= {"accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0)}
    row |= {"preempted": metrics.get("vllm:num_preemptions", 0)}
    Path(job["out"]).write_text(json.dumps(row))
    if "ray" in job["way"]:
        import ray

        ray.shutdown()  # with what it has started
    sys.stdout.flush()
    os._exit(0)  # an engine takes its time to end


def compare(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two generations agree.

    Returns:
        requests: of which all tokens are the same, of how many. same: tokens before the first that differs.
        apart: mean and largest difference of the logprobs of these. since: of each request the first token whose they
        are. gaps: by how much `base` preferred its own token where a request first differs; None where it did not rank
        the other's second.
    """
    equal, same, apart, since, gaps = 0, 0, [], [], []
    for a, b, p, q in zip(base["tokens"], other["tokens"], base["top"], other["top"], strict=True):
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        equal, same = equal + (n == len(a)), same + n
        own = [abs(p[i][str(a[i])] - q[i][str(a[i])]) for i in range(n)]
        apart, since = apart + own, [*since, next((i for i, x in enumerate(own) if x), n)]
        if n < len(a):
            second = p[n].get(str(b[n]))
            gaps.append([n, None if second is None else round(p[n][str(a[n])] - second, 4)])
    mean = sum(apart) / max(1, len(apart))
    out = {"requests": f"{equal}/{len(base['tokens'])}", "same": f"{same}/{sum(map(len, base['tokens']))}"}
    out |= {"apart_mean": round(mean, 6), "apart_max": round(max(apart, default=0.0), 6)}
    return out | {"since": since, "gaps": gaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", action="append", help="a recipe, or auto; may be repeated; kv4")
    parser.add_argument("--way", action="append", help="may be repeated; eager")
    parser.add_argument("--tokens", type=int, default=100, help="each request writes")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-mib", type=int, default=1024, help="of the cache, a rank")
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time")
    parser.add_argument("--unpacked", action="store_true", help="pack weights while loading, each rank its own part")
    parser.add_argument("--base", type=Path, help="a folder for what one rank wrote: made there, or taken from there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run(json.loads(args.one))
    ways = list(dict.fromkeys([BASE, *(args.way or ["eager"])]))
    for way in ways:
        words_of(way)
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit('vLLM is not installed: pip install "turboquant[vllm]"')
    failed: list[str] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        kept = args.base or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        jobs = []
        for cache in args.cache or ["kv4"]:
            model = make(Path(folder), "auto" if args.unpacked else cache)
            for way in ways:
                at = kept if way == BASE else Path(folder)
                jobs.append({
                    "cache": cache, "way": way, "model": str(model), "packed": model.name != "plain",
                    "out": str(at / f"{cache}.{way}.json".replace(":", "_")), "prompts": args.prompts,
                    "tokens": args.tokens, "dtype": args.dtype, "cache_mib": args.cache_mib,
                })  # fmt: skip

        def start(job: dict[str, Any]) -> dict[str, Any] | None:
            if not Path(job["out"]).exists():
                command = [sys.executable, __file__, "--one", json.dumps(job)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode or not Path(job["out"]).exists():
                    print(f"{job['cache']} {job['way']} failed:\n{done.stdout[-6000:]}", flush=True)
                    return None
            return json.loads(Path(job["out"]).read_text())

        base: dict[str, Any] = {}
        with ThreadPoolExecutor(args.parallel) as pool:
            for job, result in zip(jobs, pool.map(start, jobs), strict=True):
                if job["way"] == BASE:
                    base = result or {}
                if result is None or not base:
                    failed.append(f"{job['cache']} {job['way']}")
                    continue
                for of in result["times"]:
                    row = {"cache": job["cache"], "way": job["way"], "time": 1 + of["again"]}
                    row |= compare(base["times"][0], of) | {k: result[k] for k in ("accepted", "preempted")}
                    row |= {"hits": of["hits"]}
                    row |= {
                        "tokens_s": round(args.prompts * args.tokens / of["s"]),
                        "ready_s": round(result["ready_s"]),
                    }
                    rows.append(row | {"device": result["device"]})
                    print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
