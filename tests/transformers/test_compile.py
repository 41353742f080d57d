"""Decode steps under torch.compile: no graph break, the tokens of plain steps, and no padding that goes unseen."""

import pytest
import torch

from turboquant.integrations.transformers import TurboQuantCache, attach, quantize
from turboquant.integrations.transformers.attention import _assert_causal

SMALL = "page=16,ring=24,sinks=2,rewind=16"


@torch.no_grad()
def decode(model, step, inputs, recipe, steps, masked, last=1):
    """Greedy tokens; the prompt goes through `model`, the steps through `step`, with the padding mask if `masked`."""
    cache = TurboQuantCache(model, recipe, max_tokens=128)
    out = model(**inputs, past_key_values=cache)
    token, mask, tokens = out.logits[:, -1:].argmax(-1), inputs["attention_mask"], []
    for i in range(steps):
        mask = torch.cat([mask, torch.full_like(token, last if i == steps - 1 else 1)], 1)
        given = {"attention_mask": mask} if masked else {}
        token = step(input_ids=token, past_key_values=cache, **given).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_compiled_steps_are_plain_steps(name, masked, tiny, prompt):
    """Over two page boundaries, one recipe after another: what differs between them must not be traced as a number."""
    model, inputs = tiny(name), prompt((40, 23) if masked else (40, 40))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for recipe in (f"kv4:{SMALL}", f"k4v3:{SMALL}"):
        want = decode(model, model, inputs, recipe, 24, masked)
        assert torch.equal(decode(model, compiled, inputs, recipe, 24, masked), want), recipe


@pytest.mark.slow
def test_native_layers_between_compiled_graphs(tiny, prompt):
    """Cut into graphs around native calls a model computes what it computes by itself."""
    model, inputs = tiny("llama-gqa").bfloat16(), prompt()
    quantize(model, "w4a8")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    want = decode(model, model, inputs, f"kv4:{SMALL}", 6, False)
    assert torch.equal(decode(model, compiled, inputs, f"kv4:{SMALL}", 6, False), want)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    torch.compiler.reset()  # the broken graphs are kept by code that all layers share


@pytest.mark.slow
def test_padding_in_a_compiled_step_fails(tiny, prompt):
    model, inputs = tiny("llama-gqa"), prompt()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    decode(model, model, inputs, f"kv4:{SMALL}", 2, True, last=0)
    with pytest.raises(RuntimeError, match="takes no padding"):
        decode(model, compiled, inputs, f"kv4:{SMALL}", 2, True, last=0)


@pytest.mark.parametrize("window", [None, 8])
def test_only_causal_masks_pass_where_none_can_be_read(window):
    """A mask without the layer's window is another mask, in a chunk longer than it."""
    t = torch.arange(20)
    back = t[:, None] - t
    causal, local = back >= 0, (back >= 0) & (back < 8)
    right, wrong = (causal, local) if window is None else (local, causal)
    _assert_causal(right[None, None], window)
    with pytest.raises(RuntimeError, match="no mask but causal"):
        _assert_causal(wrong[None, None], window)


def test_a_local_layer_without_a_cache_keeps_its_window(tiny, prompt):
    """Our mask function may leave out a mask that only says causal: not one of a window shorter than the prompt."""
    model, ids = tiny("mistral"), prompt((40, 40))["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        attach(model, "kv4")
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
