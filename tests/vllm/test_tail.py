"""What the tail's builder tells vLLM of CUDA graphs and of lengths; GPUs are made up."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from turboquant.integrations.vllm import device, tail
from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.recipe import parse_recipe

GPU = torch.device("cuda")


def layout(recipe="kv4", dtype=torch.bfloat16):
    return BlockLayout(parse_recipe(recipe).kv, 64, dtype)


@pytest.mark.parametrize(
    ("recipe", "drafts", "support"),
    [
        ("kv4", None, "UNIFORM_BATCH"), ("kv4", 7, "UNIFORM_BATCH"), ("kv4", 8, "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("kv4:ring=67", 2, "UNIFORM_BATCH"), ("kv4:ring=67", 3, "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("kv4:ring=65", None, "UNIFORM_BATCH"), ("kv4:ring=65", 1, "UNIFORM_SINGLE_TOKEN_DECODE"),
    ],
)  # fmt: skip
def test_graphs_hold_rows_as_long_as_are_served_together(recipe, drafts, support, monkeypatch):
    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    speculative = drafts and SimpleNamespace(num_speculative_tokens=drafts)
    for kind in ("cuda", "cpu"):
        config = SimpleNamespace(device_config=SimpleNamespace(device_type=kind), speculative_config=speculative)
        want = AttentionCGSupport[support] if kind == "cuda" else AttentionCGSupport.NEVER
        assert tail.tail_backend(layout(recipe)).builder.get_cudagraph_support(config, None) is want
    monkeypatch.setattr(device, "obstacle", lambda *_: "something")
    config.device_config.device_type = "cuda"
    assert device.graphs(layout(recipe), config) is AttentionCGSupport.NEVER


@pytest.mark.parametrize(
    ("recipe", "dtype", "why"),
    [("kv4:ring=64", torch.bfloat16, "a ring of 64 tokens, not longer"), ("kv4", torch.float32, "a cache in torch.fl")],
)
def test_what_runs_outside_of_graphs_says_why(recipe, dtype, why, monkeypatch):
    spec, made = SimpleNamespace(interval=512), []
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=4), speculative_config=None
    )
    monkeypatch.setattr(tail, "Steps", lambda *args: made.append(args) or "steps")
    build = tail.tail_backend(layout(recipe, dtype)).builder
    with pytest.warns(UserWarning, match=f"attended to eagerly, outside of CUDA graphs: {why}"):
        assert build(spec, ["x"], config, GPU).steps is None
    monkeypatch.setattr(tail, "obstacle", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(spec, ["x"], config, GPU).steps == "steps" and made[0][1:] == (512, 4, GPU)
        assert build(spec, ["x"], config, torch.device("cpu")).steps is None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("drafts", [None, SimpleNamespace(num_speculative_tokens=3)])
def test_lengths_are_the_devices_where_drafts_are_accepted_while_the_next_step_is_planned(ahead, drafts):
    scheduler = SimpleNamespace(async_scheduling=ahead, max_num_seqs=4)
    config = SimpleNamespace(scheduler_config=scheduler, speculative_config=drafts)
    builder = tail.tail_backend(layout()).builder(SimpleNamespace(interval=512), ["x"], config, torch.device("cpu"))
    assert bool(builder.exact) is not (ahead and drafts is not None)
