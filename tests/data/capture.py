"""Writes qkv.safetensors: keys, values and queries (rotary embedding applied) of three real models, for the tests.

    python tests/data/capture.py MODELS PROSE CODE

MODELS is a folder with the Hugging Face models `qc05` (Qwen2.5-Coder-0.5B-Instruct), `smollm2` (SmolLM2-135M-Instruct)
and `gemma3` (Gemma 3 270M it); PROSE and CODE are text files. Half of each text is read, so that the distributions move
once on the way. One KV head per layer and at most two of the query heads that read it, fp16, to keep the file small.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# name -> (model, layer, KV head, query heads kept, tokens). Of Qwen the heads that plain TurboQuant-4 damages most (the
# attention output is off by 200 % and 50 %), of SmolLM2 one where it matters who reads a channel.
WANTED = {
    "qwen_a": ("qc05", 0, 1, 2, 272),
    "qwen_b": ("qc05", 1, 1, 2, 272),
    "smollm2": ("smollm2", 4, 2, 1, 272),
    "gemma3": ("gemma3", 5, 0, 1, 128),
}


def main(models: Path, prose: Path, code: Path) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((query[0], key[0], value[0]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    out = {}
    for folder in dict.fromkeys(w[0] for w in WANTED.values()):
        tokenizer = AutoTokenizer.from_pretrained(models / folder)
        model = AutoModelForCausalLM.from_pretrained(models / folder, dtype=torch.float32, attn_implementation="spy")
        n = max(w[4] for w in WANTED.values() if w[0] == folder)
        halves = [tokenizer(p.read_text(encoding="utf-8")[:20_000]).input_ids for p in (prose, code)]
        ids = torch.tensor([halves[0][: n // 2] + halves[1][1 : n - n // 2 + 1]])
        seen.clear()
        with torch.no_grad():
            model(ids, use_cache=False)
        for name, (of, layer, head, queries, tokens) in WANTED.items():
            if of == folder:
                q, k, v = seen[layer]
                group = q.shape[0] // k.shape[0]
                for kind, x in (
                    ("q", q[head * group :][:queries]),
                    ("k", k[head : head + 1]),
                    ("v", v[head : head + 1]),
                ):
                    out[f"{name}.{kind}"] = x[:, :tokens].half().contiguous()
    save_file(out, Path(__file__).with_name("qkv.safetensors"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
