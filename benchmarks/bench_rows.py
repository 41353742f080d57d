"""What quantizing rows costs on one GPU: the kernels by themselves, over the norm or activation that bf16 runs anyway,
and in front of the product.

PYTHONPATH=src python benchmarks/bench_rows.py --json rows.json
PYTHONPATH=src python benchmarks/bench_rows.py --plot rows.json rows.png        # from what an earlier run wrote

Medians over replays of CUDA graphs. `hot`: the rows lie in L2, as in a model that has just written them; `cold`: over
so many rows that none does. A chain is norm (or activation, or nothing) and product over cold weights, as in a model:
`rows` says whose quantizer it is, `cuda` (csrc/quantize.cu, the library's choice) or `triton`, both launched as the
library does, and `by` whose the product is: csrc/product.cu's or humming's. Two overheads, in percent of the w4a8
product: `alone`, all that comes before the product; `net`, that less what bf16 pays for its norm or activation in the
same place, by torch's own kernels or compiled into one by torch.compile, whichever is the faster. A quantizer whose
rows are farther from the exact ones than twice what plain torch loses gets no figure, and the run ends with exit
code 1.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_linear import COLD, median_ms, relative
from fidelity import machine

from turboquant.kernels.fused import NormRule
from turboquant.maths.activations import decode_int8, encode_int8
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe, WeightRecipe

QUANTIZERS = ("cuda", "triton")
A8, RULE = ActivationRecipe(8), NormRule(1e-6)
KINDS = {"plain": 4096, "norm": 4096, "gate": 14336}
SHAPES = {
    "o": (4096, "plain"),
    "qkv": (6144, "norm"),
    "gate_up": (28672, "norm"),
    "down": (4096, "gate"),
}  # N, what comes before; K as of KINDS
ROWS = (1, 16, 64, 256, 2048)


def quantizer(rows: str, kind: str, a: dict[str, Any]) -> Callable[[], Any]:
    """Whose rows of operands, as the library calls it."""
    backend = importlib.import_module(f"turboquant.kernels.{rows}.rows")
    if kind == "norm":
        return lambda: backend.norm_quantize(a["x"], a["norm"], RULE, A8)[1]
    if kind == "gate":
        return lambda: backend.gate_quantize(a["gate"], a["x"], "silu", A8)
    return lambda: backend.quantize(a["x"], A8)


def operands(kind: str, m: int, k: int) -> tuple[dict[str, Any], torch.Tensor]:
    """What comes in, and what the quantizer should see in fp32."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    x[:, :: k // 7] *= 30
    if kind == "norm":
        w = torch.rand(k, device="cuda").add(0.5).bfloat16()
        exact = F.rms_norm(x.float(), (k,), None, 1e-6).bfloat16().float() * w.float()
        return {"x": x, "norm": w}, exact
    if kind == "gate":
        g = torch.randn_like(x)
        return {"x": x, "gate": g}, F.silu(g.float()).bfloat16().float() * x.float()
    return {"x": x}, x.float()


