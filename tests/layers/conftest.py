"""The fixtures of tests/kernels (both are about the same cache), and what a sequence's state is."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "kernels_conftest", Path(__file__).parents[1] / "kernels" / "conftest.py"
)
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
close, oracle, poison, real, run, tokens = (
    getattr(_shared, name) for name in ("close", "oracle", "poison", "real", "run", "tokens")
)


@pytest.fixture(scope="session")
def state():
    """(cache, row, rewind) -> everything that later steps can read of a sequence, after taking back up to `rewind`."""
    from turboquant.packed.buffers import READER_STRIDE, STATES

    def read(cache, i, rewind=None):
        buf, kv, n = cache.buf, cache.kv, cache.lengths[i]
        back = n - (kv.rewind if rewind is None else rewind)  # the shortest it may become
        opened = max(0, back) // kv.page * kv.page
        assert buf.length[i] == n and len(cache._pages[i]) == n // kv.page
        ring = range(max(0, min(back - kv.ring + 1, opened)), n)
        samples = range(opened // READER_STRIDE, n // READER_STRIDE)
        updates = range(max(0, opened // kv.page - 1), n // kv.page)
        reach = 0 if cache.window is None else back - cache.window + 1
        seen = {p: at for p, at in enumerate(cache._pages[i]) if (p + 1) * kv.page > reach}
        assert min(seen.values(), default=0) >= 0, "a page was released that a query can reach"
        out = {f"page {p}": buf.pages[at] for p, at in seen.items()}
        for name in ("ring_k", "ring_v"):
            t = getattr(buf, name)[i]
            out |= {f"{name} {p}": t[:, p % t.shape[1]] for p in ring}
        for name in ("sink_k", "sink_v"):
            out |= {f"{name} {p}": getattr(buf, name)[i, :, p] for p in range(min(n, kv.sinks))}
        out |= {f"reader {p}": buf.readers[i, :, p % buf.readers.shape[2]] for p in samples}
        if kv.codec == "live":
            out |= {f"tracker {p}": buf.tracker[i, p % STATES] for p in updates}
        assert all(x.isfinite().all() for x in out.values() if x.is_floating_point()), "poison was read"
        return {name: x.clone() for name, x in out.items()}

    return read


@pytest.fixture(scope="session")
def same():
    """(a, b): two results of `state` agree bit for bit."""
    import torch

    def check(a, b):
        assert a.keys() == b.keys()
        for name, x in a.items():
            assert torch.equal(x, b[name]), f"{name} differs"

    return check


@pytest.fixture(scope="session")
def make():
    """(recipe, n, k, bias) -> (a QuantLinear of random numbers, its float weight)."""
    import torch

    from turboquant.layers.linear import QuantLinear
    from turboquant.recipe import parse_recipe

    def random(recipe, n=48, k=96, bias=True):
        layer = QuantLinear(k, n, bias, parse_recipe(recipe))
        w = torch.randn(n, k)
        if layer.recipe.weights is None:
            layer.weight.data = w
        layer.slot.load(w)
        if layer.slot.tracked:
            layer.slot.start()
        if bias:
            layer.bias.data = torch.randn(n)
        return layer.eval(), w

    return random


@pytest.fixture(scope="session")
def seeded(make):
    """(recipe, seed) -> a QuantLinear, the same one for the same seed."""
    import torch

    def layer(recipe, seed=0):
        torch.manual_seed(seed)
        return make(recipe)[0]

    return layer
