"""What our Python costs per decoded token: the time of a decode step in everything but the model and the kernels.

    python benchmarks/overhead.py MODEL [--context 512] [--tokens 32]

One process decodes with the profiler's clock around three nested layers: the whole forward pass, `LayerCache.step` with
the attention function around it, and the native calls inside. What lies between the last two is ours. The profiler is
not used (it would be measured too): the three are wrapped with a timer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from turboquant.evaluate.models import load
from turboquant.integrations.transformers import TurboQuantCache, attention
from turboquant.integrations.transformers.cache import TurboQuantLayer
from turboquant.kernels.cpu import cache as cpu


class Timer:
    """Seconds spent in wrapped functions since the last `take`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, f: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Native:
    """The native module with its two calls timed."""

    def __init__(self, module: Any, timer: Timer) -> None:
        self.module = module
        self.attention, self.append = timer.wrap(module.attention), timer.wrap(module.append)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--tokens", type=int, default=32)
    a = p.parse_args()
    if not cpu.isas():
        raise SystemExit("the native module is not built: there is nothing to measure")
    model, _ = load(a.model, dtype="bfloat16", device="cpu")
    inside, native = Timer(), Timer()
    cpu._native = Native(cpu._native, native)
    TurboQuantLayer.update = inside.wrap(TurboQuantLayer.update)  # type: ignore[method-assign]
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, inside.wrap(attention.attention_forward))
    cache = TurboQuantCache(model, "kv4")
    model.set_attn_implementation(attention.NAME)
    ids = torch.randint(0, model.config.vocab_size // 2, (1, a.context))
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    rows = []
    for _ in range(a.tokens):
        inside.take(), native.take()
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits.argmax(-1)
        whole, ours, kernels = time.perf_counter() - start, inside.take(), native.take()
        rows.append((whole, kernels, ours - kernels))
    whole, kernels, python = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
    print(f"decode step {whole:.1f} ms, native kernels {kernels:.2f} ms, our Python {python:.2f} ms")
    print(f"our Python is {100 * python / whole:.1f} % of a step ({len(cache.ours)} layers, {a.context} tokens)")


if __name__ == "__main__":
    sys.exit(main())
