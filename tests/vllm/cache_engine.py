"""What test_cache_engine.py has engines do, in the process of engine_process.py."""

from engine_process import clean


def run(job):
    from vllm import LLM, SamplingParams

    settings = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20} | job["settings"]
    if job["recipe"]:
        config = {"quant_method": "turboquant", "recipe": job["recipe"]} | job.get("config", {})
        settings |= {"quantization": "turboquant", "hf_overrides": {"quantization_config": config}}
    llm = LLM(job["model"], enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=False, **settings)
    given = SamplingParams(
        temperature=0, max_tokens=job["tokens"], detokenize=False, ignore_eos=True, prompt_logprobs=job.get("logprobs")
    )
    prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
    for _ in range(job.get("times", 1)):
        out = llm.generate(prompts, given, use_tqdm=False)
    cache = llm.llm_engine.vllm_config.cache_config
    metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    result = {
        "tokens": [list(x.outputs[0].token_ids) for x in out],
        "cached": [x.num_cached_tokens for x in out],
        "preemptions": metrics["vllm:num_preemptions"],
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
        "blocks": cache.num_gpu_blocks,
        "capacity": cache.kv_cache_size_tokens,
    }
    if job.get("logprobs"):
        result["logprobs"] = [[{t: p.logprob for t, p in at.items()} for at in x.prompt_logprobs[1:]] for x in out]
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:  # in this process
        pool = core.scheduler.kv_cache_manager.block_pool
        if job.get("hold"):
            result["held"] = held(llm.llm_engine, pool, prompts[0], given)
        result["leaked"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        result["groups"] = [
            [type(g.kv_cache_spec).__name__, len(g.layer_names), g.kv_cache_spec.block_size]
            for g in core.scheduler.kv_cache_config.kv_cache_groups
        ]
    del llm, core
    clean()
    return result


def held(engine, pool, prompt, params):
    """Blocks that a request holds once its prompt is read."""
    engine.add_request("held", prompt, params)
    most = len(prompt["prompt_token_ids"]) + 3
    [request] = engine.engine_core.engine_core.scheduler.requests.values()
    while request.num_computed_tokens < most:
        engine.step()
    n = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    engine.abort_request(["held"])
    return n


def attempt(job):
    """The result of a job, or what it raised where it says that it must."""
    if not job.get("raises"):
        return run(job)
    try:
        return run(job) | {"error": None}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    clean()
    return found
