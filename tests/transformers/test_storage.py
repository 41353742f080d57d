"""A saved cache goes on bit for bit; a file that cannot be used is named, and nothing is loaded from it."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turboquant.integrations.transformers import TurboQuantCache
from turboquant.integrations.transformers.storage import CacheFileError, _digest
from turboquant.layers.cache import LayerCache

RECIPE = "kv4:page=16,ring=24,sinks=2,rewind=16"


@pytest.fixture
def saved(tiny, prompt, tmp_path):
    model = tiny("gemma3")
    cache = TurboQuantCache(model, RECIPE)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
    path = tmp_path / "some.cache"
    cache.save(path)
    return model, cache, path


def go_on(model, cache, mask):
    ids, out = torch.arange(2, 50), []
    with torch.no_grad():
        for at, n in enumerate([1, 1, 20, 1, 1, 9]):
            part = ids[at * 3 :][:n].repeat(2, 1)
            mask = torch.cat([mask, torch.ones(2, n, dtype=torch.long)], 1)
            out.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuing_is_as_if_never_interrupted(name, dtype, tiny, prompt, tmp_path):
    model = tiny(name).to(dtype)
    cache = TurboQuantCache(model, RECIPE)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
    cache.save(tmp_path / "c")
    want = go_on(model, cache, prompt()["attention_mask"])
    loaded = TurboQuantCache.load(tmp_path / "c", model)
    assert loaded.recipe == cache.recipe and loaded.get_seq_length() == 40
    assert torch.equal(go_on(model, loaded, prompt()["attention_mask"]), want)
    assert [p.name for p in tmp_path.iterdir()] == ["c"], "no temporary file is left"


@pytest.mark.parametrize("back", [(5, 7), (10, 10), (3, 30)])
def test_what_was_taken_back_before_and_after(back, tiny, prompt, tmp_path):
    """Padding is taken back as padding, and what the ring still holds is known, from a file as from memory."""
    model, found = tiny("llama-gqa"), []
    for load in (False, True):
        cache = TurboQuantCache(model, RECIPE)
        given = prompt((70, 45), left=False)
        with torch.no_grad():
            model(**given, past_key_values=cache)
        cache.crop(-back[0])
        if load:
            cache.save(tmp_path / "c")
            cache = TurboQuantCache.load(tmp_path / "c", model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache.crop(-back[1])
        n = 70 - sum(back)
        assert cache.get_seq_length() == n and cache.ours[0].cache.lengths == [n, min(n, 45)]
        found.append(go_on(model, cache, given["attention_mask"][:, :n]))
    assert torch.equal(*found)


def test_beams_share_pages_in_the_file_too(tiny, prompt, tmp_path):
    model = tiny("llama-gqa")
    cache = TurboQuantCache(model, RECIPE)
    with torch.no_grad():
        model(**prompt((40,)), past_key_values=cache)
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(2)
    cache.save(tmp_path / "two")
    pages = []
    for n in ("one", "two"):
        with safe_open(tmp_path / n, "pt") as f:
            pages.append(f.get_tensor("0.pages").shape[0])
    assert pages[0] == pages[1] == 2
    loaded = TurboQuantCache.load(tmp_path / "two", model)
    mask = prompt((40,))["attention_mask"].repeat(2, 1)
    assert torch.equal(go_on(model, loaded, mask), go_on(model, cache, mask))


def test_empty_cache(tiny, tmp_path):
    model = tiny("llama-gqa")
    TurboQuantCache(model, RECIPE).save(tmp_path / "c")
    assert TurboQuantCache.load(tmp_path / "c", model).get_seq_length() == 0


def refused(path, model, *parts, monkeypatch=None):
    """CacheFileError that names the file, before any layer has loaded anything."""
    loads = []
    original = LayerCache.load
    if monkeypatch:
        monkeypatch.setattr(LayerCache, "load", lambda self, *a: (loads.append(self), original(self, *a))[1])
    with pytest.raises(CacheFileError) as e:
        TurboQuantCache.load(path, model)
    assert str(path) in str(e.value) and not loads
    for part in parts:
        assert part in str(e.value), e.value


def rewrite(path, change):
    """Let `change(tensors, header)` alter a saved file."""
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["turboquant"])
        tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    change(tensors, header)
    header["sha256"] = _digest(tensors)
    save_file(tensors, path, metadata={"turboquant": json.dumps(header)})


def test_no_such_file(saved, tmp_path):
    refused(tmp_path / "nowhere", saved[0], "no such file")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated(saved, keep, monkeypatch):
    model, _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(path, model, "truncated", monkeypatch=monkeypatch)


def test_something_else(saved, tmp_path):
    model = saved[0]
    (tmp_path / "text").write_text("hello " * 100)
    refused(tmp_path / "text", model)
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", model, "not a cache saved by TurboQuant")


def test_another_model(saved, tiny, monkeypatch):
    _, _, path = saved
    for other in (tiny("gemma3", seed=1), tiny("llama-gqa"), tiny("gemma3", num_hidden_layers=2, layer_types=None)):
        refused(path, other, "another model", "gemma3", monkeypatch=monkeypatch)


CHANGES = {
    "future format": (lambda t, h: h.update(format=99), "format 99"),
    "missing tensor": (lambda t, h: t.pop("1.ring_v"), "'1.ring_v' is missing"),
    "unknown tensor": (lambda t, h: t.update(extra=torch.zeros(1)), "unknown tensor 'extra'"),
    "shape": (lambda t, h: t.update({"1.tracker": t["1.tracker"][:1].clone()}), "'1.tracker'"),
    "rank": (lambda t, h: t.update({"1.ring_k": t["1.ring_k"].flatten()}), "'1.ring_k'"),
    "dtype": (lambda t, h: t.update({"0.length": t["0.length"].float()}), "'0.length'"),
    "page bytes": (lambda t, h: t.update({"1.pages": t["1.pages"][..., :-16].clone()}), "'1.pages'"),
    "fewer pages than the table names": (lambda t, h: t.update({"1.pages": t["1.pages"][:-1].clone()}), "'1.pages'"),
    "lengths": (lambda t, h: h["layers"][1].update(lengths=[40, 24]), "layer 1"),
    "a table that is too short": (lambda t, h: h["layers"][1]["table"][0].pop(), "layer 1"),
    "page ids below -1": (lambda t, h: h["layers"][1]["table"][0].__setitem__(0, -7), "layer 1"),
    "a layer that is not there": (lambda t, h: h["layers"].pop(), ""),
    "a layer too many": (lambda t, h: h["layers"].append({"columns": 0}), ""),
    "no recipe": (lambda t, h: h.pop("recipe"), ""),
    "a recipe nobody knows": (lambda t, h: h.update(recipe="kv5x"), ""),
    "no model": (lambda t, h: h.pop("model"), ""),
    "no layers": (lambda t, h: h.pop("layers"), ""),
    "no lengths": (lambda t, h: h["layers"][1].pop("lengths"), ""),
    "no columns": (lambda t, h: h["layers"][1].pop("columns"), ""),
    "model of the wrong kind": (lambda t, h: h.update(model=3), ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_file_that_contradicts_itself(saved, case, monkeypatch):
    model, _, path = saved
    change, says = CHANGES[case]
    rewrite(path, change)
    refused(path, model, says, monkeypatch=monkeypatch)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_flipped_bits(saved, place, monkeypatch):
    model, _, path = saved
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 16
    path.write_bytes(data)
    refused(path, model, "corrupt", monkeypatch=monkeypatch)


def test_non_finite_tokens_stay_counted(saved):
    model, cache, path = saved
    cache.ours[0].cache.buf.nonfinite += 3
    cache.save(path)
    assert TurboQuantCache.load(path, model).nonfinite_tokens == cache.nonfinite_tokens > 0


def test_an_unchanged_rewrite_loads(saved):
    """So that the cases above fail for their reason."""
    model, cache, path = saved
    rewrite(path, lambda t, h: None)
    assert TurboQuantCache.load(path, model).get_seq_length() == cache.get_seq_length()


def test_hybrid_models_cannot_be_saved_yet(tiny, prompt, tmp_path):
    model = tiny("lfm2")
    cache = TurboQuantCache(model, RECIPE)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
    with pytest.raises(CacheFileError, match="saving them is not supported"):
        cache.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_failing_to_write_leaves_the_old_file(saved, monkeypatch):
    from turboquant.integrations.transformers import storage

    model, cache, path = saved

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert TurboQuantCache.load(path, model).get_seq_length() == 40
