"""Regenerate the fidelity tables of docs/measured.md.

python benchmarks/fidelity.py MODEL... --text prose.txt --text tech.txt --text code.txt --out results

Every (model, ctx) is a job of its own in a process of its own, for the reference kernels leave a GPU mostly waiting for
Python; --jobs says how many run at a time. A job writes its rows as they come and goes on where it stopped. At the
end: fidelity.json (rows, hardware, versions, commit), fidelity.csv, and a Markdown table on standard output.

Through the kernels of a GPU, as decode steps run them:
python benchmarks/fidelity.py MODEL... --text ... --dtype float16 --device cuda --backend cuda --chunk 8 --recipe kv4 \
    --recipe kv8 --out results
"""

import argparse
import csv
import io
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCHEMES = (
    "kv4",
    "kv4:hot=0",
    "kv4:hot=8",
    "kv4:page=32",
    "kv4:ring=256",
    "k4v3",
    "kv3",
    "kv2",
    "kv8",
    "plain4",
    "plain4+ring",
    "kivi-g32",
    "kivi-g32+ring",
    "kivi-g128",
    "kivi-g128+ring",
    "int4-token",
    "int4-token+ring",
    "int8-token",
)
COLUMNS = (
    ("recipe", "{}"),
    ("key_bits", "{:.2f}"),
    ("value_bits", "{:.2f}"),
    ("dppl_percent", "{:+.2f} %"),
    ("dppl_se", "± {:.2f}"),
    ("kl", "{:.4f}"),
    ("top1", "{:.1f}"),
    ("match", "{:.1f}"),
)


def job(args: argparse.Namespace) -> None:
    """One model at one ctx, in this process."""
    import torch

    from turboquant.evaluate import fidelity
    from turboquant.evaluate.models import load

    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.time()
    (path,), (ctx,) = args.models, args.ctx
    model, tokenizer = load(path, args.dtype, args.device)
    name = label(path)
    say = lambda what, done, of: done in (0, of) and print(f"{name} {ctx} {what} {done}/{of}", file=sys.stderr)  # noqa: E731
    fidelity(
        model,
        tokenizer,
        args.recipe or SCHEMES,
        args.text,
        ctx,
        args.tokens,
        stride=args.stride,
        batch=args.batch,
        chunk=args.chunk,
        backend=args.backend,
        name=name,
        json=job_file(args.out, path, ctx),
        progress=say,
    )
    print(f"{name} {ctx} done after {time.time() - began:.0f} s", file=sys.stderr)


def label(path: str) -> str:
    """Short name of a model: of its folder, or of the folder a model.gguf lies in."""
    p = Path(path)
    return p.parent.name if p.suffix == ".gguf" and p.stem == "model" else p.stem if p.suffix == ".gguf" else p.name


def job_file(out: Path, path: str, ctx: int) -> Path:
    """Where a job keeps its rows."""
    return out / f"{label(path)}-{ctx}.json"


def machine(commit: str | None) -> dict[str, str]:
    """Hardware, versions and commit (asked of git if not given)."""
    import torch
    import transformers

    import turboquant

    here = Path(__file__).resolve().parent
    git = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=False).stdout.strip()  # noqa: E731
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../src")
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": f"{cpu or platform.processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "turboquant": turboquant.__version__,
        "commit": commit
        or (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else ""),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def markdown(rows: list[dict], info: dict[str, str]) -> str:
    """A table for every model and ctx."""
    out = []
    for model, ctx in dict.fromkeys((r["model"], r["ctx"]) for r in rows):
        some = [r for r in rows if (r["model"], r["ctx"]) == (model, ctx)]
        r = some[0]
        out.append(f"\n**{model}, ctx {ctx}, {r['tokens']} tokens, {r['dtype']}, PPL {r['ppl_base']:.3f}**\n")
        out.append("| " + " | ".join(name for name, _ in COLUMNS) + " |")
        out.append("|" + "---|" * len(COLUMNS))
        for r in some:
            cells = ("nan" if r[name] is None else form.format(r[name]) for name, form in COLUMNS)
            out.append("| " + " | ".join(cells) + " |")
    out.append("\n" + ", ".join(f"{k} {v}" for k, v in info.items()))
    return "\n".join(out)


def main() -> None:
    """See the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", help="hub names, folders or .gguf files")
    p.add_argument("--text", type=Path, action="append", required=True, help="a text file; several times for more")
    p.add_argument("--ctx", type=int, nargs="+", default=[2048, 8192])
    p.add_argument("--tokens", type=int, default=24_576)
    p.add_argument("--recipe", action="append", help="instead of all schemes; several times for more")
    p.add_argument("--stride", type=int, default=2, help="KL, top-1 and match at every so manyth position")
    p.add_argument("--batch", type=int, help="windows at a time")
    p.add_argument("--chunk", type=int, help="tokens of a forward pass; a GPU's decode kernel takes up to 8")
    p.add_argument("--backend", default="auto", help="of every op: cuda, triton, cpu or reference")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, help="CPU threads of a job")
    p.add_argument("--jobs", type=int, default=1, help="jobs at a time")
    p.add_argument("--out", type=Path, required=True, help="folder for the results")
    p.add_argument("--commit", help="what was measured, where git cannot say")
    p.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job:
        return job(args)

    from turboquant.evaluate.results import dumps, write

    args.out.mkdir(parents=True, exist_ok=True)
    rest = ["--job", "--tokens", str(args.tokens), "--stride", str(args.stride), "--out", str(args.out)]
    rest += ["--dtype", args.dtype, "--device", args.device]
    rest += [x for t in args.text for x in ("--text", str(t))] + [x for r in args.recipe or () for x in ("--recipe", r)]
    rest += ["--backend", args.backend]
    for name in ("batch", "chunk", "threads"):
        rest += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    todo = [(m, c) for c in sorted(args.ctx, reverse=True) for m in args.models]  # the longest first

    def start(one: tuple[str, int]) -> int:
        return subprocess.run([sys.executable, __file__, one[0], "--ctx", str(one[1]), *rest], check=False).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [one for one, code in zip(todo, pool.map(start, todo), strict=True) if code]
    rows = []
    for model in args.models:
        for ctx in args.ctx:
            if job_file(args.out, model, ctx).exists():
                rows += json.loads(job_file(args.out, model, ctx).read_text())
    info = machine(args.commit)
    write(args.out / "fidelity.json", dumps({"machine": info, "rows": rows}))
    if rows:
        table = io.StringIO()
        writer = csv.DictWriter(table, [*rows[0], *info], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(r | info for r in rows)
        write(args.out / "fidelity.csv", table.getvalue())
    print(markdown(rows, info))
    if failed:
        sys.exit(f"error: failed: {', '.join(f'{label(m)} at ctx {c}' for m, c in failed)}")


if __name__ == "__main__":
    main()
