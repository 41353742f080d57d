"""The Triton backend compiled for a GPU, against the reference: its interpreter cannot tell what a compiler does."""

import pytest
import torch

from turboquant.kernels import reference
from turboquant.layers.cache import LayerCache
from turboquant.packed.buffers import CacheBuffers
from turboquant.recipe import parse_recipe

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}  # of the output's RMS


@pytest.mark.cuda
@pytest.mark.parametrize("n", [1, 8, 65], ids="{} tokens".format)
@pytest.mark.parametrize("d, hq", [(64, 6), (64, 14), (128, 8), (256, 4)])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_attention_is_that_of_the_reference(dtype, d, hq, n, tokens):
    """Few rows and many: tiles of every height."""
    from turboquant.kernels.triton.prefill import cache_attention

    some = [tokens(hq, 2, 390 + n, d, dtype, seed) for seed in (1, 2)]
    q, k, v = (torch.stack(x) for x in zip(*some, strict=True))
    cache = LayerCache(parse_recipe("kv4").kv)
    cache._start(k)
    cache._reserve([390, 390])
    reference.cache_append(cache.buf, cache.layout, *(x[:, :, :390] for x in (q, k, v)), None)
    chunk = [x[:, :, 390:] for x in (q, k, v)]
    want = reference.cache_attention(cache.buf, cache.layout, *chunk).float()
    there = CacheBuffers(**{name: t.cuda() for name, t in vars(cache.buf).items()})
    got = cache_attention(there, cache.layout, *(x.cuda() for x in chunk)).cpu().float()
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    assert rms(got - want) <= LIMIT[dtype] * rms(want), rms(got - want) / rms(want)
