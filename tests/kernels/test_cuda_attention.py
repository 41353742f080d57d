"""The CUDA decode attention against the reference on the same buffers.

Without a GPU its source runs with CUDA's threads as fibers of the CPU (emulation/); with one, on it.
"""

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from turboquant.kernels import reference
from turboquant.kernels.cuda import append, common, nvrtc
from turboquant.kernels.cuda import attention as cuda
from turboquant.layers.cache import LayerCache
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A layer and a chunk: `lengths` tokens stand in the cache, `n` more come."""

    recipe: str = "kv4"
    d: int = 128
    hq: int = 8
    h: int = 2
    n: int = 1
    lengths: tuple[int, ...] = (700, 333)
    window: int | None = None
    softcap: float | None = None
    extra: bool = False
    scaling: float | None = None
    dtype: torch.dtype = BF16


CASES = [
    *(Case(d=d, dtype=t) for d in common.HEAD_DIMS for t in (BF16, F16)),
    *(Case(recipe=r, d=d) for r in ("k4v3", "kv3", "kv2", "kv8") for d in (64, 128, 256)),
    *(Case(recipe=r, d=96) for r in ("kv3", "kv2", "kv8")),
    *(Case(recipe=r, d=80) for r in ("kv2", "kv8")),
    *(Case(hq=2 * g) for g in (1, 3, 5, 7, 8, 9, 16)),
    *(Case(n=n, hq=hq) for n in (2, 3, 5, 8) for hq in (2, 8, 32)),
    *(Case(d=d, n=8, hq=14) for d in common.HEAD_DIMS),
    Case(d=64, hq=14, n=4, dtype=F16),
    Case(lengths=(0, 1, 63, 64, 65, 127, 128)),
    Case(lengths=(0, 1, 63, 64, 65, 127, 128), n=3),
    Case(lengths=(191, 192, 193, 195, 196, 255, 256, 319), n=4),
    Case(lengths=(3000, 5, 129)),
    Case(lengths=tuple(range(40, 2000, 47)), hq=4, h=1, d=64),
    Case(lengths=(700,), hq=32, h=8),
    Case(lengths=(900,) * 32, hq=32, h=8),
    *(Case(window=w, n=n) for w in (1, 50, 128, 130, 300, 650) for n in (1, 4)),
    Case(softcap=3.0),
    Case(softcap=5.0, extra=True, window=300, scaling=0.3, n=3),
    Case(extra=True, hq=32, dtype=F16),
    Case(extra=True, lengths=(0, 0)),
    Case(recipe="kv4:ring=0,sinks=0,rewind=0"),
    Case(recipe="kv4:ring=1,sinks=0,rewind=3", n=2),
    Case(recipe="kv4:ring=300,sinks=40", n=2),
    Case(recipe="kv4:hot=0"),
    Case(recipe="kv4:hot=13", hq=6),
    Case(recipe="kv4:hot=16", d=64, n=2),
]


def filled(case: Case, tokens, device="cuda") -> tuple[LayerCache, list[torch.Tensor]]:
    """A cache with the tokens of `lengths`, as the reference writes them, and the next chunk."""
    longest = max(case.lengths)
    some = [tokens(case.hq, case.h, longest + case.n, case.d, seed=i) for i in range(len(case.lengths))]
    q, k, v = (torch.stack(x).to(device, case.dtype) for x in zip(*some, strict=True))
    cache = LayerCache(parse_recipe(case.recipe).kv, case.window)
    if longest:
        valid = torch.arange(longest)[None] < torch.tensor(case.lengths)[:, None]
        some = [x[:, :, :longest] for x in (q, k, v)]
        cache._start(k)
        cache._reserve(list(case.lengths))
        reference.cache_append(cache.buf, cache.layout, *some, valid.to(device))
        cache._came(list(case.lengths), max(case.lengths))
    else:
        cache._start(k)
    return cache, [x[:, :, longest:] for x in (q, k, v)]


def options(case: Case, device="cuda") -> dict:
    extra = torch.linspace(-1, 2, case.hq, device=device) if case.extra else None
    return dict(scaling=case.scaling, window=case.window, softcap=case.softcap, sink_logits=extra)


class Gather(reference._Softmax):
    """Collects what the reference attends to, and answers as plain torch would in the dtype `coarse`."""

    coarse = BF16

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.parts = []

    def add(self, k, v, see) -> None:
        self.parts.append((k, torch.where(v.isfinite(), v, 0.0), see))

    def result(self):
        k, v, see = (torch.cat(x, dim) for x, dim in zip(zip(*self.parts, strict=True), (2, 2, 2), strict=True))
        k, v, q = (
            torch.where(see.any(1)[:, None, :, None], k, 0.0).to(self.coarse),
            v.to(self.coarse),
            self.q.to(self.coarse),
        )
        logits = torch.einsum("bhgnd,bhmd->bhgnm", q, k).float() * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.masked_fill(~see[:, None, None], -torch.inf)
        sink = torch.where(self.sum > 0, self.top, -torch.inf).unsqueeze(-1)
        p = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1].nan_to_num(0.0)
        return torch.einsum("bhgnm,bhmd->bhgnd", p.to(self.coarse), v).float()


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_within_twice_the_error_of_plain_torch(case, tokens, monkeypatch):
    check(case, tokens, monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize("n, dtype", [(1, BF16), (8, BF16), (1, F16)])
@pytest.mark.parametrize("recipe", ["kv4", "k4v3"])
def test_so_it_is_on_captured_keys_and_values(recipe, n, dtype, real, monkeypatch):
    """Two heads of Qwen2.5 whose keys have outliers."""

    def captured(hq, h, m, d, seed):
        name = ("qwen_a", "qwen_b")[seed]
        return tuple(real[f"{name}.{x}"][:, :m] for x in "qkv")

    check(Case(recipe, 64, 2, 1, n, (264, 200), dtype=dtype), captured, monkeypatch)


def check(case: Case, tokens, monkeypatch, device="cuda") -> None:
    cache, (q, k, v) = filled(case, tokens, device)
    args, more = (cache.buf, cache.layout), options(case, device)
    got = cuda.cache_attention(*args, q, k, v, **more)
    truth = reference.cache_attention(*args, q.float(), k, v, **more)
    monkeypatch.setattr(Gather, "coarse", case.dtype)
    monkeypatch.setattr(reference, "_Softmax", Gather)
    coarse = reference.cache_attention(*args, q.float(), k, v, **more)
    mine, theirs = rms(got.float() - truth), rms(coarse - truth)
    floor = torch.finfo(case.dtype).eps * rms(truth) / 4
    assert mine <= 2 * max(theirs, floor), (mine, theirs, rms(truth))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "case",
    [
        Case(n=5), Case(n=8, hq=32), Case(n=3, hq=2, d=64, lengths=(250, 190)), Case(n=4, window=300),
        Case(n=4, lengths=(126, 700, 637, 1215)),
    ],
)  # fmt: skip
def test_rows_of_a_verify_step_have_the_bits_of_single_steps(case, tokens):
    compare_rows(case, tokens, "cuda")


def compare_rows(case: Case, tokens, device) -> None:
    """Also where later rows of a sequence read a page and the first does not."""
    cache, (q, k, v) = filled(case, tokens, device)
    more = options(case, device)
    together = cuda.cache_attention(cache.buf, cache.layout, q, k, v, **more)
    for i in range(case.n):
        qi, ki, vi = (x[:, :, i : i + 1] for x in (q, k, v))
        alone = cuda.cache_attention(cache.buf, cache.layout, qi, ki, vi, **more)
        assert torch.equal(alone, together[:, :, i : i + 1]), i
        cache._reserve([1] * len(case.lengths))
        reference.cache_append(cache.buf, cache.layout, qi, ki, vi, None)
        cache.lengths = [n + 1 for n in cache.lengths]


@pytest.fixture(params=[(2, 2)])
def emulated(monkeypatch, emulation, request):
    """`cuda.cache_attention` on CPU tensors, as of a chip of so many multiprocessors with so many warps each."""
    multiprocessors, warps = request.param

    def kernel(layout, dtype, group, rows, many, cap, device):
        height, tiles = cuda.tiles_of(layout, group, rows)
        run = emulation("attend", cuda.config(layout, dtype, height, tiles, warps, many, cap)).run
        at = dict(block_warps=warps, blocks=multiprocessors, shared=0)
        return SimpleNamespace(rows=height * tiles, **at, attend=(run, b"attend"))

    def launch(kernel, blocks, threads, shared, device, call, after=False):
        run, name = kernel
        run(name, ctypes.byref(call), *blocks, threads)

    monkeypatch.setattr(cuda, "_kernel", kernel)
    monkeypatch.setattr(nvrtc, "launch", launch)


EMULATED = [
    Case(),
    Case(d=64, hq=2, h=1, dtype=F16),
    Case(recipe="kv8", d=80, hq=5, h=1, lengths=(300,)),
    Case(recipe="k4v3", d=96, hq=16, h=1, lengths=(300,)),
    Case(recipe="kv2", d=256, hq=4, h=1, lengths=(270,)),
    Case(recipe="kv4:hot=13", hq=6, lengths=(400,)),
    Case(softcap=5.0, extra=True, window=300, scaling=0.3, n=3, lengths=(500,)),
    Case(lengths=(0, 1, 63, 64, 65, 127, 128), hq=2, h=1, n=2),
]


@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_the_source_on_the_cpu_is_within_twice_the_error_of_plain_torch(case, tokens, monkeypatch, emulated):
    check(case, tokens, monkeypatch, "cpu")


@pytest.mark.parametrize("emulated", [(1, 16), (5, 1), (7, 8), (3, 4), (4, 16)], indirect=True, ids=str)
@pytest.mark.parametrize("lengths", [(700, 333), (0, 1, 63, 64, 65, 127, 128), (60, 60)], ids=str)
def test_so_it_is_however_the_work_is_cut(lengths, tokens, monkeypatch, emulated):
    """Of one block and of many, whose shares are many KV heads or parts of one; of equal lengths whole ones."""
    check(Case(lengths=lengths, d=64, n=2, hq=4, h=2, extra=True), tokens, monkeypatch, "cpu")


@pytest.mark.parametrize(
    "case",
    [
        Case(n=3, hq=16, lengths=(260,), dtype=F16), Case(n=2, hq=4, h=1, lengths=(260,)),
        Case(n=4, d=64, hq=2, h=1, lengths=(126, 330)),
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_a_verify_step_have_the_bits_of_single_steps_on_the_cpu(case, tokens, emulated):
    compare_rows(case, tokens, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("n", [1, 4])
def test_a_value_that_is_not_finite_reaches_only_its_readers(n, tokens):
    poison(Case(n=n, lengths=(300, 300)), tokens, "cuda")


@pytest.mark.parametrize("lengths", [(300, 300), (60, 60)], ids=["pages", "no pages"])
def test_a_value_that_is_not_finite_reaches_only_its_readers_on_the_cpu(lengths, tokens, emulated):
    poison(Case(n=2, lengths=lengths), tokens, "cpu")


def poison(case: Case, tokens, device) -> None:
    n = case.n
    cache, (q, k, v) = filled(case, tokens, device)
    clean = cuda.cache_attention(cache.buf, cache.layout, q, k, v)
    v = v.clone()
    v[0, 1, n - 1, 5] = torch.nan
    got = cuda.cache_attention(cache.buf, cache.layout, q, k, v)
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[0, 4:, n - 1] = True  # rows of the KV head that read the last token
    assert got[0, 4:, n - 1, 5].isnan().all()
    # the readers' other channels and the others' sums run in another order there: one rounding apart
    eps = torch.finfo(got.dtype).eps
    hit[..., :5] = hit[..., 6:] = False
    assert torch.allclose(got[~hit].float(), clean[~hit].float(), rtol=2 * eps, atol=eps * rms(clean))


def test_more_tokens_than_work_is_cut_for_are_refused(tokens):
    """Checked before anything needs a GPU."""
    cache, (q, k, v) = filled(Case(n=9, hq=2), tokens, "cpu")
    with pytest.raises(ValueError, match="9 tokens a sequence are more than 8"):
        cuda.cache_attention(cache.buf, cache.layout, q, k, v)


@pytest.mark.cuda
def test_it_runs_in_a_cuda_graph(tokens):
    case = Case(n=1, lengths=(500, 90))
    cache, (q, k, v) = filled(case, tokens)
    want = cuda.cache_attention(cache.buf, cache.layout, q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cuda.cache_attention(cache.buf, cache.layout, q, k, v)
    got.fill_(torch.nan)
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.cuda
def test_graphs_that_run_at_once_do_not_disturb_each_other(tokens):
    graphs, got, want, kept = [], [], [], []
    for lengths in ((5000, 90), (700, 2000), (64, 3000)):  # KV heads that lie in several blocks
        cache, qkv = filled(Case(lengths=lengths), tokens)
        want.append(cuda.cache_attention(cache.buf, cache.layout, *qkv))
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(20):
                got.append(cuda.cache_attention(cache.buf, cache.layout, *qkv))
        kept.append((cache, qkv))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for i, x in enumerate(got):
        assert torch.equal(x, want[i // 20]), i


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("d, rows", [(64, 7), (128, 4), (128, 32), (256, 8)])
def test_the_sources_compile(d, rows, arch):
    assert nvrtc.missing() is None

    layout = PageLayout(parse_recipe("kv4").kv, d)
    source = cuda.config(layout, BF16, *cuda.tiles_of(layout, rows, rows), 4, rows == 32, rows == 7)
    assert nvrtc.compile_source("attention.cu", source, arch)[:4] == b"\x7fELF"


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("recipe, d", [("kv4", 128), ("k8v2", 80), ("k4v3", 256), ("kv4:hot=0", 64)])
def test_the_sources_of_append_compile(recipe, d, arch):
    assert nvrtc.missing() is None
    source = append.config(PageLayout(parse_recipe(recipe).kv, d), F16)
    assert nvrtc.compile_source("append.cu", source, arch)[:4] == b"\x7fELF"
