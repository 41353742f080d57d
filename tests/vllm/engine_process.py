"""A process in which engines of vLLM run one after the other: importing vLLM costs more than a small engine.

A line of stdin is a job {"code", "out", "small", "llm", "params"}. The code runs with `params`, the engine `llm` if one
is asked for, and the helpers below; what it leaves in `result` goes to the file `out`, or what it raised.
"""

import gc
import json
import os
import sys
import traceback


def logprobs(llm, ids):
    """Of each token after the first, given those before it."""
    from vllm import SamplingParams, TokensPrompt

    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    out = llm.generate([TokensPrompt(prompt_token_ids=ids)], how, use_tqdm=False)[0]
    return [p[i].logprob for p, i in zip(out.prompt_logprobs[1:], ids[1:], strict=True)]


def short_logprobs(llm, ids, length=8):
    """The same of each piece of ids by itself: a rounding that flips in one token reaches few others."""
    return [x for i in range(0, len(ids), length) for x in logprobs(llm, ids[i : i + length])]


def greedy(llm, prompts, n):
    """Greedy tokens after each prompt of token ids."""
    from vllm import SamplingParams, TokensPrompt

    how = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, how, use_tqdm=False)]


def maker(small):
    def make(model, recipe=None, **llm):
        """One more engine in this process; `close` it before the next."""
        from vllm import LLM

        options = small | {"model": model} | llm
        if recipe is not None:
            config = {"quant_method": "turboquant"} | (recipe if isinstance(recipe, dict) else {"recipe": recipe})
            options["hf_overrides"] = {"quantization_config": config}
        return LLM(**options)

    return make


def close(llm):
    llm.llm_engine.engine_core.shutdown()
    del llm
    clean()


def clean():
    """Make room for the next engine."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    gc.collect()
    cleanup_dist_env_and_memory()
    # registered once a process; a second time vLLM would search every module again, and stumble over some of torch's
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def run(job):
    make = maker(job["small"])
    names = {"params": job["params"], "make": make, "close": close, "logprobs": logprobs, "greedy": greedy}
    names["short_logprobs"] = short_logprobs
    if job["llm"]:
        names["llm"] = make(**job["llm"])
    exec(job["code"], names)
    if job["llm"]:
        close(names.pop("llm"))
    return names["result"]


if __name__ == "__main__":
    from vllm import LLM  # noqa: F401

    gc.collect()
    gc.freeze()  # modules stay. vLLM collects nine times an engine, half a second each where it unfreezes them
    gc.freeze = gc.unfreeze = lambda: None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            found = {"result": run(job)}
        except Exception:
            found = {"error": traceback.format_exc()}
            clean()
        with open(job["out"] + ".part", "w") as f:
            json.dump(found, f)
        os.replace(job["out"] + ".part", job["out"])
