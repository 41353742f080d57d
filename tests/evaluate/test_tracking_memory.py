"""What the tracker is said to see is what the cache's pages hold; bytes are those of the tensors."""

import pytest
import torch

from turboquant.evaluate import EvaluateError
from turboquant.evaluate.memory import from_fidelity, memory, sixteen_bit_bytes
from turboquant.evaluate.tracking import summary, tracking
from turboquant.integrations.transformers import TurboQuantCache
from turboquant.maths.codec import log_decode


@pytest.fixture(scope="module")
def tracks(tiny_llama, tiny_tokenizer, prose):
    return tracking(tiny_llama, tiny_tokenizer, prose, ["kv4", "kv8", "plain4"], 512)


@torch.no_grad()
def test_tracks_are_what_stands_in_the_page_headers(tracks, tiny_llama, tiny_tokenizer, prose):
    from turboquant.evaluate.texts import read_texts, windows

    cache = TurboQuantCache(tiny_llama, "kv4")
    ids = windows(tiny_tokenizer, read_texts(prose), 512, 512)
    tiny_llama.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    c = cache.ours[0].cache  # the first layer: its keys do not depend on what the cache did before
    pages = c.buf.pages[c.buf.table[0].long()]
    track = tracks.layers[0]
    assert len(pages) == len(track.hot) == 8
    assert torch.equal(c.layout.read(pages, "key_hot_index").long(), track.hot)
    ratio = log_decode(c.layout.read(pages, "key_log_s")) / track.scales
    assert (ratio.log2().abs() < 0.5 / 16 + 1e-3).all(), "scales differ by more than rounding to 1/16 octave"


def test_errors_order_by_bits(tracks):
    assert len(tracks.layers) == 2 and len(tracks.errors) == 6
    for layer in (0, 1):
        some = {r["recipe"]: r for r in tracks.errors if r["layer"] == layer}
        for key in ("key_error", "value_error", "output_error"):
            assert 0 < some["kv8"][key] < some["kv4"][key] / 5
        assert some["kv4"]["output_error"] < some["plain4"]["output_error"]


def test_summary_counts_how_long_channels_stay_hot(tracks):
    from dataclasses import replace

    hot = torch.tensor([[[1, 2]], [[1, 3]], [[1, 3]], [[1, 2]]])  # 1 for four pages; 2 once, 3 twice, 2 once
    part = {n: getattr(tracks.layers[0], n)[:4, :1] for n in ("mean", "sigma_key", "sigma_query", "scales", "drift")}
    row = summary(replace(tracks.layers[0], hot=hot, **part))[0]
    assert row["hot"] == [1, 2]
    assert row["hot_lifetime"] == pytest.approx((4 + 1 + 2 + 1) / 4)
    assert row["hot_overlap"] == pytest.approx((1 + 2 + 1) / 6)
    assert row["drift"] == pytest.approx(float(part["drift"][1:].mean()))


def test_a_text_that_is_too_short(tiny_llama, tiny_tokenizer, prose):
    with pytest.raises(EvaluateError, match="two pages"):
        tracking(tiny_llama, tiny_tokenizer, prose, ["kv4"], 100)
    with pytest.raises(EvaluateError, match="ctx=512"):
        tracking(tiny_llama, tiny_tokenizer, prose[:200], ["kv4"], 512)


@torch.no_grad()
def test_memory_is_that_of_the_tensors(tiny_llama):
    rows = {r["recipe"]: r for r in memory(tiny_llama, ["kv4", "kv2"], 640, batch=2)}
    cache = TurboQuantCache(tiny_llama, "kv4")
    tiny_llama.get_decoder()(input_ids=torch.zeros(2, 640, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert rows["kv4"]["total_bytes"] == cache.nbytes()["total"]
    assert rows["base"]["total_bytes"] == 2 * sixteen_bit_bytes(cache) == 2 * 2 * 2 * 2 * 32 * 640 * 4
    assert rows["kv2"]["pages_bytes"] < rows["kv4"]["pages_bytes"] < rows["base"]["pages_bytes"] / 5
    r = rows["kv4"]
    assert r["total_bytes"] == r["pages_bytes"] + r["ring_bytes"] + r["state_bytes"]
    assert r["ratio"] == pytest.approx(sixteen_bit_bytes(cache) / r["total_bytes"]) and rows["base"]["ratio"] == 0.5
    with pytest.raises(EvaluateError, match="tokens=0"):
        memory(tiny_llama, ["kv4"], 0)


def test_memory_from_fidelity_rows():
    row = {"recipe": "kv4", "ctx": 64, "cache_tokens": 128, "cache_bytes": 300, "ring_bytes": 100, "state_bytes": 50}
    row["dtype"] = "float32"
    base, kv4 = from_fidelity([row | {"base_cache_bytes": 1200}])
    assert (base["recipe"], base["bytes_per_token"], base["sequences"]) == ("base", 1200 / 128, 2)
    assert (kv4["pages_bytes"], kv4["ratio"], kv4["pages_per_token"]) == (150, 2, 150 / 128)
