"""Every Triton kernel through Triton's compiler and ptxas, without a GPU; its interpreter takes what they refuse.

`make test` runs this file on its own, with TRITON_INTERPRET=0. The ops are called as on a GPU, on CPU tensors; a launch
compiles what it would have run.
"""

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "0":
    # what Triton makes of a kernel is settled when it is imported: compiled here, interpreted in test_triton.py
    pytest.skip(
        "a run of its own, with TRITON_INTERPRET=0: `make test-triton`, part of `make test`", allow_module_level=True
    )

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.kernels.fused import NormRule
from turboquant.kernels.triton import append, attention, carry, prefill, rows
from turboquant.packed.buffers import CacheBuffers
from turboquant.packed.page import PageLayout
from turboquant.recipe import ActivationRecipe, parse_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FP, BF, HF = torch.float32, torch.bfloat16, torch.float16
H, G = 2, 4
CACHE = {"_step", "_values", "_track", "_keys", "_store", "_attend", "_merge", "_dequantize", "_fold"}
TAIL, ROWS = {"_put", "_gather", "_keep"}, {"_kernel"}


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request, monkeypatch, tmp_path):
    """Names of the kernels that were launched, each compiled for a compute capability."""
    launched: set[str] = set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert grid and all(isinstance(x, int) and x > 0 for x in grid), grid
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"], self
        launched.add(self.fn.__name__)
        return kernel

    target = GPUTarget("cuda", request.param, 32)
    active = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: request.param, get_current_stream=lambda _: 0
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return launched


def buffers(layout, dtype, batch, pages=4):
    specs = CacheBuffers.specs(layout, batch, H, dtype, batch * pages, pages)
    return CacheBuffers(**{name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in specs.items()})


def tokens(n, d, dtype, batch):
    return tuple(torch.zeros(batch, heads, n, d, dtype=dtype) for heads in (G * H, H, H))


@pytest.mark.parametrize(
    "compiled, recipe, d, dtype",
    [(90, "kv4", 64, BF), (80, "plain3:page=32,ring=40", 80, HF)],
    indirect=["compiled"],
)
def test_a_layer_of_the_cache(recipe, d, dtype, compiled):
    layout = PageLayout(parse_recipe(recipe).kv, d)
    for n in (1, 200):
        chunk = tokens(n, d, dtype, 2)
        append.cache_append(buffers(layout, dtype, 2), layout, *chunk, None)
        attention.generic(buffers(layout, dtype, 2), layout, *chunk)
    buf, chunk = buffers(layout, dtype, 2), tokens(8, d, dtype, 2)
    masks, logits = (torch.ones(2, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, dtype=torch.bool)), torch.zeros(G * H)
    attention.generic(buf, layout, *chunk, *masks, None, 50, 30.0, logits)
    attention.generic(buf, layout, *chunk, partial=64)
    work = torch.zeros(2, 2, H, 128, d, dtype=dtype)
    prefill.dequantize_pages(buf, layout, 0, 2, *work)
    parts = torch.zeros(4, d), torch.zeros(4), torch.zeros(4, d, dtype=dtype), torch.zeros(4)
    prefill._fold[(4,)](*parts, D=d, DP=128, num_warps=1)
    assert compiled == CACHE


@pytest.mark.parametrize(
    "recipe, d, dtype",
    [("kv4", 128, BF), ("k4v3:ring=80,sinks=20,page=32,rewind=8", 64, HF), ("plain3:ring=64,sinks=0", 80, BF)],
)
def test_the_tail_in_blocks(recipe, d, dtype, compiled):
    layout = BlockLayout(parse_recipe(recipe).kv, d, dtype)
    pool = torch.zeros(32, H, layout.row, dtype=torch.uint8)
    page = layout.page(layout.row)
    carrier = carry.Carrier(page, layout.tokens, pool, layout.views(pool))
    table, start = torch.ones(2, 40, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    total = torch.zeros((), dtype=torch.int64)
    for n in (1, 200):
        _, k, v = tokens(n, d, dtype, 2)
        carrier.put(table, start, k, v)
        buf = carrier.gather(pool, torch.ones(2, 8, dtype=torch.int32), table, start, n)
        carrier.keep(buf, table, start, n, total, total)
    assert compiled == TAIL


@pytest.mark.parametrize("width, dtype", [(576, FP), (4096, BF)])
def test_rows_of_linear_layers(width, dtype, compiled):
    recipe = ActivationRecipe(8)
    for m in (1, 4096):
        x = torch.zeros(m, width, dtype=dtype)
        rows.quantize(x, recipe)
        rows.norm_quantize(x, torch.zeros(width, dtype=dtype), NormRule(1e-6, 0.0, False), recipe)
        for activation in ("silu", "gelu_tanh"):
            rows.gate_quantize(x, x, activation, recipe)
    assert compiled == ROWS


def test_every_kernel_of_the_package_is_here():
    """One that nobody launches above is one that nobody compiles."""
    mine = {n for m in (append, attention, carry, prefill, rows) for n, f in vars(m).items() if launchable(m, f)}
    assert mine == CACHE | TAIL | ROWS


def launchable(module, f):
    """A kernel, and no function that kernels call: it asks for its program's number."""
    return isinstance(f, JITFunction) and f.module == module.__name__ and "program_id" in f.src
