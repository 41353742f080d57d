"""The KV cache in a running vLLM. Raw pages lose nothing, so they must give plain vLLM's tokens, whatever the engine
does to a request; kv4 must give the same tokens whatever the engine does, and stay close to vLLM's own cache.

Engines run one after the other in a process of their own (cache_engine.py).
"""

import math
import random
from importlib.resources import files

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

CHUNKED = {"max_num_batched_tokens": 96, "max_num_seqs": 8}
SPECULATIVE = {
    "speculative_config": {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1
    }
}  # fmt: skip
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.fixture(scope="session")
def engines(engine):
    """Results of jobs, each (model, recipe, settings) and what else cache_engine.py knows."""

    def run(jobs, **env):
        jobs = [{"settings": {}, "tokens": 24, "prompts": PROMPTS} | job for job in jobs]
        code = "from cache_engine import attempt\nresult = [attempt(job) for job in params['jobs']]"
        return engine(code, None, env=env, jobs=jobs)

    return run


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


def drafts(model, **settings):
    """By a model of `models`."""
    return {"draft": model, "settings": settings}


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
    "kv4 unnamed": {"recipe": None, "tokens": 70, "settings": {"quantization": "turboquant"}},  # it is the default
    "kv4 chunked": KV4 | {"settings": CHUNKED | {"enable_prefix_caching": False}},
    "kv4 twice": KV4 | {"times": 2, "settings": CHUNKED},
    "kv4 tight": KV4 | {"settings": TIGHT | {"num_gpu_blocks_override": 90}},
    "kv4 draft": KV4 | {"settings": SPECULATIVE},
    "kv4 dense": KV4 | {"settings": {"prefix_cache_retention_interval": None}},
    "fp8": KV4 | {"settings": {"kv_cache_dtype": "fp8"}, "raises": True},
    "raw draft model": RAW | drafts("itself", **CHUNKED, num_gpu_blocks_override=58) | {"tokens": 70},
    "kv4 draft model": KV4 | drafts("itself", enable_prefix_caching=False),
    "kv4 draft model twice": KV4 | drafts("packed", **CHUNKED) | {"times": 2},
    "kv4 poor draft model": KV4 | drafts("small", **CHUNKED),
    "w8a8": {"recipe": "w8a8"},
    "w8a8 draft model": {"recipe": "w8a8"} | drafts("itself"),
    "draft's cache": KV4 | drafts("packed with a cache") | {"raises": True},
    "not every layer": KV4 | drafts("itself") | {"config": {"kv_overrides": {r"\.1\.": "none"}}, "raises": True},
    "no hybrid": KV4 | {"settings": {"disable_hybrid_kv_cache_manager": True}, "raises": True},
}


@pytest.fixture(scope="module")
def models(llama, packed, tmp_path_factory):
    """Name -> folder of what drafts for the llama."""
    small = LlamaConfig(head_dim=32, tie_word_embeddings=False, **(SIZES | {"num_hidden_layers": 1}))
    return {
        "itself": llama,
        "packed": str(packed(llama, "w8a8")),
        "packed with a cache": str(packed(llama, "w8a8kv4")),
        "small": tiny(tmp_path_factory.mktemp("small"), LlamaForCausalLM(small)),
    }


@pytest.fixture(scope="module")
def ran(llama, models, engines):
    """Name -> result of JOBS."""

    def complete(draft=None, settings=None, **job):
        some = {"speculative_config": {"model": models[draft], "num_speculative_tokens": 4}} if draft else {}
        return {"model": llama, "settings": (settings or {}) | some} | job

    found = engines([complete(**job) for job in JOBS.values()])
    return dict(zip(JOBS, found, strict=True))


