"""Decoder layers that follow each other in one native call: the bits and bytes of the layers by themselves, also where
a model goes on in another way than before."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from turboquant import TurboQuantCache
from turboquant.integrations.transformers import quantize
from turboquant.integrations.transformers.cache import TurboQuantLayer
from turboquant.kernels import cpu
from turboquant.kernels.cpu.cache import isas
from turboquant.kernels.cpu.step import DecoderStep
from turboquant.layers.cache import CacheError, LayerCache

pytestmark = pytest.mark.skipif(not isas(), reason="the native module is not built")
RECIPE = "kv4:page=16,ring=24,sinks=1,rewind=4"
BUFFERS = ("table", "ring_k", "ring_v", "sink_k", "sink_v", "readers", "tracker", "length", "nonfinite")


@pytest.fixture
def model(tiny):
    net = tiny("qwen2").bfloat16()
    quantize(net, "w4a8")
    return net


@pytest.fixture
def several(monkeypatch):
    """How many layers each call took."""
    seen, own = [], DecoderStep.in_turn
    monkeypatch.setattr(
        DecoderStep, "in_turn", staticmethod(lambda steps, *a: (seen.append(len(steps)), own(steps, *a))[1])
    )
    return seen


def ids(n, batch=2):
    return torch.randint(2, 90, (batch, n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def steps(model, cache, sizes):
    return torch.cat([model(ids(n), past_key_values=cache).logits for n in sizes], 1)


def run(model, cache, parts):
    """Logits of chunks, between which the model may be changed."""
    out = []
    for part in parts:
        if callable(part):
            part(model)
        else:
            out.append(steps(model, cache, [part]))
    return torch.cat(out, 1)


class Alone(TurboQuantCache):
    """A cache of a class of its own, whose layers run by themselves."""

    def update(self, *args, **kwargs):
        return super().update(*args, **kwargs)


def same(a, b, back=False):
    """Whether two caches count the same tokens and hold the same bytes; back: but for what `crop` leaves behind in
    slots that it takes back."""
    for x, y in zip((c.cache for c in a.ours), (c.cache for c in b.ours), strict=True):
        assert (x.columns, x.lengths, x._held) == (y.columns, y.lengths, y._held)
        assert back or x._reach == y._reach
        for n in ("length",) if back else BUFFERS:
            assert torch.equal(getattr(x.buf, n), getattr(y.buf, n)), n
        for p, q in zip(x._held, y._held, strict=True):
            assert torch.equal(x.buf.pages[[i for i in p if i >= 0]], y.buf.pages[[i for i in q if i >= 0]])
    return True


@pytest.mark.parametrize("name", ["qwen2", "mistral", "llama-mqa"])
@pytest.mark.parametrize("capacity", [None, 128])
def test_layers_in_one_call_have_the_bits_and_bytes_of_layers_alone(name, capacity, tiny, several):
    model = tiny(name).bfloat16()
    quantize(model, "w4a8")
    sizes = (30, *[1] * 20, 3, 4, 1, 5, 1)
    together, each = (c(model, RECIPE, max_tokens=capacity) for c in (TurboQuantCache, Alone))
    assert torch.equal(run(model, together, sizes), run(model, each, sizes)) and same(together, each)
    assert several == [3] * 23  # all steps but the first, which learns; 5 tokens are more than can be taken back


def test_generate_beams_and_padding(model, prompt, several):
    for options in ({}, {"num_beams": 3}):
        out = []
        for kind in (TurboQuantCache, Alone):
            several.clear()
            cache = kind(model, RECIPE)
            out.append(model.generate(**prompt((20, 20)), past_key_values=cache, max_new_tokens=12, **options))
            assert several == ([3] * 10 if kind is TurboQuantCache else [])
        assert torch.equal(*out)
    assert steps(model, TurboQuantCache(model, RECIPE), (1, 1, 1)).isfinite().all()


def hook(model):
    model.model.layers[1].register_forward_hook(lambda m, a, y: y + 1)


def unhook(model):
    model.model.layers[1]._forward_hooks.clear()


def pre_hook(model):
    model.model.layers[2].register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]))


def in_place(model):
    model.model.layers[0].register_forward_hook(lambda m, a, y: y.add_(1))


def angles_changed(model):
    def turned(m, a, k):
        cos, sin = k["position_embeddings"]
        return a, k | {"position_embeddings": (sin.clone(), cos.clone())}

    model.model.layers[1].register_forward_pre_hook(turned, with_kwargs=True)


def angles_written(model):
    model.model.layers[2].register_forward_pre_hook(
        lambda m, a, k: (k["position_embeddings"][0].mul_(0.5), None)[1], with_kwargs=True
    )


def early(model):
    model.config.num_hidden_layers = 2


def late(model):
    model.config.num_hidden_layers = 3


def skip(model):
    model.model.layers[1].forward = lambda x, **kwargs: x


def adapter(model):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 0.5 * x.mean(-1, keepdim=True)

    attention = model.model.layers[1].self_attn
    attention.v_proj = Adapter(attention.v_proj)


def weight(model):
    model.model.layers[2].mlp.down_proj.weight_scale.mul_(2)


def moved(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data * 2


CHANGES = {
    "hook": hook, "hook taken off": hook, "pre-hook": pre_hook, "in place": in_place, "angles": angles_changed,
    "angles written": angles_written, "early": early, "early once": early, "skip": skip, "adapter": adapter,
    "weight": weight, "moved": moved,
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_goes_on_in_another_way(what, tiny, several):
    after = {"hook taken off": (1, 2, unhook, 1, 1, 1), "early once": (1, late, 20, 1)}  # 40 rows run by modules
    parts = (30, 1, 1, 1, CHANGES[what], *after.get(what, (1, 2, 1, 1)))
    out, caches = [], []
    for kind in (TurboQuantCache, Alone):
        model = tiny("qwen2").bfloat16()
        quantize(model, "w4a8")
        caches.append(kind(model, RECIPE))
        out.append(run(model, caches[-1], parts))
        if kind is TurboQuantCache:
            assert several[:2] == [3, 3]
            caches[0].chain.settle()
    assert torch.equal(*out) and same(*caches, back=what in ("early", "skip"))
    if what in ("weight", "moved"):
        assert several == [3] * 6
    if what == "adapter":  # the layers in front of it are one, and no call takes one
        assert several == [3, 3]


@pytest.mark.parametrize("what", ["crop", "save", "copy", "pickle"])
def test_layers_that_were_not_asked_for_are_taken_back(what, model, several, tmp_path):
    caches = []
    for kind in (TurboQuantCache, Alone):
        cache = kind(model, RECIPE)
        run(model, cache, (30, 1, 1, early, 1, late))
        if what == "crop":
            cache.crop(-2)
        elif what == "save":
            cache.save(tmp_path / kind.__name__)
            cache = TurboQuantCache.load(tmp_path / kind.__name__, model)
        elif what == "copy":
            cache = copy.deepcopy(cache)
        elif kind is TurboQuantCache:
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            cache = torch.load(file, weights_only=False)
        cache.chain.settle()
        caches.append(cache)
    assert several == [3, 3] and same(*caches, back=True)
    assert [c.cache.columns for c in caches[0].ours] == {"crop": [31, 31, 30]}.get(what, [33, 33, 32])
    sizes = (1,) * 20  # over the end of a page
    if what != "pickle":  # which a model does not take for its own
        assert torch.equal(*(run(model, c, sizes) for c in caches)) and same(*caches)


@pytest.mark.parametrize("what", ["layer's update", "step", "kernel", "own step", "training", "attention"])
def test_what_a_call_of_several_layers_leaves_out_is_not_patched(what, model, several, monkeypatch):
    cache, seen = TurboQuantCache(model, RECIPE), []
    steps(model, cache, (30, 1, 1))
    assert several == [3]

    def noted(own):
        return lambda *a, **k: (seen.append(1), own(*a, **k))[1]

    if what == "own step":
        cache.layers[1].cache.step = noted(cache.layers[1].cache.step)
    elif what == "training":
        model.model.layers[1].train()
    elif what == "attention":
        model.set_attn_implementation("eager")
    else:
        owner, name = {
            "layer's update": (TurboQuantLayer, "update"),
            "step": (LayerCache, "step"),
            "kernel": (cpu, "cache_append"),
        }[what]
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
        if what == "kernel":
            monkeypatch.setattr("turboquant.kernels.ops._cache_ops", {})
    if what in ("training", "attention"):
        with pytest.raises((ValueError, AttributeError, TypeError)):
            steps(model, cache, (1,))
    else:
        steps(model, cache, (1,))
        assert len(seen) == (1 if what == "own step" else 3)
    assert several == [3]


def test_another_models_cache_and_a_full_one(tiny, model, several):
    cache = TurboQuantCache(model, RECIPE, max_tokens=32)
    steps(model, cache, (30, 1, 1))
    with pytest.raises(CacheError, match="capacity of 32"):
        steps(model, cache, (1,))
    assert [c.cache.columns for c in cache.ours] == [32] * 3 and several == [3]
    assert [int(c.cache.buf.length[0]) for c in cache.ours] == [32] * 3
    other = tiny("qwen2").bfloat16()
    quantize(other, "w4a8")
    TurboQuantCache(other, RECIPE)
    with pytest.raises(ValueError, match="another model"):
        steps(other, cache, (1,))


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused_before_anything_is_done(model, several):
    cache = TurboQuantCache(model, RECIPE)
    steps(model, cache, (30, 1))
    before = [c.cache.buf.ring_k.clone() for c in cache.ours]
    last = cache.ours[2].cache
    own = last.buf.sink_k
    last.buf.sink_k = own.transpose(2, 3).contiguous().transpose(2, 3)  # not as the kernels read it
    steps(model, cache, (1,))
    assert several == [3] and all(c.cache.columns == 32 for c in cache.ours)  # each ran by itself
    with pytest.raises(Exception, match=r"cast|incompatible"):
        DecoderStep.in_turn([(model.model.layers[0].step._made, last.buf, last.layout, "a", None)], *angles())
    last.buf.sink_k = own
    made = [m.step._made for m in model.model.layers]
    rows = [(m, c.cache.buf, c.cache.layout, 0.25, None) for m, c in zip(made, cache.ours, strict=True)]
    lengths = [int(c.cache.buf.length[0]) for c in cache.ours]
    assert DecoderStep.in_turn(rows, *angles(batch=1)) is None  # the cache is of two sequences
    assert DecoderStep.in_turn(rows, *angles(d=8)) is None
    assert [int(c.cache.buf.length[0]) for c in cache.ours] == lengths
    assert DecoderStep.in_turn(rows, *angles()) is not None and len(before) == 3


def angles(batch=2, d=16):
    x = torch.ones(batch, 1, 48).bfloat16()
    return x, torch.ones(1, 1, d).bfloat16(), torch.zeros(1, 1, d).bfloat16()


def test_a_cache_keeps_no_model(tiny):
    model = tiny("qwen2").bfloat16()
    quantize(model, "w4a8")
    cache = TurboQuantCache(model, RECIPE)
    steps(model, cache, (30, 1, 1))
    gone = weakref.ref(model.model.layers[1])
    del model
    gc.collect()
    assert gone() is None and cache.get_seq_length() == 32


def test_inference_mode_and_gradients(model, several):
    cache = TurboQuantCache(model, RECIPE)
    steps(model, cache, (30, 1, 1))
    with torch.inference_mode():
        model(ids(1), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    model(ids(1), past_key_values=cache)  # weights of norms require gradients
    assert several == [3]
    steps(model, cache, (1, 1))
    assert several == [3, 3, 3]
