"""The KV cache in a running vLLM. Raw pages lose nothing, so they must give plain vLLM's tokens, whatever the engine
does to a request; kv4 must give the same tokens whatever the engine does, and stay close to vLLM's own cache.

Engines run in processes of their own (cache_engine.py), several of one model one after the other.
"""

import json
import math
import os
import random
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

ENGINE = Path(__file__).with_name("cache_engine.py")
CHUNKED = {"max_num_batched_tokens": 96, "max_num_seqs": 8}
SPECULATIVE = {
    "speculative_config": {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1
    }
}  # fmt: skip
DRAFT_MODEL = {"speculative_config": {"model": None, "num_speculative_tokens": 4}}  # the model itself
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32768,
}  # fmt: skip


def engines(folder, jobs, **env):
    """Results of jobs, each (model, recipe, settings) and what else cache_engine.py knows."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
    env |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    jobs = [{"settings": {}, "tokens": 24, "prompts": PROMPTS} | job for job in jobs]
    given, got = folder / "jobs.json", folder / "results.json"
    given.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(given), str(got)], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(got.read_text())


def _prompts():
    rng = random.Random(1)
    some = [[rng.randrange(3, 512) for _ in range(n)] for n in (5, 129, 300, 600)]
    return [*some, some[2] + some[1], some[3][:550] + some[0]]  # the last two share 300 and 550 tokens


PROMPTS = _prompts()


def tiny(path, model):
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.08)
        elif "post_" in name and "Gemma" in type(model).__name__:
            torch.nn.init.constant_(p, 5.0)  # else its tied embeddings repeat the last token
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = LlamaConfig(head_dim=64, tie_word_embeddings=False, **SIZES)
    return tiny(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config))


def same(results, want=None):
    """All have the tokens of the longest, as far as they go."""
    want = want or max(results, key=lambda r: len(r["tokens"][0]))
    for r in results:
        assert r["tokens"] == [t[: len(r["tokens"][0])] for t in want["tokens"]]
        assert r.get("leaked", 0) == 0


RAW = {"recipe": "raw"}
KV4 = {"recipe": "kv4", "tokens": 70}
TIGHT = CHUNKED | {"num_gpu_blocks_override": 40}
JOBS = {  # of one model, in one process: starting it costs more than a small engine
    "plain": {"recipe": None, "tokens": 70},
    "raw": RAW,
    "raw chunked": RAW | {"settings": CHUNKED},
    "raw uncached": RAW | {"settings": {"enable_prefix_caching": False}},
    "raw twice": RAW | {"times": 2, "settings": CHUNKED},
    "raw tight": RAW | {"settings": TIGHT, "tokens": 70},
    "raw small": {"recipe": "raw:page=16,rewind=16"},
    "raw large": {"recipe": "raw:page=128,ring=64"},
    "raw draft": RAW | {"settings": SPECULATIVE},
    "kv4": KV4,
    "kv4 chunked": KV4 | {"settings": CHUNKED | {"enable_prefix_caching": False}},
    "kv4 twice": KV4 | {"times": 2, "settings": CHUNKED},
    "kv4 tight": KV4 | {"settings": TIGHT | {"num_gpu_blocks_override": 90}},
    "kv4 draft": KV4 | {"settings": SPECULATIVE},
    "kv4 dense": KV4 | {"settings": {"prefix_cache_retention_interval": None}},
    "fp8": KV4 | {"settings": {"kv_cache_dtype": "fp8"}, "raises": True},
    "draft model": KV4 | {"settings": DRAFT_MODEL, "raises": True},
    "w8a8": {"recipe": "w8a8"},
    "w8a8 draft model": {"recipe": "w8a8", "settings": DRAFT_MODEL},
    "no hybrid": KV4 | {"settings": {"disable_hybrid_kv_cache_manager": True}, "raises": True},
}


@pytest.fixture(scope="module")
def ran(llama, tmp_path_factory):
    """Name -> result of JOBS."""
    DRAFT_MODEL["speculative_config"]["model"] = llama
    found = engines(tmp_path_factory.mktemp("jobs"), [{"model": llama} | job for job in JOBS.values()])
    return dict(zip(JOBS, found, strict=True))


def test_raw_pages_give_the_tokens_of_plain_vllm(ran):
    assert len({t for p in ran["plain"]["tokens"] for t in p}) > 20
    same([ran["plain"], *(r for name, r in ran.items() if name.startswith("raw"))])
    assert ran["raw"]["cached"][-2:] == [256, 512] and ran["raw uncached"]["cached"] == [0] * 6
    assert ran["raw twice"]["cached"] == [(len(p) - 1) // 64 * 64 for p in PROMPTS]
    assert ran["raw tight"]["preemptions"] >= 1 and ran["raw"]["preemptions"] == 0
    assert sorted(ran["raw"]["groups"]) == [["FullAttentionSpec", 2, 64], ["TailSpec", 2, 32]]


def test_sliding_window_and_soft_cap(tmp_path, tmp_path_factory):
    config = Gemma2Config(
        head_dim=64, sliding_window=160, attn_logit_softcapping=20.0, final_logit_softcapping=None,
        query_pre_attn_scalar=64, **SIZES,
    )  # fmt: skip
    model = tiny(tmp_path_factory.mktemp("gemma"), Gemma2ForCausalLM(config))
    raw = {"model": model, "recipe": "raw:page=32"}
    plain, default, twice, mixed = engines(
        tmp_path,
        [
            raw | {"recipe": None},
            raw,
            raw | {"times": 2, "settings": CHUNKED},
            raw | {"config": {"kv_overrides": {r"layers\.1\.": "none"}}, "settings": {"block_size": 32}},
        ],
    )
    assert len({t for p in plain["tokens"] for t in p}) > 20
    same([plain, default, twice, mixed])
    assert all(twice["cached"][1:]) and ["SlidingWindowSpec", 1, 32] in default["groups"]
    assert sum(layers for spec, layers, _ in mixed["groups"] if spec == "TailSpec") == 1


def test_hybrid_model(tmp_path, tmp_path_factory):
    """Convolutions keep vLLM's states, attention has our pages. Plain vLLM's tokens of this model depend on the batch
    and on prefix hits, so both engines get the same schedule, and no prefix caching.

    Its attention layers are not told of any quantization; they get our cache all the same.
    """
    config = Lfm2Config(
        layer_types=["conv", "full_attention"] * 2, conv_dim=256, conv_dim_out=256, block_dim=256, block_norm_eps=1e-5,
        block_auto_adjust_ff_dim=False, block_ff_dim=512, block_multiple_of=256, block_ffn_dim_multiplier=1.0,
        **(SIZES | {"num_hidden_layers": 4, "hidden_size": 256}),
    )  # fmt: skip
    model = tiny(tmp_path_factory.mktemp("lfm"), Lfm2ForCausalLM(config))
    job = {"model": model, "settings": {"enable_prefix_caching": False, "kv_cache_memory_bytes": 256 << 20}}
    plain, raw, kv4 = engines(tmp_path, [job | {"recipe": r} for r in (None, "raw", "kv4")])
    assert len({t for p in plain["tokens"] for t in p}) > 20
    same([plain, raw])
    assert kv4["blocks"] >= 6.4 * plain["blocks"] and kv4["leaked"] == 0  # of a cache in fp32
    assert sorted(spec for spec, *_ in kv4["groups"]) == ["FullAttentionSpec", "MambaSpec", "TailSpec"]


def test_kv4_gives_the_same_tokens_whatever_the_engine_does(ran):
    same([r for name, r in ran.items() if name.startswith("kv4")])
    assert min(ran["kv4 twice"]["cached"][1:]) >= 64 and ran["kv4 tight"]["preemptions"] >= 1


def test_quantized_layers_verify_what_a_model_drafts(ran):
    """The draft model is the unquantized one; with vLLM's own cache, for ours refuses it."""
    same([ran["w8a8"], ran["w8a8 draft model"]])
    assert len({t for p in ran["w8a8"]["tokens"] for t in p}) > 20 and ran["w8a8 draft model"]["accepted"] > 0


