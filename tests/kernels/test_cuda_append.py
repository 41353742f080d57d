"""The CUDA cache_append against the reference on the CPU: every buffer bit for bit.

Without a GPU its source runs with CUDA's threads as fibers of the CPU (emulation/); with one, on it.
"""

import ctypes
import threading
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

from turboquant.kernels import reference
from turboquant.kernels.cuda import append, nvrtc
from turboquant.layers.cache import LayerCache
from turboquant.maths.codec import TRIALS, code_edges, log_decode, search_levels
from turboquant.packed.buffers import CacheBuffers
from turboquant.recipe import parse_recipe

BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A layer and the chunks that come, for all sequences alike."""

    recipe: str = "kv4"
    d: int = 128
    hq: int = 8
    h: int = 2
    chunks: tuple[int, ...] = (70, 1, 57, 1, 1, 9, 200)
    dtype: torch.dtype = BF16
    batch: int = 2
    states: int = 2  # of the tracker


CASES = [
    *(Case(d=d, dtype=t) for d in (64, 80, 96, 128, 256) for t in (BF16, F16)),
    *(Case(recipe=r, d=d) for r in ("k4v3", "kv3", "kv2", "kv8", "k8v2") for d in (64, 128)),
    Case(recipe="kv4:hot=0"),
    Case(recipe="kv4:hot=16", hq=2),
    Case(recipe="kv4:ring=300,sinks=40"),
    Case(recipe="kv4:ring=0,sinks=0,rewind=0"),
    Case(recipe="kv4:decay=0.5,blend=1"),
    Case(chunks=(1,) * 66 + (64, 64, 65, 63)),
    Case(chunks=(1000, 1, 130), hq=14, d=64),
    Case(chunks=(130, 70), batch=1),
    Case(chunks=(70, 1, 57, 1000), states=6),
]


def start(case: Case, device: str) -> LayerCache:
    cache = LayerCache(parse_recipe(case.recipe).kv)
    cache._start(torch.empty(case.batch, case.h, 1, case.d, dtype=case.dtype, device=device))
    cache.buf.tracker = torch.zeros(case.batch, case.states, case.h, 3, case.d, device=device)
    cache.buf.readers.zero_()
    return cache


def advance(cache: LayerCache, op, chunk) -> None:
    n = chunk[0].shape[2]
    cache._reserve([n] * len(cache.lengths))
    op(cache.buf, cache.layout, *chunk, None)
    cache.lengths = [x + n for x in cache.lengths]


def compare(case: Case, odd: bool, tokens, device: str) -> None:
    total = sum(case.chunks)
    some = [tokens(case.hq, case.h, total, case.d, case.dtype, s) for s in (1, 2)][: case.batch]
    q, k, v = (torch.stack(x) for x in zip(*some, strict=True))
    if odd:
        k[0, 0, 5, 3], v[-1, -1, 30, 7], k[-1, 0, 31] = torch.nan, torch.inf, 0
        q[0, :, 7] = torch.nan
        v[0, 0, 40] = 60000  # usable, but its scale is beyond fp16
    want, got = start(case, "cpu"), start(case, device)
    at = 0
    for n in case.chunks:
        part = [x[:, :, at : at + n] for x in (q, k, v)]
        advance(want, reference.cache_append, part)
        advance(got, append.cache_append, [x.to(device) for x in part])
        at += n
    for f in fields(CacheBuffers):
        a, b = getattr(want.buf, f.name), getattr(got.buf, f.name).cpu()
        if a.dtype.is_floating_point:
            a, b = a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)
        if f.name == "pages":
            a, b = a[want.buf.table.long().flatten()], b[got.buf.table.cpu().long().flatten()]
        assert torch.equal(a, b), (f.name, (a != b).sum().item(), a.numel())


@pytest.mark.cuda
@pytest.mark.parametrize("odd", [False, True], ids=["finite", "odd"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_buffer_has_the_bits_of_the_reference(case, odd, tokens):
    compare(case, odd, tokens, "cuda")


CAPTURED = [
    Case(recipe=r, d=64, hq=2, h=1, chunks=(50, 1, 13, 199, 1, 8), dtype=t)
    for r in ("kv4", "k4v3")
    for t in (BF16, F16)
]


@pytest.fixture
def captured(real):
    """As `tokens`: two heads of Qwen2.5 whose keys have outliers."""

    def make(hq, h, n, d, dtype, seed):
        name = ("qwen_a", "qwen_b")[seed - 1]
        return tuple(real[f"{name}.{x}"][:, :n].to(dtype) for x in "qkv")

    return make


@pytest.mark.cuda
@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_captured_keys_and_values_have_the_bits_of_the_reference(case, captured):
    compare(case, False, captured, "cuda")


EMULATED = [
    Case(chunks=(70, 1, 57, 1)),
    Case(chunks=(60, 3, 1, 130), dtype=F16, d=64, hq=6),
    Case(recipe="k4v3", d=96, chunks=(63, 1, 65)),
    Case(recipe="kv3:hot=7", d=80, chunks=(64, 66)),
    Case(recipe="k8v2", d=64, dtype=F16, chunks=(130,)),
    Case(recipe="kv4:hot=0,sinks=9,decay=0.5,blend=1", d=64, chunks=(64, 64)),
    Case(d=256, h=1, hq=2, chunks=(66,)),
    Case(recipe="kv4:ring=0,sinks=0,rewind=0", d=64, chunks=(70, 59, 1, 200)),
    Case(chunks=(130,), batch=1),
    Case(d=64, chunks=(70, 58, 1, 300), states=4),
]


@pytest.fixture
def emulated(monkeypatch, emulation):
    """`append.cache_append` on CPU tensors, whose counters are 0 behind every call, as the next one needs them."""
    counters = torch.zeros(64, dtype=torch.int32)

    def kernels(layout, dtype, device):
        library = emulation("append", append.config(layout, dtype))
        return [(library, name) for name in (b"encode", b"rows", b"stats", b"store")]

    def launch(kernel, blocks, threads, shared, device, call, after=False):
        kernel[0].run(kernel[1], ctypes.byref(call), *blocks, threads)
        assert kernel[1] != b"store" or not counters.any()

    monkeypatch.setattr(append, "zeros", lambda count, device: counters[:count])
    monkeypatch.setattr(append, "_kernels", kernels)
    monkeypatch.setattr(nvrtc, "launch", launch)


@pytest.mark.parametrize("odd", [False, True], ids=["finite", "odd"])
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_the_source_on_the_cpu_writes_the_bits_of_the_reference(case, odd, tokens, emulated):
    compare(case, odd, tokens, "cpu")


def test_the_source_on_the_cpu_encodes_captured_keys_and_values(captured, emulated):
    compare(CAPTURED[0], False, captured, "cpu")


def test_threads_take_turns_where_kernels_hand_counters_on(tokens, monkeypatch):
    """Of one stream: kernels of another call in between would find the counters of this one."""
    case, launched, others = Case(batch=1), [], []
    q, k, v = (x[None] for x in tokens(case.hq, case.h, 130, case.d, case.dtype))

    def call():
        cache = start(case, "cpu")
        cache._reserve([130])
        append.cache_append(cache.buf, cache.layout, q, k, v, None)

    def launch(kernel, *args, **options):
        launched.append(kernel)
        if len(launched) == 1:
            others.append(threading.Thread(target=call))
            others[0].start()
            others[0].join(0.5)

    monkeypatch.setattr(append, "_kernels", lambda *args: ("encode", "rows", "stats", "store"))
    monkeypatch.setattr(nvrtc, "launch", launch)
    call()
    others[0].join()
    assert launched == ["stats", "rows", "store"] * 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_segments_of_the_search_have_its_levels(bits):
    of_cell, steps = append.segments(bits)
    levels = torch.zeros(len(TRIALS), of_cell[-1] + 1, dtype=torch.int64)
    squares = levels.clone()
    for segment, trial, step, square in steps:
        levels[trial, segment:] += step
        squares[trial, segment:] += square
    want = torch.tensor(search_levels(bits))
    assert torch.equal(levels[:, of_cell], want) and torch.equal(squares[:, of_cell], want**2)
    assert sorted({s for s, *_ in steps}, reverse=True) == list(dict.fromkeys(s for s, *_ in steps))  # none left out
    assert {s for s, *_ in steps} == set(of_cell)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_code_table_has_the_codes_of_all_cells(bits):
    reach = append.CODE_REACH
    cell = torch.arange(2 * reach + 1)
    got = (append.code_table(bits)[cell // append.CODE_STEP] + cell) >> 4 & 15
    assert torch.equal(got, torch.bucketize(cell - reach, torch.tensor(code_edges(bits)), right=True))
    assert append.code_table(bits).amax() < 256


@pytest.mark.parametrize("significand", [8, 11], ids=["bf16", "fp16"])
def test_a_reciprocal_of_two_numbers_divides_as_correctly_as_a_division(significand):
    """k / s in the kernel is fma(k, r, k·low): for every significand of k and every s, exact in long doubles."""
    s = log_decode(torch.arange(256, dtype=torch.uint8)).numpy()
    k = np.arange(2 ** (significand - 1), 2**significand, dtype=np.float32)[:, None]
    long = np.longdouble
    assert np.finfo(long).nmant >= 63
    r = (1 / s.astype(long)).astype(np.float32)
    low = (1 - s.astype(long) * r).astype(np.float32) * r
    assert np.array_equal((k.astype(long) * r + k * low).astype(np.float32), k / s)


@pytest.mark.cuda
def test_it_runs_in_a_cuda_graph(tokens):
    case = Case()
    q, k, v = (torch.stack([x, x]).cuda() for x in tokens(case.hq, case.h, 130, case.d, case.dtype))
    plain, graphed = start(case, "cuda"), start(case, "cuda")
    for cache in (plain, graphed):
        cache._reserve([130, 130])
        append.cache_append(cache.buf, cache.layout, q[:, :, :60], k[:, :, :60], v[:, :, :60], None)
    one = [torch.empty_like(x[:, :, :1]) for x in (q, k, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append.cache_append(graphed.buf, graphed.layout, *one, None)
    for i in range(60, 130):
        part = [x[:, :, i : i + 1] for x in (q, k, v)]
        append.cache_append(plain.buf, plain.layout, *part, None)
        for to, x in zip(one, part, strict=True):
            to.copy_(x)
        graph.replay()
    for f in fields(CacheBuffers):
        a, b = (getattr(c.buf, f.name) for c in (plain, graphed))
        assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)), f.name  # slots nobody wrote hold NaN


@pytest.mark.cuda
def test_a_prompt_runs_in_a_cuda_graph(tokens):
    """Of several pages and sequences, and again: replays find the counters of its kernels at 0."""
    case, n = Case(), 1000
    q, k, v = (torch.stack([x, x.flip(-2)]).cuda() for x in tokens(case.hq, case.h, n, case.d, case.dtype))
    plain, graphed = start(case, "cuda"), start(case, "cuda")
    for cache in (plain, graphed):
        cache._reserve([n + 40] * 2)
        append.cache_append(cache.buf, cache.layout, q[:, :, :40], k[:, :, :40], v[:, :, :40], None)
    first = {f.name: getattr(graphed.buf, f.name).clone() for f in fields(CacheBuffers)}
    append.cache_append(plain.buf, plain.layout, q, k, v, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append.cache_append(graphed.buf, graphed.layout, q, k, v, None)
    for _ in range(3):
        for name, x in first.items():
            getattr(graphed.buf, name).copy_(x)
        graph.replay()
        for f in fields(CacheBuffers):
            a, b = (getattr(c.buf, f.name) for c in (plain, graphed))
            assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)), f.name