def plain(kind: str, a: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """What bf16 runs in its place."""
    if kind == "norm":
        return lambda: F.rms_norm(a["x"], a["x"].shape[-1:], a["norm"], 1e-6)
    if kind == "gate":
        return lambda: F.silu(a["gate"]) * a["x"]
    return lambda: a["x"]


def compiled(kind: str, a: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """The same as one kernel of torch.compile's: what an engine that fuses runs in bf16."""
    if kind == "norm":
        norm = torch.compile(lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), dynamic=False)
        return lambda: norm(a["x"], a["norm"])
    gate = torch.compile(lambda g, x: F.silu(g) * x, dynamic=False)
    return lambda: gate(a["gate"], a["x"])


def bench_kernel(kind: str, m: int, args: argparse.Namespace, failed: list[str]) -> list[dict[str, Any]]:
    """Rows of every quantizer by itself at m rows, and of what bf16 runs in its place."""
    k, out = KINDS[kind], []
    one, exact = operands(kind, m, k)
    own = relative(decode_int8(encode_int8(exact.bfloat16())), exact)
    moved = m * k * {"plain": 3, "norm": 5, "gate": 5}[kind] + 4 * m
    many = [{n: t.clone() for n, t in one.items()} for _ in range(max(1, min(64, COLD // moved)))]
    base = {"what": "kernel", "kind": kind, "k": k, "m": m, "bytes": moved, "bound_ms": moved / args.bandwidth / 1e9}
    for name in QUANTIZERS if kind == "plain" else ("bf16", *QUANTIZERS):

        def way(a: dict[str, Any], name: str = name) -> Callable[[], Any]:
            return plain(kind, a) if name == "bf16" else quantizer(name, kind, a)

        error = 0.0 if name == "bf16" else relative(decode_int8(way(one)()), exact)
        if not error <= 2 * own:
            failed.append(f"{kind} M={m} {name}: error {error:.5f} over {2 * own:.5f}")
            continue
        hot, cold = median_ms([way(one)] * 8, args.replays), median_ms([way(a) for a in many], args.replays)
        out.append(base | {"rows": name, "hot_ms": hot, "cold_ms": cold, "error": error})
    return out


def bench_chain(shape: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each number of rows and quantizer: norm or activation, and the product behind it."""
    from turboquant.kernels.cuda.linear import multiply, prepare

    (n, kind), k = SHAPES[shape], KINDS[SHAPES[shape][1]]
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    dense = [w.clone() for _ in range(max(2, COLD // w.nbytes))]
    packed = PackedTensor.quantize(w, WeightRecipe(4, group=0), None, True)
    layers = [prepare(packed, 8, torch.bfloat16) for _ in range(max(2, COLD // packed.nbytes))]
    for m in args.rows:
        a = operands(kind, m, k)[0]
        before, codes = plain(kind, a), quantizer("cuda", kind, a)()
        by = "product.cu" if m <= layers[0].few else "humming"
        row: dict[str, Any] = {"what": "chain", "shape": shape, "n": n, "kind": kind, "k": k, "m": m, "by": by}
        x = before()
        row["bf16_product_ms"] = median_ms([lambda v=v, x=x: F.linear(x, v) for v in dense], args.replays)
        ways = {"torch": before} | ({} if kind == "plain" else {"compiled": compiled(kind, a)})
        chains = {w: [lambda v=v, f=f: F.linear(f(), v) for v in dense] for w, f in ways.items()}
        times = {w: median_ms(c, args.replays) for w, c in chains.items()}
        row["bf16_by"] = min(times, key=times.__getitem__)
        row["bf16_ms"] = times[row["bf16_by"]]
        product = lambda v, q=codes: multiply(v, packed, q.codes, q.unit)  # noqa: E731
        row["product_ms"] = median_ms([lambda v=v, f=product: f(v) for v in layers], args.replays)
        for name in QUANTIZERS:

            def chain(v: Any, rows: Any = quantizer(name, kind, a)) -> torch.Tensor:  # noqa: B008
                q = rows()
                return multiply(v, packed, q.codes, q.unit)

            ms = median_ms([lambda v=v, f=chain: f(v) for v in layers], args.replays)
            alone, pays = ms - row["product_ms"], row["bf16_ms"] - row["bf16_product_ms"]
            yield row | {
                "rows": name, "ms": ms, "speedup": row["bf16_ms"] / ms,
                "alone_percent": 100 * alone / row["product_ms"],
                "net_percent": 100 * (alone - pays) / row["product_ms"],
            }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of kernels and one of chains; microseconds."""
    out = ["| before | K | M | rows by | hot µs | cold µs | its bytes take |", "|" + "---|" * 7]
    us = lambda x: f"{1e3 * x:.2f}"  # noqa: E731
    for r in rows:
        if r["what"] == "kernel":
            cells = (r["kind"], r["k"], r["m"], r["rows"], us(r["hot_ms"]), us(r["cold_ms"]), us(r["bound_ms"]))
            out.append("| " + " | ".join(map(str, cells)) + " |")
    names = (
        "chain", "M", "rows by", "bf16 µs", "of it product", "fused by", "w4a8 µs", "of it product", "by", "× bf16",
        "alone", "net",
    )  # fmt: skip
    out += ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for r in rows:
        if r["what"] == "chain":
            cells = (
                f"{r['kind']} → {r['shape']} {r['n']}×{r['k']}", r["m"], r["rows"],
                us(r["bf16_ms"]), us(r["bf16_product_ms"]), r["bf16_by"], us(r["ms"]), us(r["product_ms"]), r["by"],
                f"{r['speedup']:.2f}", f"{r['alone_percent']:+.0f} %", f"{r['net_percent']:+.0f} %",
            )  # fmt: skip
            out.append("| " + " | ".join(map(str, cells)) + " |")
    out += ["", "all chains at M:"]
    for m, name in dict.fromkeys((r["m"], r["rows"]) for r in rows if r["what"] == "chain"):
        some = [r for r in rows if r["what"] == "chain" and (r["m"], r["rows"]) == (m, name)]
        bf16, ours = (sum(r[n] for r in some) for n in ("bf16_ms", "ms"))
        product, pays = (sum(r[n] for r in some) for n in ("product_ms", "bf16_product_ms"))
        alone, net = 100 * (ours - product) / product, 100 * (ours - product - bf16 + pays) / product
        line = f"{m}, rows by {name}: bf16 {us(bf16)}, w4a8 {us(ours)} µs, × {bf16 / ours:.2f}"
        out.append(f"{line}, in front {alone:+.0f} % of the products, net {net:+.0f} %")
    return "\n".join(out)


def plot(source: Path, target: Path) -> None:
    """How the cost of the library's quantizer grows with the rows: microseconds before the product, and their share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in json.loads(source.read_text())["rows"] if r["what"] == "chain" and r["rows"] == "cuda"]
    few = max(r["m"] for r in rows if r["by"] == "product.cu")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for i, shape in enumerate(dict.fromkeys(r["shape"] for r in rows)):
        some = [r for r in rows if r["shape"] == shape]
        m, color, name = [r["m"] for r in some], f"C{i}", f"{some[0]['kind']} → {shape}"
        left.plot(m, [1e3 * (r["ms"] - r["product_ms"]) for r in some], "o-", color=color, label=name)
        left.plot(m, [1e3 * (r["bf16_ms"] - r["bf16_product_ms"]) for r in some], "o:", color=color)
        right.plot(m, [r["alone_percent"] for r in some], "o-", color=color, label=name)
        right.plot(m, [r["net_percent"] for r in some], "o--", color=color)
    left.set(title="before the product (dotted: in bf16)", ylabel="µs", yscale="symlog")
    right.set(
        title=f"% of the w4a8 product (dashed: less what bf16 pays)\nproduct.cu's up to {few} rows, then humming's"
    )
    for axis in (left, right):
        axis.set(xscale="log", xlabel="rows")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(target, dpi=110)


def main() -> None:
    """See the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    p.add_argument("--chains", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="these need humming-kernels")
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    p.add_argument("--replays", type=int, default=12)
    p.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy reaches")
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw an earlier run's chains; no GPU")
    p.add_argument(
        "--few", type=int, help="rows up to which product.cu runs, instead of what `linear` has (at most 16)"
    )
    p.add_argument("--commit", help="what was measured, where git cannot say")
    args = p.parse_args()
    if args.plot:
        plot(*args.plot)
        return
    if args.few:
        for name in ("linear", "rows"):  # the package has a function of the first one's name
            importlib.import_module(f"turboquant.kernels.cuda.{name}").FEW = args.few
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    failed: list[str] = []

    def keep() -> None:
        if args.json:
            args.json.write_text(
                json.dumps({"machine": machine(args.commit), "failed": failed, "rows": rows}, indent=1)
            )

    for shape in args.chains:
        rows += bench_chain(shape, args)
        keep()
    for kind in args.kinds:
        for m in args.rows:
            rows += bench_kernel(kind, m, args, failed)
        keep()
    print(markdown(rows))
    if failed:
        sys.exit("error: no figure for what does not compute rightly:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
