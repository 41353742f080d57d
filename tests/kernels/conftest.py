"""Real data, poisoned buffers, and the oracle: what one layer's cache must hold and answer, written from its contract.

The oracle knows nothing of rings, pools and tables: it encodes pages with maths/ and packed/, decides for every pair of
query and token which copy is read (the rule at the top of kernels/reference.py) and computes attention in one go.
"""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from turboquant.kernels import ops
from turboquant.kernels.cuda import nvrtc
from turboquant.layers.cache import LayerCache
from turboquant.maths.codec import encode_keys, encode_plain, encode_values
from turboquant.maths.exact import chain_sum, root
from turboquant.maths.tracker import ChannelTracker, page_stats
from turboquant.packed.buffers import READER_STRIDE
from turboquant.packed.page import PageLayout, pack_page
from turboquant.recipe import KVRecipe, parse_recipe


@pytest.fixture(scope="session")
def real():
    """{"qwen_a.k": (1, tokens, head_dim) fp32, ...}, see tests/data/README.md."""
    data = load_file(Path(__file__).parents[1] / "data" / "qkv.safetensors")
    return {name: t.float() for name, t in data.items()}


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """emulation(name, config) -> emulation/NAME.cpp as a library: a source of kernels/cuda/csrc with CUDA's threads as
    fibers of the CPU. config: what `nvrtc` would be given beside the source.
    """
    made = {}

    def build(name, config):
        if (name, config) not in made:
            compiler = shutil.which("g++") or shutil.which("c++")
            assert compiler, "no C++ compiler"
            folder = tmp_path_factory.mktemp(name)
            for files in (nvrtc.SOURCES, Path(__file__).parent / "emulation"):  # what stands in for a header last
                shutil.copytree(files, folder, dirs_exist_ok=True)
            for source in folder.glob("*.cu"):
                memory = "extern __shared__ __align__(128) u8 memory[];", "u8* memory = block_memory();"
                source.write_text(source.read_text().replace(*memory))
            text = config.replace("__constant__", "static const").replace("__device__", "")
            (folder / "config.cuh").write_text(text)
            options = ["-O1", "-std=c++17", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
            options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # as a GPU, which refuses it
            subprocess.run([compiler, *options, "-o", folder / "run.so", folder / f"{name}.cpp"], check=True)
            made[name, config] = ctypes.CDLL(str(folder / "run.so"))
        return made[name, config]

    return build


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that nobody wrote and pages that were freed hold NaN, and codes without meaning (none out of bounds)."""
    start, reserve, collect = LayerCache._start, LayerCache._reserve, LayerCache._collect

    def fill(cache, names, value):
        for name in names:
            getattr(cache.buf, name).fill_(value)

    def poisoned_start(self, k):
        start(self, k)
        fill(self, ("ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker"), torch.nan)

    def fill_pages(cache, ids):
        cache.buf.pages[ids] = 0xEE
        for f in cache.layout.fields.values():
            here = slice(f.offset, f.offset + f.nbytes)
            if f.dtype == torch.float16:
                cache.buf.pages[ids, :, here] = 0xFF
            elif f.name == "key_hot_index":
                cache.buf.pages[ids, :, here] = 0

    def poisoned_reserve(self, counts):
        before, free = self.buf.pages.shape[0], list(self._free)
        reserve(self, counts)
        fill_pages(self, [*free, *range(before, self.buf.pages.shape[0])])

    def poisoned_collect(self):
        collect(self)
        fill_pages(self, self._free)

    monkeypatch.setattr(LayerCache, "_start", poisoned_start)
    monkeypatch.setattr(LayerCache, "_reserve", poisoned_reserve)
    monkeypatch.setattr(LayerCache, "_collect", poisoned_collect)


@dataclass
class Answer:
    """out: (Hq, n, d) fp64; coarse: the same computed in the model's dtype; pages: (count, H, page_bytes) uint8."""

    out: Tensor
    coarse: Tensor
    pages: Tensor


class Oracle:
    """One sequence through one layer.

    Args:
        kv, window, scaling, softcap, sink_logits: as in `LayerCache` and its `step`.
    """

    def __init__(self, kv: KVRecipe, window=None, scaling=None, softcap=None, sink_logits=None) -> None:
        self.kv, self.window, self.scaling, self.softcap, self.sink_logits = kv, window, scaling, softcap, sink_logits

    def encode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(Hq, n, d) and (H, n, d) -> all complete pages (count, H, page_bytes)."""
        kv, (h, n, d) = self.kv, k.shape
        layout, tracker, pages = PageLayout(kv, d), ChannelTracker(kv.decay, None), []
        for first in range(0, n // kv.page * kv.page, kv.page):
            part = slice(first, first + kv.page)
            kp, vp = k[:, part].float(), v[:, part].float()
            usable = kp.isfinite().all(-1) & vp.isfinite().all(-1) & (torch.arange(n)[part] >= kv.sinks)
            kp, vp = (x.nan_to_num(nan=0.0, posinf=65504.0, neginf=-65504.0) for x in (kp, vp))
            if kv.codec == "plain":
                keys, values = encode_plain(kp, kv.key_bits), encode_plain(vp, kv.value_bits)
            else:
                readers = q.unflatten(0, (h, -1))[:, :, part][:, :, READER_STRIDE - 1 :: READER_STRIDE].float()
                sample = root(chain_sum(readers.square(), 1) / readers.shape[1]).to(k.dtype).float()
                power = chain_sum(sample.square(), 1) / sample.shape[1]
                own = page_stats(kp, power, usable)
                keys = encode_keys(kp, tracker.frozen(own, kv.blend), kv.key_bits, layout.hot, usable)
                values = encode_values(vp, kv.value_bits, usable)
                tracker.update(own)
            pages.append(pack_page(layout, keys, values))
        return torch.stack(pages) if pages else torch.zeros(0, h, layout.page_bytes, dtype=torch.uint8)

    def copies(self, n: int, began: Tensor) -> tuple[Tensor, Tensor]:
        """(n, n) bool: query t sees token j, and reads its 16-bit copy; `began` (n,) is where t's chunk began."""
        kv, t, j, began = self.kv, torch.arange(n)[:, None], torch.arange(n)[None], began[:, None]
        see = j <= t
        if self.window is not None:
            see = see & (t - j < self.window)
        complete = (j // kv.page + 1) * kv.page <= began
        return see, (j < kv.sinks) | (j > t - kv.ring) | ~complete | (j >= began)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, began: Tensor) -> Answer:
        from turboquant.kernels.reference import decode_page_keys, decode_page_values

        (_, n, d), groups = k.shape, q.shape[0] // k.shape[0]
        layout, pages = PageLayout(self.kv, d), self.encode(q, k, v)
        see, exact = self.copies(n, began)

        def attend(q, k, v, dtype):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            k2, v2 = k.clone(), v.clone()
            done = len(pages) * self.kv.page
            if done:
                k2[:, :done] = decode_page_keys(layout, pages).transpose(0, 1).flatten(1, 2).to(dtype)
                v2[:, :done] = decode_page_values(layout, pages).transpose(0, 1).flatten(1, 2).to(dtype)
            k, k2, v, v2 = (x.repeat_interleave(groups, 0) for x in (k, k2, v, v2))
            logits = torch.where(exact, q @ k.transpose(1, 2), q @ k2.transpose(1, 2)) * (self.scaling or d**-0.5)
            if self.softcap is not None:
                logits = torch.tanh(logits / self.softcap) * self.softcap
            logits = logits.masked_fill(~see, -torch.inf)
            if self.sink_logits is not None:
                logits = torch.cat([logits, self.sink_logits.to(dtype).view(-1, 1, 1).expand(-1, n, 1)], -1)
            p = torch.softmax(logits, -1)[..., :n]
            return torch.where(exact, p, 0.0) @ v + torch.where(exact, 0.0, p) @ v2

        return Answer(attend(q, k, v, torch.float64), attend(q, k, v, q.dtype), pages)


@pytest.fixture(scope="session")
def oracle():
    """The class Oracle."""
    return Oracle


class Run:
    """A batch fed to a LayerCache by a schedule of tokens per sequence and step.

    Padding columns hold NaN, at the left or at the right. Collects the output of each real token.
    """

    def __init__(self, cache: LayerCache, sequences, **options) -> None:
        self.cache, self.sequences, self.options = cache, sequences, options
        self.at = [0] * len(sequences)
        self.out = [[] for _ in sequences]
        self.began = [[] for _ in sequences]

    def step(self, counts, left: bool = True, row_exact: bool = False, masked: bool = False) -> None:
        """Feed the next counts[i] tokens of sequence i."""
        n = max(counts)
        if n == 0:
            return
        parts, valid = [], torch.zeros(len(counts), n, dtype=torch.bool)
        for i, (s, c) in enumerate(zip(self.sequences, counts, strict=True)):
            columns = slice(n - c, n) if left else slice(0, c)
            valid[i, columns] = True
            row = []
            for x in s:
                padded = torch.full((x.shape[0], n, x.shape[2]), torch.nan, dtype=x.dtype)
                padded[:, columns] = x[:, self.at[i] : self.at[i] + c]
                row.append(padded)
            parts.append(row)
        q, k, v = (torch.stack([p[x] for p in parts]) for x in range(3))
        mask = None
        if masked:  # as transformers gives it
            t = torch.arange(n)
            window = self.cache.window or n
            mask = ((t[None] <= t[:, None]) & (t[:, None] - t[None] < window)) & valid[:, None, None]
            mask = mask | torch.eye(n, dtype=torch.bool) & valid[:, None, None]
        given = None if valid.all() else valid
        out = self.cache.step(q, k, v, valid=given, mask=mask, row_exact=row_exact, **self.options)
        assert out.shape == q.shape and out.dtype == q.dtype
        one_by_one = row_exact or n <= self.cache.kv.rewind + 1
        for i, c in enumerate(counts):
            assert not out[i][:, ~valid[i]].any(), "a padding query answers zero"
            self.out[i].append(out[i][:, valid[i]])
            self.began[i] += list(range(self.at[i], self.at[i] + c)) if one_by_one else [self.at[i]] * c
            self.at[i] += c

    def output(self, i: int) -> Tensor:
        """(Hq, tokens fed so far, d) of sequence i."""
        return torch.cat(self.out[i], 1)

    def fed(self, i: int):
        """q, k, v fed so far."""
        return tuple(x[:, : self.at[i]] for x in self.sequences[i])

    def pages(self, i: int) -> Tensor:
        """(count, H, page_bytes) of sequence i, in order; a released page is an error."""
        return held(self.cache, i)


def held(cache: LayerCache, i: int) -> Tensor:
    """Pages of sequence i by the device's table, which must agree with the host's."""
    ids = cache.buf.table[i][: len(cache._pages[i])]
    assert ids.tolist() == cache._pages[i] and (cache.buf.table[i][len(ids) :] == -1).all()
    assert (ids >= 0).all()
    return cache.buf.pages[ids.long()]


@pytest.fixture(scope="session")
def run():
    """The class Run."""
    return Run


@pytest.fixture(scope="session")
def tokens():
    """(heads q, heads kv, n, d, dtype) -> q, k, v of one sequence: offsets, loud channels and a drift, as real keys."""

    def make(hq: int, h: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        k = draw(h, n, d) * (1 + 3 * draw(h, 1, d).abs()) + 5 * draw(h, 1, d) + 0.02 * torch.arange(n)[None, :, None]
        q = draw(hq, n, d) * (0.2 + draw(hq, 1, d).abs()) / 4
        return q.to(dtype), k.to(dtype), draw(h, n, d).to(dtype)

    return make


@pytest.fixture(scope="session")
def close():
    """(answer, got (Hq, n, d)): its error against fp64 is within twice that of plain torch at the same dtype."""

    def check(answer: Answer, got: Tensor) -> None:
        rms = lambda x: x.double().square().mean().sqrt().item()  # noqa: E731
        mine, theirs = rms(got.double() - answer.out), rms(answer.coarse.double() - answer.out)
        floor = torch.finfo(got.dtype).eps * rms(answer.out) / 4  # of one rounding, should torch have been lucky
        assert mine <= 2 * max(theirs, floor), (mine, theirs)

    return check


@pytest.fixture(scope="session")
def following():
    """(backend, tokens): of five states of the tracker each is what steps of a token with two leave behind its page."""

    def check(backend, tokens, exact=True):
        recipe = parse_recipe("kv4:page=16,ring=24,sinks=3,rewind=8").kv
        qkv = [torch.stack(t) for t in zip(tokens(4, 2, 200, 16), tokens(4, 2, 200, 16, seed=1), strict=True)]
        one, five = LayerCache(recipe), LayerCache(recipe)
        for cache in (one, five):
            cache._start(qkv[1])
        five.buf.tracker = torch.full((2, 5, 2, 3, 16), torch.nan)
        after = {}
        for t in range(200):
            one.step(*(x[:, :, t : t + 1] for x in qkv))
            after[t // 16] = one.buf.tracker[:, t // 16 % 2].clone()  # of a complete page, at its last token
        at = 0
        for n in (20, 12, 1, 70, 9, 80, 8):
            with ops.use_backend(backend):
                five.step(*(x[:, :, at : at + n] for x in qkv))
            at += n
            for page in range(max(0, at // 16 - 5), at // 16):
                got, want = five.buf.tracker[:, page % 5], after[page]
                torch.testing.assert_close(got, want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)

    return check


@pytest.fixture(scope="session")
def replays_alike():
    """(chain, x): a CUDA graph of chain(x, False) replays the bits of chain(x, True), whose kernels run alone."""

    def check(chain, x: Tensor) -> None:
        want, graph = chain(x, True), torch.cuda.CUDAGraph()
        assert want.isfinite().all() and want.any()
        chain(x, False)
        with torch.cuda.graph(graph):
            got = chain(x, False)
        for _ in range(20):
            got.fill_(torch.nan)
            graph.replay()
            assert torch.equal(got, want)

    return check