@pytest.mark.parametrize(
    "name,words",
    [
        ("fp8", "kv_cache_dtype='fp8'"),
        ("draft model", "draft models write to blocks of the first of several KV cache groups"),
        ("no hybrid", "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(name, words, ran):
    assert ran[name]["error"] is not None and words in ran[name]["error"]


def test_two_ranks(llama, ran, tmp_path):
    both = {"model": llama, "recipe": "raw", "settings": {"tensor_parallel_size": 2}}
    same(engines(tmp_path, [both], VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1"), ran["plain"])


def kl(p, q):
    """KL divergence of the tokens that both rank highest, the rest as one."""
    both = p.keys() & q.keys()
    rest = [max(1e-9, 1 - sum(math.exp(x[t]) for t in both)) for x in (p, q)]
    return sum(math.exp(p[t]) * (p[t] - q[t]) for t in both) + rest[0] * math.log(rest[0] / rest[1])


def test_kv4_is_as_near_to_vllms_own_cache_as_in_transformers(smollm2, tmp_path):
    text = (files("turboquant") / "data" / "sotu.txt").read_text()[:20000]
    tokens = AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]
    prompts = [tokens[i : i + 1000] for i in (0, 1000)]
    job = {"model": str(smollm2), "prompts": prompts, "tokens": 1, "logprobs": 20, "settings": {"max_num_seqs": 2}}
    plain, ours = engines(tmp_path, [job | {"recipe": None}, job | {"recipe": "kv4"}])
    loss, divergence, agree = [[], []], [], []
    for prompt, a, b in zip(prompts, plain["logprobs"], ours["logprobs"], strict=True):
        for token, p, q in zip(prompt[1:], a, b, strict=True):
            for x, found in zip((p, q), loss, strict=True):
                found.append(-x[str(token)])
            divergence.append(kl(p, q))
            agree.append(max(p, key=p.get) == max(q, key=q.get))
    dppl = math.exp((sum(loss[1]) - sum(loss[0])) / len(agree)) - 1
    figures = f"dPPL {dppl:+.4%}, KL {sum(divergence) / len(agree):.5f}, top-1 {sum(agree) / len(agree):.2%}"
    print(figures)
    assert sum(divergence) / len(agree) >= 3e-5, "it was read from pages"
    assert abs(dppl) <= 0.005 and sum(divergence) / len(agree) <= 0.002 and sum(agree) / len(agree) >= 0.98, figures


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """head_dim -> (plain, kv4)."""
    settings = {"dtype": "bfloat16", "max_model_len": 32768, "max_num_batched_tokens": 2048, "max_num_seqs": 8}
    settings |= {"kv_cache_memory_bytes": 128 << 20, "block_size": 64}
    jobs = []
    for head_dim in (64, 128):
        config = LlamaConfig(head_dim=head_dim, tie_word_embeddings=False, **SIZES)
        model = tiny(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config))
        job = {"model": model, "prompts": [PROMPTS[3] * 2], "tokens": 9, "settings": settings, "hold": True}
        jobs += [job | {"recipe": None}, job | {"recipe": "kv4"}]
    found = engines(tmp_path_factory.mktemp("pools"), jobs)
    return {64: found[:2], 128: found[2:]}


@pytest.mark.parametrize("head_dim,ratio", [(64, 3.2), (128, 3.4)])
def test_capacity(head_dim, ratio, pools):
    """Blocks of the pool, and tokens in it when every request has 32k tokens and the tail it really holds."""
    plain, ours = pools[head_dim]
    pages = 32768 // 64
    tail = ours["held"] - plain["held"]
    tokens = ours["blocks"] * pages / (pages + tail)
    figures = f"{plain['blocks']} -> {ours['blocks']} blocks of 64 tokens, with tails of {tail} "
    figures += f"x{tokens / plain['blocks']:.2f}"
    print(f"head_dim {head_dim}: {figures}; vLLM's own count of tokens {plain['capacity']} -> {ours['capacity']}")
    assert 8 <= tail <= 14 and tokens >= ratio * plain["blocks"], figures
