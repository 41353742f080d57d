"""What `from_pretrained` and TurboQuantConfig refuse of linear recipes: damaged checkpoints, names and options that fit
nothing.
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from turboquant import TurboQuantConfig
from turboquant.integrations.transformers import quantize
from turboquant.layers.moments import FeedbackError
from turboquant.packed.checkpoint import CheckpointError
from turboquant.recipe import RecipeError


def load(folder, recipe, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TurboQuantConfig(recipe, **options))


def test_names_that_are_no_list_are_refused():
    with pytest.raises(RecipeError, match="must be a list"):
        TurboQuantConfig("w4", modules_to_not_convert="lm_head")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def packed(saved, tmp_path):
    _, folder = saved("llama-gqa")
    load(folder, "w4a8").save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), [f"'{Q}.weight_scale'", "missing"]),
        (lambda t: t.pop("model.norm.weight"), ["'model.norm.weight'", "missing"]),
        (lambda t: t.update({f"{Q}.more": torch.ones(1)}), [f"'{Q}.more'", "not part"]),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :5].clone()}), [f"'{Q}.weight'", "expected"]),
        (lambda t: t.update({f"{Q}.weight_zero": t[f"{Q}.weight_zero"].float()}), [f"'{Q}.weight_zero'", "uint8"]),
    ],
)
def test_damaged_checkpoints(packed, change, words):
    edit(packed, change)
    with pytest.raises(CheckpointError) as e:
        AutoModelForCausalLM.from_pretrained(packed)
    assert "model.safetensors" in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_truncated_file(packed):
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"model\.safetensors|incomplete|invalid|metadata|Incomplete"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(("key", "value", "words"), [("format", 99, "format 99"), ("recipe", "w8a8", "expected")])
def test_a_configuration_that_the_checkpoint_cannot_serve(packed, key, value, words):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(packed)


def test_output_embeddings_of_the_first_format_are_refused():
    for refused in ({"recipe": "w4a8:head=8"}, {"recipe": "w4", "overrides": {"lm_head": "w8a8:head=8"}}):
        with pytest.raises(CheckpointError, match="format 1 with"):
            TurboQuantConfig(**refused, format=1)
    for read in ("w4a8", "w4:head=8", "w4a4:head=8", "kv4"):
        assert TurboQuantConfig(read, format=1).format == 1


@pytest.mark.parametrize("feedback", ["itself", "random:x", "self:", "self:/no/such/folder/words.json", 64, True])
def test_feedback_refuses(feedback):
    with pytest.raises(FeedbackError, match="feedback="):
        TurboQuantConfig("w4a8", feedback=feedback)
    with pytest.raises(FeedbackError, match="is for weights, which 'a8kv4' leaves"):
        TurboQuantConfig("a8kv4", feedback="random")


def test_overrides_that_decide_nothing_warn(saved):
    _, folder = saved("llama-gqa")
    silent = {"layers.0": "none", "q_proj": "w8a8"}
    for overrides, words in (
        (silent | {"lm_head": "w8"}, "'lm_head' decides nothing: it names the output embeddings"),
        (silent | {"embed_tokens": "w8"}, "'embed_tokens' decides nothing: it names the input embeddings"),
        (silent | {"norm": "w8"}, "'norm' decides nothing: it fits no linear layer"),
        ({"proj": "w8", "q_proj": "w4"}, "'q_proj' decides nothing: it fits no linear layer that another"),
    ):
        with pytest.warns(UserWarning, match=words):
            load(folder, "w8", overrides=overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, "w8", overrides=silent | {"lm_head": "w8:head=8"})
        load(folder, "w8:head=8", overrides=silent | {"lm_head": "none"})


def test_config_refuses():
    for options, words in (
        (dict(recipe="w5a8"), "unknown recipe"),
        (dict(recipe="w4", overrides={"(": "w8"}), "regular expression"),
        (dict(recipe="w4:group=7"), "group=7"),
    ):
        with pytest.raises(RecipeError, match=words):
            TurboQuantConfig(**options)
    with pytest.raises(ValueError, match="bits"):
        TurboQuantConfig("w4", bits=3)


def test_names_and_patterns_that_fit_nothing_are_refused(tiny):
    with pytest.raises(RecipeError, match=r"'nosuch'.* names no module of this model; its layers have names"):
        quantize(tiny("llama-gqa"), TurboQuantConfig("w4a8", modules_to_not_convert=["nosuch"]))
    with pytest.raises(RecipeError, match="the override 'foo' fits no module of this model; its layers have names"):
        quantize(tiny("llama-gqa"), TurboQuantConfig("w4a8", overrides={"foo": "w8"}))
