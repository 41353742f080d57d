"""Decoder layers that follow each other in one native call: the bits and bytes of the layers by themselves, also where
a model goes on in another way than before."""

import copy
import gc
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
def steps(model, cache, parts):
    """Logits of chunks, between which the model may be changed."""
    out = []
    for part in parts:
        if callable(part):
            part(model)
        else:
            out.append(model(ids(part), past_key_values=cache).logits)
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
    assert torch.equal(steps(model, together, sizes), steps(model, each, sizes)) and same(together, each)
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


class Changed(nn.Module):
    """A layer, and what is done to its input and output. As no hook of the layer, it is not seen beforehand."""

    def __init__(self, layer, before=lambda x, k: (x, k), after=lambda y: y):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x, **kwargs):
        x, kwargs = self.before(x, kwargs)
        return self.after(self.layer(x, **kwargs))


def changed(at, **how):
    def change(model):
        model.model.layers[at] = Changed(model.model.layers[at], **how)

    return change


def changed_back(model):
    model.model.layers[1] = getattr(model.model.layers[1], "layer", model.model.layers[1])
    model.config.num_hidden_layers = 3


def turned(x, kwargs):
    cos, sin = kwargs["position_embeddings"]
    return x, kwargs | {"position_embeddings": (sin.clone(), cos.clone())}


def written(x, kwargs):
    kwargs["position_embeddings"][0].mul_(0.5)
    return x, kwargs


def weight(layer):
    layer.mlp.down_proj.weight_scale.mul_(1.5)


def weight_forward(model):
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda *a, **k: (weight(layer), own(*a, **k))[1]


def early(model):
    model.config.num_hidden_layers = 2


def twice(model):
    for layer in model.model.layers[1:]:
        layer.self_attn.layer_idx = 0


def adapter(model):
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, nn.Hardtanh(-0.1, 0.1))


