"""Linear layers of Llama 3 8B on one GPU: packed weights and int8 rows against bf16, in the same run.

PYTHONPATH=src python benchmarks/bench_linear.py --json linear.json

Every figure is the median over replays of a CUDA graph with one call for each of so many copies of the weight that none
is in L2 when its turn comes. `total` quantizes the input (rotation, scale, int8) and multiplies; `gemm` multiplies
rows that are quantized already. Behind each shape stands what the layer follows in the model: a norm, an activation, or
attention. A variant whose output is farther from the fp32 product of the same operands than twice what plain torch in
bf16 is gets no figure, and the run ends with exit code 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fidelity import machine

from turboquant.kernels.cuda.linear import multiply, prepare
from turboquant.kernels.fused import NormRule
from turboquant.maths.activations import decode_int8, encode_int8
from turboquant.maths.rotation import rotate
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe, WeightRecipe

SHAPES = {
    "qkv": (6144, 4096, "norm"), "o": (4096, 4096, "plain"),
    "gate_up": (28672, 4096, "norm"), "down": (4096, 14336, "gate"),
}  # fmt: skip
VARIANTS = {  # name -> (weight recipe, bits of the rows)
    "w4a8": (WeightRecipe(4, group=0), 8),
    "w4a8-g128": (WeightRecipe(4), 8),
    "w8a8": (WeightRecipe(8, group=0), 8),
    "w4a16-g128": (WeightRecipe(4), 16),
}
A8 = ActivationRecipe(8)
ROWS = (1, 4, 16, 64, 256, 1024, 2048)
COLD = 256 << 20  # bytes of weights that a graph walks over: five times the L2 of an H100


def median_ms(calls: list[Callable[[], Any]], replays: int) -> float:
    """Milliseconds of one call, all of them captured in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for i in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / len(calls))
    del graph, kept
    return statistics.median(times)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root of the squared error over the squared norm."""
    return float((got.float() - want).norm() / want.norm())


def quantizer(kind: str, k: int) -> Callable[[int], tuple[Callable[[], Any], Callable[[], torch.Tensor], float]]:
    """rows -> (fused kernel on fixed tensors, what it should see in fp32 by plain torch, bytes it moves)."""
    from turboquant.kernels.cuda import rows

    def make(m: int) -> Any:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        x[:, :: k // 7] *= 30  # a few large channels, as models have them
        moved = m * k * 3 + 4 * m
        if kind == "norm":
            w = torch.rand(k, device="cuda").add(0.5).bfloat16()
            exact = lambda: F.rms_norm(x.float(), (k,), None, 1e-6).bfloat16().float() * w.float()  # noqa: E731
            return lambda: rows.norm_quantize(x, w, NormRule(1e-6), A8)[1], exact, moved + 2 * m * k
        if kind == "gate":
            g = torch.randn_like(x)
            exact = lambda: F.silu(g.float()).bfloat16().float() * x.float()  # noqa: E731
            return lambda: rows.gate_quantize(g, x, "silu", A8), exact, moved + 2 * m * k
        return lambda: rows.quantize(x, A8), lambda: x.float(), moved

    return make


def bench_shape(name: str, args: argparse.Namespace, failed: list[str]) -> list[dict[str, Any]]:
    """Rows of one shape."""
    n, k, kind = SHAPES[name]
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    copies = max(1, min(32, -(-COLD // w.nbytes)))
    dense, rows = [w.clone() for _ in range(copies)], []
    base: dict[int, float] = {}
    for m in args.rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        base[m] = median_ms([lambda v=v, x=x: F.linear(x, v) for v in dense], args.replays)
        moved = w.nbytes + x.nbytes + 2 * m * n
        rows.append(line(name, n, k, m, "bf16", base[m], base[m], None, moved, args))
    del dense
    make = quantizer(kind, k)
    quant: dict[int, float] = {}
    for m in args.rows:
        call, exact, moved = make(m)
        want = exact()
        bound = 2 * relative(decode_int8(encode_int8(want.bfloat16())), want)
        error = relative(decode_int8(call()), want)
        if not error <= bound:
            failed.append(f"{name} M={m} quantize-{kind}: error {error:.5f} over {bound:.5f}")
            continue
        quant[m] = median_ms([call] * 8, args.replays)
        rows.append(line(name, n, k, m, f"quantize-{kind}", quant[m], base[m], None, moved, args))
    for variant in args.variants:
        recipe, bits = VARIANTS[variant]
        packed = PackedTensor.quantize(rotate(w.float()) if bits == 8 else w, recipe, None, bits == 8)
        copies = max(1, min(64, -(-COLD // packed.nbytes)))
        began = time.time()
        layers = [prepare(packed, bits, torch.bfloat16) for _ in range(copies)]
        print(f"{name} {variant}: {copies} copies prepared in {time.time() - began:.0f} s", file=sys.stderr)
        decoded = packed.dequantize()
        for m in args.rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            if bits == 8:
                q = encode_int8(x)
                codes, unit = q.codes, q.unit
                operand = codes.float() * unit
            else:
                codes, unit, operand = x, None, x.float()
            torch.backends.cuda.matmul.allow_tf32 = False
            want = operand @ decoded.T
            bound = 2 * relative(operand.bfloat16() @ decoded.bfloat16().T, want)
            error = relative(multiply(layers[0], packed, codes, unit), want)
            if not error <= bound:
                failed.append(f"{name} M={m} {variant}: error {error:.5f} over {bound:.5f}")
                continue
            product = lambda v, c=codes, u=unit, p=packed: multiply(v, p, c, u)  # noqa: E731
            gemm = median_ms([lambda v=v, f=product: f(v) for v in layers], args.replays)
            total = gemm
            if bits == 8 and m in quant:
                call = make(m)[0]

                def both(v: Any, call: Any = call, packed: Any = packed) -> torch.Tensor:
                    r = call()
                    return multiply(v, packed, r.codes, r.unit)

                total = median_ms([lambda v=v: both(v) for v in layers], args.replays)
            moved = packed.nbytes + codes.nbytes + 2 * m * n
            rows.append(
                line(name, n, k, m, variant, gemm, base[m], total, moved, args) | {"error": error, "bound": bound}
            )
        del layers, decoded
    return rows


def line(
    shape: str, n: int, k: int, m: int, variant: str, ms: float, base: float, total: float | None, moved: int, args: Any
) -> dict[str, Any]:
    """One row; bound_ms is what reading and writing its bytes takes at --bandwidth."""
    out = {"shape": shape, "n": n, "k": k, "m": m, "variant": variant, "gemm_ms": ms, "bytes": moved}
    out |= {"bound_ms": moved / args.bandwidth / 1e9, "bf16_ms": base}
    if total is not None:
        out |= {"total_ms": total, "gemm_speedup": base / ms, "total_speedup": base / total}
        out |= {"overhead_percent": 100 * (total / ms - 1)}
    return out


def markdown(rows: list[dict[str, Any]]) -> str:
    """Two tables: milliseconds and speedup of each variant, and the cost of quantizing."""
    out = ["| shape | M | bf16 ms | variant | gemm ms | bound ms | total ms | × bf16 | quantizing adds |"]
    out.append("|" + "---|" * 9)
    for r in rows:
        if "total_ms" in r:
            out.append(
                f"| {r['shape']} {r['n']}×{r['k']} | {r['m']} | {r['bf16_ms']:.4f} | {r['variant']} | "
                f"{r['gemm_ms']:.4f} | {r['bound_ms']:.4f} | {r['total_ms']:.4f} | {r['total_speedup']:.2f} | "
                f"{r['overhead_percent']:+.0f} % |"
            )
    out += ["", "| after | width | M | quantize ms | bound ms |", "|---|---|---|---|---|"]
    for r in rows:
        if r["variant"].startswith("quantize"):
            kind = r["variant"].removeprefix("quantize-")
            out.append(f"| {kind} | {r['k']} | {r['m']} | {r['gemm_ms']:.4f} | {r['bound_ms']:.4f} |")
    return "\n".join(out)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Overhead of quantizing over the rows, and the speedup over bf16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for shape in dict.fromkeys(r["shape"] for r in rows):
        some = [r for r in rows if r["shape"] == shape and r["variant"] == "w4a8"]
        left.plot([r["m"] for r in some], [r["overhead_percent"] for r in some], marker="o", label=shape)
        right.plot([r["m"] for r in some], [r["total_speedup"] for r in some], marker="o", label=shape)
    for axis, title in ((left, "quantizing adds, % of the w4a8 product"), (right, "w4a8 in all, × bf16")):
        axis.set(xscale="log", xlabel="rows", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """See the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    p.add_argument("--replays", type=int, default=20)
    p.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy reaches")
    p.add_argument("--json", type=Path)
    p.add_argument("--png", type=Path)
    p.add_argument("--commit", help="what was measured, where git cannot say")
    args = p.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in args.shapes:
        rows += bench_shape(name, args, failed)
        if args.json:
            args.json.write_text(
                json.dumps({"machine": machine(args.commit), "failed": failed, "rows": rows}, indent=1)
            )
    print(markdown(rows))
    if args.png:
        plot(rows, args.png)
    if failed:
        sys.exit("error: no figure for what does not compute rightly:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
