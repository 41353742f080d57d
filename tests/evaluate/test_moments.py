"""Words that a model says for its own error feedback: what is kept of them in a file."""

import copy
import json

import pytest
import torch

from turboquant.layers import moments
from turboquant.layers.moments import FeedbackError, moments_of, moments_without_data, own_words, random_ids, tokens_for


def test_words_go_on_where_they_stopped(tiny_llama, tmp_path):
    file, said = tmp_path / "words.json", []
    whole = own_words(tiny_llama, 24 * 8, 8)
    assert whole.shape == (24, 8) and len({tuple(r) for r in whole.tolist()}) > 20

    def stop(what, done, of):
        said.append(done)
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own_words(tiny_llama, 24 * 8, 8, file=file, progress=stop)
    assert len(json.loads(file.read_text())["rows"]) == 8, "the rows that were finished"
    said.clear()
    again = own_words(tiny_llama, 24 * 8, 8, file=file, progress=lambda what, done, of: said.append((what, done, of)))
    assert torch.equal(again, whole) and said[0][1] > 64 and said[-1] == ("own words", 192, 192)
    before = file.read_bytes()
    assert torch.equal(own_words(tiny_llama, 24 * 8, 8, file=file, progress=lambda *_: pytest.fail("said")), whole)
    assert file.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["words.json"]


def test_words_of_something_else_are_refused(tiny_llama, tmp_path):
    file = tmp_path / "words.json"
    own_words(tiny_llama, 64, 8, file=file)
    with pytest.raises(FeedbackError, match="another model"):
        own_words(tiny_llama, 64, 16, file=file)
    weight = next(tiny_llama.parameters()).data
    weight[-1, -1] += 1
    try:
        with pytest.raises(FeedbackError, match="another model"):
            own_words(tiny_llama, 64, 8, file=file)
    finally:
        weight[-1, -1] -= 1
    with pytest.raises(FeedbackError, match="a model in float32, not bfloat16"):
        own_words(copy.deepcopy(tiny_llama).bfloat16(), 64, 8, file=file)
    file.write_text("[]")
    with pytest.raises(FeedbackError, match="no words"):
        own_words(tiny_llama, 64, 8, file=file)


def test_tokens_are_as_many_as_the_widest_layer_needs(tiny_llama, monkeypatch):
    """128 inputs of o_proj."""
    assert tokens_for(tiny_llama) == 4096
    monkeypatch.setattr(moments, "LEAST", 0)
    assert tokens_for(tiny_llama) == moments.PER_INPUT * 128
    for kind in ("random", "self"):
        said = []
        moments_without_data(tiny_llama, kind, lambda *what, said=said: said.append(what))
        assert said[-1][2] == moments.PER_INPUT * 128
    with pytest.raises(
        FeedbackError, match=rf"127 tokens do not span the 128 inputs of .*o_proj: .* give it {moments.PER_INPUT * 128}"
    ):
        moments_of(tiny_llama, random_ids(tiny_llama, 128, 128)[:, 1:])
    assert len(moments_of(tiny_llama, random_ids(tiny_llama, 128, 128))) == 2 * 7


def test_a_layer_that_reads_fewer_tokens_than_inputs_has_no_moments(tiny_llama):
    """As an expert does by itself."""
    few = tiny_llama.model.layers[0].mlp.down_proj
    handle = few.register_forward_pre_hook(lambda _, args: (args[0][:, :1],))
    try:
        found = moments_of(tiny_llama, random_ids(tiny_llama, 256, 64))
    finally:
        handle.remove()
    assert len(found) == 2 * 7 - 1 and not any("layers.0.mlp.down" in name for name in found)


def test_moments_are_damped(tiny_llama):
    """Against sums in fp64: every channel has DAMPING times the mean power more."""
    seen, ids = [], random_ids(tiny_llama, 256, 64)
    handle = tiny_llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        found = moments_of(tiny_llama, ids)["model.layers.1.mlp.up_proj"]
    finally:
        handle.remove()
    x = torch.cat(seen).flatten(0, -2).double()
    want = x.T @ x / len(x)
    want += torch.eye(len(want)) * want.diagonal().mean() * moments.DAMPING
    assert len(x) == 256 and moments.DAMPING > 0.1
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)


def test_progress_of_moments(tiny_llama):
    said = []
    moments_without_data(tiny_llama, "random", lambda *what: said.append(what))
    assert said[-1] == ("second moments", 4096, 4096) and len(said) == 4