def moved(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data * 2


def hook_within(model):
    one = model.model.layers[1]
    changed(0, after=lambda y: (one.register_forward_pre_hook(lambda m, a: weight(m)), y)[1])(model)


CHANGES = {
    "output": changed(1, after=lambda y: y + 1), "no more": changed(1, after=lambda y: y + 1),
    "input": changed(2, before=lambda x, k: (x * 2, k)), "in place": changed(0, after=lambda y: y.add_(1)),
    "angles": changed(1, before=turned), "angles written": changed(2, before=written),
    "data hook": lambda m: m.model.layers[0].register_forward_hook(lambda m, a, y: (y.data.add_(1), None)[1]),
    "weight hook": lambda m: m.model.layers[1].register_forward_pre_hook(lambda m, a: weight(m)),
    "weight forward": weight_forward, "early": early, "early once": early, "twice": twice, "adapter": adapter,
    "order": lambda m: m.model.layers.insert(1, m.model.layers.pop(2)),
    "weight": lambda m: weight(m.model.layers[2]), "moved": moved, "hook within": hook_within,
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_goes_on_in_another_way(what, tiny, several):
    after = {"no more": (1, 2, changed_back, 1, 1, 1), "early once": (1, changed_back, 20, 1)}  # 40 rows run by modules
    parts = (30, 1, 1, 1, CHANGES[what], *after.get(what, (1, 2, 1, 1)))
    out, caches = [], []
    for kind in (TurboQuantCache, Alone):
        model = tiny("qwen2").bfloat16()
        quantize(model, "w4a8")
        caches.append(kind(model, RECIPE))
        out.append(steps(model, caches[-1], parts))
        if kind is TurboQuantCache:
            assert several[:2] == [3, 3]
    assert torch.equal(*out) and same(*caches, back=what == "early")
    if what in ("weight", "moved"):
        assert several == [3] * 6
    if what in ("adapter", "data hook", "weight forward"):  # on either side of it is one layer, and no call takes one
        assert several == ([3, 3, 2, 2, 2, 2] if what == "data hook" else [3, 3])


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


def break_off(model, cache, monkeypatch, native=False):
    """A step that ends behind its first layer; native: behind the native call, of which nothing is known then."""

    def raises(*args):
        if native:
            own(*args)
        raise KeyboardInterrupt

    own = DecoderStep.in_turn
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if native:
            patch.setattr(DecoderStep, "in_turn", staticmethod(raises))
        else:
            patch.setitem(model.model.layers._modules, "1", Changed(model.model.layers[1], before=raises))
        steps(model, cache, (1,))


def saved(cache, path, model):
    cache.save(path)
    return TurboQuantCache.load(path, model)


AFTER = {
    "length": lambda c, *_: [layer.get_seq_length() for layer in c.layers],
    "state": lambda c, *_: [layer.cache.state()[1]["lengths"] for layer in c.layers],
    "layer's crop": lambda c, *_: [layer.crop(32) for layer in c.layers],
    "crop": lambda c, *_: c.crop(-2), "bytes": lambda c, *_: c.nbytes(), "nothing": lambda *_: None,
    "compiled": lambda c, _, m: steps(torch.compile(m, backend="eager"), c, (1,)).tolist(),
    "copy": lambda c, *_: copy.deepcopy(c), "save": saved,
    "pickle": lambda c, path, _: (torch.save(c, path), torch.load(path, weights_only=False))[1],
}  # fmt: skip


@pytest.mark.parametrize("what", AFTER)
@pytest.mark.parametrize("native", [False, True])
def test_a_step_that_was_broken_off(native, what, model, several, monkeypatch, tmp_path):
    caches, seen = [], []
    for kind in (TurboQuantCache, Alone):
        cache = kind(model, RECIPE, max_tokens=64 if what == "compiled" else None)
        steps(model, cache, (30, 1, 1))
        if not native or kind is TurboQuantCache:  # else no layer has run
            break_off(model, cache, monkeypatch, native)
        got = AFTER[what](cache, tmp_path / kind.__name__, model)
        new = isinstance(got, TurboQuantCache)
        caches.append(got if new else cache)
        seen.append(None if new else got)
    assert seen[0] == seen[1] and several == [3, 3]
    if what != "pickle":  # of which a model does not take it for its own
        assert torch.equal(*(steps(model, c, (1,) * 20) for c in caches))  # over the end of a page
    assert same(*caches, back=what in ("crop", "layer's crop", "pickle"))


@torch.no_grad()
def by_hand(model, cache, i, mode):
    x = model.model.embed_tokens(ids(1))
    with torch.inference_mode(i == 33):
        angles = model.model.rotary_emb(x, torch.full((1, 1), i))
    x = model.model.layers[0](x, position_embeddings=angles, past_key_values=cache)
    with mode:
        for layer in model.model.layers[1:]:
            x = layer(x, position_embeddings=angles, past_key_values=cache)
    return x


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_inference_mode_and_gradients(mode, model, several):
    cache = TurboQuantCache(model, RECIPE)
    steps(model, cache, (30, 1, 1))
    y = by_hand(model, cache, 32, mode())  # from the second layer on
    assert y.is_inference() if mode is torch.inference_mode else y.requires_grad
    with torch.inference_mode():
        model(ids(1), past_key_values=cache)
    by_hand(model, cache, 33, torch.no_grad())  # with angles that do not count how often they are written
    model(ids(1), past_key_values=cache)  # weights of norms require gradients
    assert [c.cache.columns for c in cache.ours] == [36] * 3 and several == [3, 3]
    steps(model, cache, (1, 1))
    assert several == [3, 3, 2, 3]  # the second layer came by itself


def test_a_crop_behind_a_step_that_left_early_has_less_rewind(model, recwarn):
    cache = TurboQuantCache(model, RECIPE)
    steps(model, cache, (30, 1, 1, 1))
    early(model)
    steps(model, cache, (1,))
    cache.layers[2].crop(-3)
    assert not recwarn
    cache.layers[2].crop(-1)
    assert "more than rewind=4" in str(recwarn[0].message)


@torch.no_grad()
def test_masks_positions_windows_and_scaling_of_each_layer(tiny, several):
    out = []
    for kind in (TurboQuantCache, Alone):
        layers = ["full_attention", "sliding_attention", "full_attention"]
        model = tiny("qwen2", use_sliding_window=True, sliding_window=20, layer_types=layers).bfloat16()
        quantize(model, "w4a8")
        model.model.layers[1].self_attn.scaling = 0.1
        cache = kind(model, RECIPE)
        out.append(steps(model, cache, (30, 1, 1, 1)))
        for n in (33, 36):
            at = torch.tensor([[n, n + 1], [n + 5, n + 6]])
            out.append(model(ids(2), past_key_values=cache, position_ids=at).logits)  # angles of each row
            mask = torch.ones(2, n + 3)
            mask[0, n + 2] = 0
            out.append(model(ids(1), past_key_values=cache, attention_mask=mask).logits)
        assert several == [3, 3, 3, 3]  # of the first cache, without a mask
    assert all(torch.equal(a, b) for a, b in zip(out[:5], out[5:], strict=True))


def test_a_cache_pickled_before_there_were_chains(model, several):
    cache = TurboQuantCache(model, RECIPE)
    for some in (cache.layers, [cache]):  # layers that were moved into another cache have another
        assert all(one.__dict__.pop("chain") for one in some)
        assert steps(model, cache, (30, 1, 1)).isfinite().all() and not several
