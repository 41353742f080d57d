"""The CPU backend's contract: what it refuses, and with which words; what it leaves to the reference."""

import pytest
import torch

from turboquant.kernels import ops
from turboquant.kernels.cpu import cache as cpu
from turboquant.layers.cache import LayerCache
from turboquant.recipe import parse_recipe

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the native module is not built")


@pytest.fixture(autouse=True)
def _on_cpu():
    with ops.use_backend("cpu"):
        yield


def chunk(n):
    """Queries, keys and values of n tokens: 4 heads on 2."""
    g = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, heads, n, 64, generator=g) for heads in (4, 2, 2))


def filled(tokens):
    cache = LayerCache(parse_recipe("kv4").kv)
    cache.step(*chunk(tokens))
    return cache


def test_an_isa_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("TURBOQUANT_CPU_ISA", "avx1024")
    why = cpu.supports("cache_append", None, torch.device("cpu"))
    assert "avx1024" in why and "portable" in why


def test_an_isa_asked_for_later_is_not_passed_over(monkeypatch):
    cache = filled(60)
    cache.step(*chunk(1))
    monkeypatch.setenv("TURBOQUANT_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="avx1024 does not run here"):
        cache.step(*chunk(1))


def test_a_page_id_that_is_not_there_is_an_error():
    cache = filled(60)
    q, k, v = chunk(10)
    with pytest.raises(ValueError, match="table names no page"):
        cpu.cache_append(cache.buf, cache.layout, q, k, v, None)
    cache.buf.table = torch.full((1, 1), len(cache.buf.pages), dtype=torch.int32)
    with pytest.raises(ValueError, match="outside the pool"):
        cpu.cache_append(cache.buf, cache.layout, q, k, v, None)
    assert cache.buf.length.tolist() == [60]
    cache = filled(200)
    cache.buf.table[0, 1] = len(cache.buf.pages)
    with pytest.raises(ValueError, match="outside the pool"):
        cpu.cache_attention(cache.buf, cache.layout, q, k, v)


@pytest.mark.parametrize(
    "break_", [{"length": lambda t: t.int()}, {"ring_v": lambda t: t[:, :, 1:].clone()}, {"pages": lambda t: t[:, :1]}]
)
def test_buffers_that_do_not_match_are_refused(break_):
    cache = filled(70)
    q, k, v = chunk(1)
    for name, f in break_.items():
        setattr(cache.buf, name, f(getattr(cache.buf, name)))
    with pytest.raises(ValueError, match=rf"CacheBuffers\.{next(iter(break_))} must be"):
        cpu.cache_attention(cache.buf, cache.layout, q, k, v)


@pytest.fixture(params=["exchange table", "methods"])
def described(request):
    """Both ways by which the native module learns where a tensor lies."""
    if request.param == "exchange table" and cpu._exchange() is None:
        pytest.skip("torch before 2.10 has no such table: the module uses methods there, the other case")
    if request.param == "methods":
        cpu._native.use_tensors(torch.Tensor, cpu._KINDS, None)
    yield
    cpu._native.use_tensors(torch.Tensor, cpu._KINDS, cpu._exchange())


def test_tensors_are_found_where_they_lie(described):
    """Strides, offsets into storage, one sequence of several, a mask and sinks: as copies of their own."""
    want, cache = filled(200), filled(200)
    for n in (1, 3):
        q, k, v = (torch.nn.functional.pad(x, (8, 24, 1, 2)) for x in chunk(n))
        q, k, v = (x[:, :, 1 : n + 1, 8:72].expand(1, -1, -1, -1) for x in (q, k, v))
        mask, sinks = torch.ones(1, 1, n, n).tril() - 1, torch.linspace(-1, 1, 4)
        args = (torch.ones(1, n + 2, dtype=torch.bool)[:, 1:-1], mask, 0.1, 90, 20.0, sinks)
        got = cpu.cache_attention(cache.buf, cache.layout, q, k, v, *args)
        with ops.use_backend("reference"):
            near = ops.cache_attention(want.buf, want.layout, *(x.clone() for x in (q, k, v)), *args)
        torch.testing.assert_close(got, near, rtol=1e-5, atol=1e-5)
        for one, f in ((cache, cpu.cache_append), (want, ops.cache_append)):
            f(one.buf, one.layout, q, k, v, None)
    assert torch.equal(cache.buf.ring_k, want.buf.ring_k) and cache.buf.length.tolist() == [204]


def test_buffers_elsewhere_or_of_another_shape_are_refused(described):
    cache = filled(70)
    q, k, v = chunk(1)
    for name in ("pages", "length", "tracker"):
        kept = getattr(cache.buf, name)
        for wrong in (kept.to("meta"), kept[..., None]):
            setattr(cache.buf, name, wrong)
            with pytest.raises(ValueError, match=rf"CacheBuffers\.{name} must be"):
                cpu.cache_attention(cache.buf, cache.layout, q, k, v)
        setattr(cache.buf, name, kept)
    cpu.cache_attention(cache.buf, cache.layout, q, k, v)


def test_a_chunk_that_does_not_match_is_refused():
    cache = filled(70)
    q, k, v = chunk(2)
    for wrong in ((q, k, v[:, :, :1], None), (q[..., :32], k, v, None), (q, k, v, torch.ones(1, 3, dtype=torch.bool))):
        with pytest.raises(ValueError, match=r"do not match|valid must be"):
            cpu.cache_append(cache.buf, cache.layout, *wrong)
    assert cache.buf.length.tolist() == [70]


def test_it_is_the_first_choice_and_what_it_cannot_do_says_so():
    """A float64 cache, or an argument that wants a gradient, goes to the reference; asked for, it is refused."""
    cpu_device = torch.device("cpu")
    with ops.use_backend("auto"):
        assert {row["kernel"] for row in ops.explain()} == {"cpu"}
        rows = ops.explain(dtype=torch.float64)
        assert all(r["kernel"] == "reference" and r["why"].endswith("cpu serves no float64 cache") for r in rows)
        name, why = ops.choose("cache_attention", None, cpu_device, ops.Chunk(torch.float32, grad=True))
        assert name == "reference" and "no gradients" in why
    with pytest.raises(ops.BackendError, match="serves no float64"):
        ops.choose("cache_append", None, cpu_device, ops.Chunk(torch.float64))
    q, k, v = chunk(70)
    q.requires_grad_()
    with pytest.raises(ops.BackendError, match="no gradients"):
        LayerCache(parse_recipe("kv4").kv).step(q, k, v)
    with torch.no_grad():
        LayerCache(parse_recipe("kv4").kv).step(q, k, v)
    with ops.use_backend("auto"):
        LayerCache(parse_recipe("kv4").kv).step(q, k, v).sum().backward()
    assert q.grad.abs().sum() > 0