def test_raw_pages_give_the_tokens_of_plain_vllm(ran):
    assert len({t for p in ran["plain"]["tokens"] for t in p}) > 20
    same([ran["plain"], *(r for name, r in ran.items() if name.startswith("raw"))])
    assert ran["raw"]["cached"][-2:] == [256, 512] and ran["raw uncached"]["cached"] == [0] * 6
    assert ran["raw twice"]["cached"] == [(len(p) - 1) // 64 * 64 for p in PROMPTS]
    assert ran["raw tight"]["preemptions"] >= 1 and ran["raw"]["preemptions"] == 0
    assert sorted(ran["raw"]["groups"]) == [["FullAttentionSpec", 2, 64], ["TailSpec", 2, 32]]


def test_sliding_window_and_soft_cap(engines, models, tmp_path_factory):
    config = Gemma2Config(
        head_dim=64, sliding_window=160, attn_logit_softcapping=20.0, final_logit_softcapping=None,
        query_pre_attn_scalar=64, **SIZES,
    )  # fmt: skip
    model = tiny(tmp_path_factory.mktemp("gemma"), Gemma2ForCausalLM(config))
    raw = {"model": model, "recipe": "raw:page=32"}
    drafts = {"speculative_config": {"model": models["small"], "num_speculative_tokens": 4}}
    plain, default, twice, drafted, mixed = engines(
        [
            raw | {"recipe": None},
            raw,
            raw | {"times": 2, "settings": CHUNKED},
            raw | {"settings": CHUNKED | drafts},
            raw | {"config": {"kv_overrides": {r"layers\.1\.": "none"}}, "settings": {"block_size": 32}},
        ],
    )
    assert len({t for p in plain["tokens"] for t in p}) > 20
    same([plain, default, twice, drafted, mixed])
    assert all(twice["cached"][1:]) and ["SlidingWindowSpec", 1, 32] in default["groups"]
    assert sum(layers for spec, layers, _ in mixed["groups"] if spec == "TailSpec") == 1


def test_hybrid_model(engines, tmp_path_factory):
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
    plain, raw, kv4 = engines([job | {"recipe": r} for r in (None, "raw", "kv4")])
    assert len({t for p in plain["tokens"] for t in p}) > 20
    same([plain, raw])
    assert kv4["blocks"] >= 6.4 * plain["blocks"] and kv4["leaked"] == 0  # of a cache in fp32
    assert sorted(spec for spec, *_ in kv4["groups"]) == ["FullAttentionSpec", "MambaSpec", "TailSpec"]


def test_kv4_gives_the_same_tokens_whatever_the_engine_does(ran):
    same([r for name, r in ran.items() if name.startswith("kv4")])
    assert min(ran["kv4 twice"]["cached"][1:]) >= 64 and ran["kv4 tight"]["preemptions"] >= 1


def test_a_draft_model_keeps_vllms_cache_in_blocks_of_its_own(ran):
    """Its tokens are those of the two tests above; a model that drafts for itself is right but where kv4 is not."""
    names = "raw draft model", "kv4 draft model", "kv4 draft model twice", "kv4 poor draft model"
    raw, kv4, twice, poor = (ran[name] for name in names)
    most = 6 * 14 * 4  # of 69 tokens, five a step
    print(f"accepted of {most}: " + ", ".join(f"{name} {ran[name]['accepted']:.0f}" for name in names))
    assert raw["accepted"] == most and kv4["accepted"] >= 0.9 * most and twice["accepted"] >= 0.9 * 2 * most
    assert poor["accepted"] < 0.1 * most, "nearly all of its tokens are taken back"
    assert raw["preemptions"] >= 1 and min(twice["cached"][2:]) >= 256 and kv4["cached"] == [0] * 6
    assert sorted(poor["groups"]) == [["FullAttentionSpec", 1, n] for n in (32, 128, 128)] + [["TailSpec", 1, 16]] * 2


def test_quantized_layers_verify_what_a_model_drafts(ran):
    """With vLLM's own cache."""
    same([ran["w8a8"], ran["w8a8 draft model"]])
    assert len({t for p in ran["w8a8"]["tokens"] for t in p}) > 20 and ran["w8a8 draft model"]["accepted"] > 0


@pytest.mark.parametrize(
    "name,words",
    [
        ("fp8", "kv_cache_dtype='fp8'"),
        ("draft's cache", "draft_model.model.layers.0.self_attn.attn: draft models keep vLLM's cache"),
        ("not every layer", "model.layers.1.self_attn.attn: with a draft model every layer must have our cache"),
        ("no hybrid", "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(name, words, ran):
    assert ran[name]["error"] is not None and words in ran[name]["error"]


def test_two_ranks(llama, ran, engines):
    """Alone, and with drafts of the model itself."""
    both = {"model": llama, "recipe": "raw", "settings": {"tensor_parallel_size": 2}}
    config = {"model": llama, "num_speculative_tokens": 4, "draft_tensor_parallel_size": 2}
    drafted = both | {"settings": both["settings"] | {"speculative_config": config}, "prompts": PROMPTS[:3]}
    alone, drafted = engines([both, drafted], VLLM_CPU_OMP_THREADS_BIND="0|1")
    same([alone], ran["plain"])
    assert drafted["tokens"] == alone["tokens"][:3] and drafted["accepted"] == 3 * 5 * 4  # of 23 tokens, five a step


def kl(p, q):
    """KL divergence of the tokens that both rank highest, the rest as one."""
    both = p.keys() & q.keys()
    rest = [max(1e-9, 1 - sum(math.exp(x[t]) for t in both)) for x in (p, q)]
    return sum(math.exp(p[t]) * (p[t] - q[t]) for t in both) + rest[0] * math.log(rest[0] / rest[1])


def test_kv4_is_as_near_to_vllms_own_cache_as_in_transformers(smollm2, engines):
    text = (files("turboquant") / "data" / "sotu.txt").read_text()[:20000]
    tokens = AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]
    prompts = [tokens[i : i + 1000] for i in (0, 1000)]
    job = {"model": str(smollm2), "prompts": prompts, "tokens": 1, "logprobs": 20, "settings": {"max_num_seqs": 2}}
    plain, ours = engines([job | {"recipe": None}, job | {"recipe": "kv4"}])
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
def pools(engines, tmp_path_factory):
    """head_dim -> (plain, kv4)."""
    settings = {"dtype": "bfloat16", "max_model_len": 32768, "max_num_batched_tokens": 2048, "max_num_seqs": 8}
    settings |= {"kv_cache_memory_bytes": 128 << 20, "block_size": 64}
    jobs = []
    for head_dim in (64, 128):
        config = LlamaConfig(head_dim=head_dim, tie_word_embeddings=False, **SIZES)
        model = tiny(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config))
        job = {"model": model, "prompts": [PROMPTS[3] * 2], "tokens": 9, "settings": settings, "hold": True}
        jobs += [job | {"recipe": None}, job | {"recipe": "kv4"}]
    found = engines(jobs)
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
