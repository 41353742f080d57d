"""The CUDA product of few rows against exact integers.

Without a GPU its source runs with CUDA's threads as fibers of the CPU (emulation/); with one, on it.
"""

import ctypes
import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from itertools import product as product_of
from types import SimpleNamespace

import pytest
import torch

from turboquant.kernels.cuda import nvrtc, product, rows
from turboquant.kernels.fused import NormRule
from turboquant.kernels.linear import LinearSpec
from turboquant.packed.tensor import PackedTensor
from turboquant.recipe import ActivationRecipe

linear = importlib.import_module("turboquant.kernels.cuda.linear")  # the package has a function of this name
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A weight (n, k) and a number of rows."""

    n: int = 128
    k: int = 1024
    group: int = 0
    rows: int = 1
    stages: int = 1
    dtype: torch.dtype = BF16
    bias: bool = False


SMALL = [
    Case(),
    Case(rows=7, bias=True, dtype=F16),
    Case(rows=8, k=2560),
    Case(rows=13, k=896),
    Case(rows=16, n=64, k=640),
    Case(rows=10, n=64, k=512),
    Case(group=128),
    Case(group=128, rows=9, k=1664, bias=True),
    Case(n=256, k=3584),  # more pieces than are under way
    Case(n=256, k=3584, group=128, rows=12),
    Case(group=128, rows=4, k=512, n=64, dtype=F16),
    Case(stages=2, n=256, k=2560, rows=11),
    Case(stages=2, group=128, rows=16, n=64, k=1024, bias=True),
    *(Case(64, 4224, 128, 3, s) for s in (1, 2)),  # blocks of a cluster hold different numbers of groups
    # blocks that take outputs one after another: eight blocks on the CPU, some of which have three times as many
    *(
        Case(64 * 19, k, g, m, s, bias=m > 1)
        for k, g, m, s in ((1024, 0, 1, 1), (896, 0, 8, 1), (1152, 128, 5, 1), (640, 0, 2, 2))
    ),
    Case(64 * 9, 512, 128, 1, 2),
]
LARGE = [
    *(Case(n, k, g, m) for n, k in ((4096, 4096), (4096, 14336), (6144, 4096)) for g in (0, 128) for m in (1, 8, 16)),
    *(Case(28672, 4096, g, m) for g in (0, 128) for m in (1, 8, 16)),
    *(Case(40064, 4096, 0, m, 2) for m in (1, 8)),
    *(Case(384, 896, g, m, 1, t, True) for g in (0, 128) for m in (1, 9, 16) for t in (BF16, F16)),
    *(Case(4096, 4096, g, m, 2) for g in (0, 128) for m in (1, 9, 16)),
    *(Case(128, 18944, 0, m) for m in (2, 3, 5)),
    Case(1536, 8960, 128, 8),  # Qwen2.5-1.5B's down: eight blocks of a cluster, of 9 and 10 groups
    *(Case(8192, 28672, g, 8, s) for g in (0, 128) for s in (1, 2)),  # split for want of shared memory
]


def operands(case: Case, device: str):
    """(a weight, codes of rows, their units, bias), all drawn at random."""
    draw = torch.Generator().manual_seed(1)
    groups = case.k // (case.group or case.k)
    weight = torch.randint(0, 256, (case.stages, case.n, case.k // 2), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, 16, (case.n, groups), generator=draw, dtype=torch.uint8)
    packed = PackedTensor(weight, (torch.rand(case.n, groups, generator=draw) + 0.1).half(), zero)
    codes = torch.randint(-127, 128, (case.rows, case.k), generator=draw, dtype=torch.int8)
    unit = torch.rand(case.rows, 1, generator=draw) + 0.01
    bias = torch.randn(case.n, generator=draw).to(case.dtype) if case.bias else None
    packed = PackedTensor(*(t.to(device) for t in (packed.codes, packed.scale, packed.zero)))
    return packed, codes.to(device), unit.to(device), None if bias is None else bias.to(device)


def check(case: Case, device: str) -> None:
    """Whole rows: the integers are exact, so each output is the rounding of one fp32 expression. Groups: within twice
    what plain torch loses with the decoded weight, and the same bits again."""
    packed, codes, unit, bias = operands(case, device)
    coded = packed.coded()
    group = packed.group
    weight = [product.fragments(c, group) for c in coded.codes] + [None] * (2 - case.stages)
    got = product.multiply(*weight, packed.scale, packed.zero, codes, unit, bias, case.dtype)
    x = codes.double()
    level = coded.codes[0].double() - coded.zero.double().repeat_interleave(group, 1)
    scale = packed.scale.float() / 16 ** (case.stages - 1)
    if case.stages == 2:
        level = 16 * level + coded.codes[1].double() - 8
    if group == case.k:
        value = (x @ level.T).float() * scale[:, 0] * unit
        want = (value if bias is None else value + bias.float()).to(case.dtype)
        assert torch.equal(got, want), ((got != want).sum(), got[:2, :4], want[:2, :4])
        return
    exact = x @ (level * scale.double().repeat_interleave(group, 1)).T * unit
    exact = exact if bias is None else exact + bias.double()
    plain = torch.nn.functional.linear((codes * unit).to(case.dtype), packed.dequantize().to(case.dtype), bias)
    assert (got - exact).norm() <= 2 * (plain - exact).norm()
    again = product.multiply(*weight, packed.scale, packed.zero, codes, unit, bias, case.dtype)
    assert torch.equal(got, again)


@pytest.fixture
def emulated(monkeypatch, emulation):
    """`product.multiply` on CPU tensors; the memory that it writes to holds NaN before."""

    def kernel(n, k, group, planes, m, dtype, device):
        shape = product.shape_of(n, k, group, planes, m, 4)  # multiprocessors: some are split and some are not
        return emulation("product", product.config(shape, k, group, planes, dtype)), shape

    def launch(kernel, blocks, threads, shared, device, call, after=False, cluster=1):
        assert after and blocks[0] == cluster and shared <= product.SHARED and blocks[1] <= call.n // product.OUTPUTS
        assert kernel.run(ctypes.byref(call), blocks[0], blocks[1], threads, cluster) == 0

    def empty(*size, **options):
        return torch.full(size, torch.nan, **options)

    monkeypatch.setattr(product, "_kernel", kernel)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 4)
    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(product.torch, "empty", empty)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_source_on_the_cpu(case, emulated):
    check(case, "cpu")


@pytest.mark.parametrize("processors", [4, 132])
@pytest.mark.parametrize("n", [64, 1536, 8192, 28672])
@pytest.mark.parametrize("k", [256, 4096, 8960, 28672, 29568, 53248])
def test_every_shape_fits_a_block(n, k, processors):
    """Its shared memory, as the driver allows it; each block's groups in the room for them."""
    for group, planes, m in product_of((128, k), (1, 2), range(1, linear.FEW + 1)):
        shape = product.shape_of(n, k, group, planes, m, processors)
        assert shape.shared <= 227 * 1024 and shape.depth >= 2 and shape.split in product.SPLITS
        assert not shape.several or (shape.split == 1 and shape.shared <= product.HALF and n > 128 * processors)
        cuts = [k // 64 * i // shape.split for i in range(shape.split + 1)]
        assert shape.tables >= max((b * 64 - 1) // group - a * 64 // group + 1 for a, b in pairwise(cuts))


def test_where_nothing_fits(monkeypatch):
    """Fewer rows are dispatched, `note` says how many, and whoever asks for more is told."""
    where = torch.device("cuda", 0)
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    assert product.most_rows(8192, 29568, 128, 2, where, linear.FEW) == linear.FEW
    k, few = 1 << 18, product.most_rows(8192, 1 << 18, 128, 2, where, linear.FEW)
    assert 0 < few < linear.FEW and product.shape_of(8192, k, 128, 2, few, 132).shared <= product.SHARED
    assert product.shape_of(8192, k, 128, 2, few + 1, 132).shared > product.SHARED
    said = linear.note(LinearSpec(k, 8192, 2, 128, 8, BF16), where)
    assert f"product.cu up to {few} rows, if humming-kernels orders" in said
    x = torch.ones(few + 1, k, dtype=torch.int8)
    scale, zero = torch.ones(64, k // 128).half(), torch.zeros(64, k // 128).byte()
    w = torch.zeros(32 * k, dtype=torch.uint8)
    with pytest.raises(ValueError, match="shared memory"):
        product.multiply(w, w, scale, zero, x, torch.ones(few + 1, 1), None, BF16)


def test_sums_that_an_int32_does_not_hold_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    where, most = torch.device("cuda", 0), (2**31 - 1) // (128 * 248) // 128 * 128
    assert product.refusal(64, most, most, 2, where) is None
    assert "overflow" in product.refusal(64, most + 128, most + 128, 2, where)
    assert product.refusal(64, most + 128, most + 128, 1, where) is None
    assert product.refusal(64, most + 128, 128, 2, where) is None


@pytest.mark.parametrize("wrong", ["rows", "scale", "zero", "codes", "unit", "bias", "weight"])
def test_operands_that_do_not_fit_are_refused(wrong, emulated):
    k, n, m = 256, 64, 17 if wrong == "rows" else 3
    given = {
        "weight": torch.zeros(n * k // 2 + (wrong == "weight"), dtype=torch.uint8), "second": None,
        "scale": torch.ones(n, 2).half(), "zero": torch.zeros(n, 2).byte(), "codes": torch.ones(m, k).char(),
        "unit": torch.ones(m, 1), "bias": torch.zeros(n, dtype=BF16),
    }  # fmt: skip
    if wrong in ("scale", "unit", "bias"):
        given[wrong] = given[wrong].double()
    if wrong in ("zero", "codes"):
        given[wrong] = given[wrong].T.contiguous().T
    with pytest.raises(ValueError, match=wrong):
        product.multiply(*given.values(), BF16)


@pytest.mark.cuda
@pytest.mark.hopper
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_on_the_gpu(case):
    assert product.refusal(case.n, case.k, case.group or case.k, case.stages, torch.device("cuda", 0)) is None
    check(case, "cuda")


@pytest.mark.cuda
@pytest.mark.hopper
@pytest.mark.parametrize("case", [Case(4096, 4096, g, m) for g in (0, 128) for m in (3, 8, 16)], ids=str)
def test_a_chain_in_a_graph_has_the_bits_of_single_calls(case, replays_alike):
    """Twelve quantizers and products behind one another, nothing of torch's between them: each may start while the one
    before it runs. One in three is behind a norm, so that numbers stay finite."""
    packed = operands(case, "cuda")[0]
    weight = product.fragments(packed.coded().codes[0], packed.group)
    a8, rule, w = ActivationRecipe(8), NormRule(1e-6), torch.rand(case.k, device="cuda").to(BF16)

    def chain(x: torch.Tensor, alone: bool) -> torch.Tensor:
        for i in range(12):
            if i % 3 == 0:
                q = rows.norm_quantize(x, w, rule, a8)[1]
            else:
                q = rows.gate_quantize(x, x, "silu", a8) if i % 3 == 1 else rows.quantize(x, a8)
            if alone:
                torch.cuda.synchronize()
            x = product.multiply(weight, None, packed.scale, packed.zero, q.codes, q.unit, None, BF16)
            if alone:
                torch.cuda.synchronize()
        return x

    x = torch.randn(case.rows, case.k, device="cuda").to(BF16)
    replays_alike(chain, x)


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "case", [Case(4096, 4096, g, m, s) for s in (1, 2) for m in (1, 16) for g in (0, 128)], ids=str
)
def test_the_source_compiles(case):
    group = case.group or case.k
    shape = product.shape_of(case.n, case.k, group, case.stages, case.rows, 132)
    assert shape.shared <= (product.HALF if shape.depth > 2 else product.SHARED)
    source = product.config(shape, case.k, group, case.stages, case.dtype)
    assert nvrtc.compile_source("product.cu", source, "sm_90a")[:4] == b"\x7fELF"


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Whichever is torch's current one, and in torch's stream there."""
    driver = pytest.importorskip("cuda.bindings.driver")
    entered, launched = [], []

    @contextmanager
    def device(where):
        entered.append(where)
        yield
        entered.pop()

    def launch(config, kernel, arguments, extra):
        launched.append((list(entered), int(config.hStream), config.gridDimX, config.sharedMemBytes, config.numAttrs))
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: SimpleNamespace(cuda_stream=70 + where.index))
    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch)
    for index, cluster in ((0, 1), (1, 4)):
        where = torch.device("cuda", index)
        nvrtc.launch("kernel", (4, 5, 1), 256, 1024, where, product._Call(), after=True, cluster=cluster)
        assert launched.pop() == ([where], 70 + index, 4, 1024, 1 + (cluster > 1))
