"""What quantized linear layers cost: recipes and baselines on one model, against the same model unquantized.

python benchmarks/linear_fidelity.py --model model.gguf --text prose.txt --text tech.txt --text code.txt --json out.json

24,576 tokens, paired, with standard errors. `--feedback FILE` adds rows with error feedback along second moments that
the model collects on that text (which must not be one that is measured); `--feedback self` on what it says itself: of
the recipes that are given, else of a few. Rows are kept in the JSON file as they come, and a rerun goes on where it
stopped.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fidelity import label, machine

SCHEMES = (
    "a8", "a8-token", "a4", "a4:ahot=8", "a4:agroup=32", "a4:ahot=0", "a4-token", "a4-g32",
    "w8", "w8:group=0", "int8-chan", "w4", "w4:clip=1", "w4:group=0", "w4:group=32", "w4-rtn", "nf4",
    "w8a8", "w4a8", "w4a8:group=0",
    "w4a8:clip=0", "w8a4", "w4a4", "w8a8-token", "llm-int8",
    "w8a8kv4", "w4a8kv4", "w4a8kv4:group=32", "w8a4kv4", "w4a4kv4",
)  # fmt: skip
FEEDBACK = ("w4", "w4a8", "w4a8:group=0", "w4a8kv4", "w8a8kv4")
COLUMNS = (
    ("recipe", "{}"), ("weight_bits", "{:.2f}"), ("activation_bits", "{:.2f}"), ("dppl_percent", "{:+.2f} %"),
    ("dppl_se", "± {:.2f}"), ("kl", "{:.5f}"), ("kl_se", "± {:.5f}"), ("top1", "{:.2f}"), ("match", "{:.2f}"),
    ("kernel", "{}"), ("seconds", "{:.0f}"),
)  # fmt: skip


def markdown(rows: list[dict[str, Any]], info: dict[str, str]) -> str:
    """One table."""
    r = rows[0]
    out = [f"\n**{r['model']}, ctx {r['ctx']}, {r['tokens']} tokens, {r['dtype']}, PPL {r['ppl_base']:.3f}**\n"]
    out += ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for r in rows:
        cells = ("–" if r.get(name) is None else form.format(r[name]) for name, form in COLUMNS)
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", ", ".join(f"{k} {v}" for k, v in info.items())])


def main() -> None:
    """See the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="hub name, folder or .gguf file")
    p.add_argument("--tokenizer", help="folder, where the model's own tokenizer is not to be used")
    p.add_argument("--text", type=Path, action="append", required=True)
    p.add_argument(
        "--feedback", help="for second moments: self (what the model says), self:FILE, random (tokens), or a text"
    )
    p.add_argument("--ctx", type=int, default=2048)
    p.add_argument("--tokens", type=int, default=24_576)
    p.add_argument("--recipe", action="append", help="instead of all schemes; several times for more")
    p.add_argument("--stride", type=int, default=2, help="KL, top-1 and match at every so manyth position")
    p.add_argument("--batch", type=int)
    p.add_argument("--chunk", type=int, help="tokens of a forward pass; a GPU's decode kernel takes up to 8")
    p.add_argument("--backend", default="auto", help="of every op: cuda, triton, cpu or reference")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int)
    p.add_argument("--json", type=Path, required=True)
    p.add_argument("--commit", help="what was measured, where git cannot say")
    args = p.parse_args()

    from turboquant.evaluate import fidelity
    from turboquant.evaluate.linear import LINEAR_BASELINES
    from turboquant.evaluate.models import load
    from turboquant.evaluate.quantizing import check_source, feedback_moments
    from turboquant.evaluate.results import dumps, write
    from turboquant.recipe import parse_recipe

    check_source(args.feedback)
    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.time()
    model, tokenizer = load(args.model, args.dtype, args.device)
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)

    def say(what: str, done: int, of: int) -> None:
        if done == of:
            print(f"{time.time() - began:.0f} s {what}", file=sys.stderr, flush=True)

    shared: dict[str, Any] = dict(
        stride=args.stride,
        batch=args.batch,
        chunk=args.chunk,
        backend=args.backend,
        name=label(args.model),
        json=args.json,
        progress=say,
    )
    rows = fidelity(model, tokenizer, args.recipe or SCHEMES, args.text, args.ctx, args.tokens, **shared)
    if args.feedback:
        moments = feedback_moments(model, tokenizer, args.feedback, say)
        print(f"{time.time() - began:.0f} s second moments", file=sys.stderr, flush=True)
        with_weights = [r for r in args.recipe or () if r not in LINEAR_BASELINES and parse_recipe(r).weights]
        rows += fidelity(
            model, tokenizer, with_weights or FEEDBACK, args.text, args.ctx, args.tokens, moments=moments, **shared
        )
    info = machine(args.commit)
    write(args.json.with_suffix(".machine.json"), dumps(info))
    print(markdown(rows, info))


if __name__ == "__main__":
    main()
