"""Pages and tail in vLLM's blocks against our own LayerCache, without an engine: any cut of the prompts, any batch."""

import random
from itertools import pairwise

import pytest
import torch
from block_engine import Engine, H, drifted, drifting, expected, in_any_order, near, stream

from turboquant.integrations.vllm.blocks import BlockLayout
from turboquant.integrations.vllm.plan import NULL, order, pieces
from turboquant.integrations.vllm.spec import TailSpec
from turboquant.integrations.vllm.tail import expand, pool
from turboquant.packed.page import PageLayout
from turboquant.recipe import parse_recipe

CASES = [
    ("kv4", torch.float32, None, None),
    ("kv4", torch.bfloat16, None, None),
    ("kv4:ring=40,page=32,sinks=20,rewind=8", torch.float32, None, 5.0),
    ("k4v3:page=128,hot=2", torch.float32, None, None),
    ("plain3:ring=0,sinks=0", torch.float32, None, None),
    ("kv8:page=16,ring=64,rewind=16", torch.float32, None, None),
    ("raw:page=32", torch.float32, None, None),
]


@pytest.mark.parametrize("recipe,dtype,window,softcap", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_schedule_gives_the_bytes_and_outputs_of_our_own_cache(recipe, dtype, window, softcap, seed):
    rng = random.Random(seed)
    lengths = [rng.randrange(5, 420) for _ in range(4)]
    streams = [stream(n, seed * 10 + i, dtype) for i, n in enumerate(lengths)]
    engine = Engine(recipe, dtype, window, softcap)
    outputs = in_any_order(engine, streams, rng, (1, 1, 1, 5, 64, 90, 300))
    for i, (want, pages) in enumerate(expected(recipe, streams, window, softcap)):
        near(outputs[i], want)
        assert torch.equal(engine.stored(str(i), lengths[i]), pages)
    assert int(engine.impl.nonfinite) == 0


@pytest.mark.parametrize("recipe", ["kv4", "kv4:page=32,rewind=16", "raw"])
def test_rejected_tokens_leave_nothing_behind(recipe):
    """Verify steps of four tokens, of which some are rejected and come again differently, also across page ends."""
    rng, (q, k, v) = random.Random(3), stream(300, 5)
    engine, done, out = Engine(recipe), 40, torch.empty_like(q)
    out[:40] = engine.step([("a", 0, q[:40], k[:40], v[:40])])[0]
    while done < 300:
        n, keep = min(5, 300 - done), rng.randrange(1, 6)
        rows = [x[done : done + n].clone() for x in (q, k, v)]
        for x in rows:
            x[keep:] += 7  # tokens that will not be the request's
        got = engine.step([("a", done, *rows)])[0]
        keep = min(keep, n)
        out[done : done + keep] = got[:keep]
        done += keep
    [(want, pages)] = expected(recipe, [(q, k, v)])
    near(out, want)
    assert torch.equal(engine.stored("a", 300), pages)


@pytest.mark.parametrize("recipe", ["kv4", "kv4:ring=64,page=32,rewind=16"])
def test_a_hit_goes_on_bit_by_bit_as_the_miss_did(recipe):
    """Two requests share 512 tokens; the second takes the first's blocks, of pages and tail, as a prefix hit does."""
    q, k, v = stream(700, 8)
    engine = Engine(recipe)
    whole = engine.step([("a", 0, q, k, v)])[0]
    size, page = engine.layout.tokens, engine.layout.kv.page
    engine.pages["b"] = engine.pages["a"][: 512 // page]
    engine.tails["b"] = engine.tails["a"][: 512 // size]
    needed = range(512 - engine.layout.window, 512)
    assert all(engine.tails["b"][t // size] != NULL for t in (*needed, *range(engine.layout.kv.sinks)))
    again = engine.step([("b", 512, q[512:], k[512:], v[512:])])[0]
    assert torch.equal(again, whole[512:])
    assert torch.equal(engine.stored("b", 700), engine.stored("a", 700))


def test_a_hit_on_what_the_same_step_writes_comes_after_it():
    q, k, v = stream(200, 9)
    engine = Engine("kv4")
    engine.grow("a", 0, 128)
    engine.pages["b"], engine.tails["b"] = list(engine.pages["a"]), list(engine.tails["a"])
    b, a = engine.step([("b", 128, q[128:], k[128:], v[128:]), ("a", 0, q[:128], k[:128], v[:128])])
    near(torch.cat([a, b]), expected("kv4", [(q, k, v)])[0][0])
    tails = engine.tails["b"]
    table = torch.tensor([tails, engine.tails["a"] + [NULL] * (len(tails) - len(engine.tails["a"]))])
    assert order(engine.layout, [128, 0], [72, 128], table) == [1, 0]
    assert order(engine.layout, [128, 128], [1, 1], table) == [0, 0]


def test_window_and_pages_outside_it():
    q, k, v = stream(400, 11)
    engine = Engine("kv4", window=150)
    out = []
    for start in range(0, 400, 50):
        engine.grow("a", start, start + 50)
        for i in range(max(0, start - 149) // 64):
            engine.pages["a"][i] = NULL
        out.append(engine.step([("a", start, *(x[start : start + 50] for x in (q, k, v)))])[0])
    near(torch.cat(out), expected("kv4", [(q, k, v)], window=150)[0][0])


def test_nonfinite_tokens_are_counted_once():
    q, k, v = stream(200, 12)
    k[70, 1, 3], v[70, 0, 0] = torch.nan, torch.inf
    engine = Engine("kv4")
    engine.step([("a", 0, q[:100], k[:100], v[:100])])
    engine.step([("a", 100, q[100:], k[100:], v[100:])])
    assert int(engine.impl.nonfinite) == 1


@pytest.mark.parametrize("cuts", [(640,), (30, 70, 200, 513, 640), tuple(range(1, 641, 3))])
def test_drift_alarms(cuts):
    """None while the keys stay as they are; every page from a change until the tracker has followed; no matter how
    the tokens come. Recipes without a tracker have none."""
    cuts = [0, *cuts, 640] if cuts[-1] != 640 else [0, *cuts]
    streams = {"a": stream(640, 21), "b": drifting(21, 320), "c": drifting(22, 320)}
    engine, plain = Engine("kv4"), Engine("plain4")
    for start, end in pairwise(cuts):
        engine.step([("a", start, *(x[start:end] for x in streams["a"]))])
    assert int(engine.impl.alarms) == 0
    for start, end in pairwise(cuts):
        work = [(name, start, *(x[start:end] for x in streams[name])) for name in ("b", "c")]
        engine.step(work)
        plain.step(work)
    want = sum(drifted(engine.layout.kv, *streams[name][:2]) for name in ("b", "c"))
    assert int(engine.impl.alarms) == want >= 4 * H
    assert int(plain.impl.alarms) == 0


@pytest.mark.parametrize(
    "recipe", ["kv4", "kv3", "kv8", "k4v3", "plain4", "kv4:page=16,rewind=16", "kv4:page=512", "raw"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_parts_of_a_tail_block_do_not_overlap(recipe, dtype, head_dim):
    layout = BlockLayout(parse_recipe(recipe).kv, head_dim, dtype)
    assert layout.kv.page % layout.tokens == 0 and layout.row % 16 == layout.row % layout.kv.page == 0
    assert layout.row >= PageLayout(layout.kv, head_dim).page_bytes
    rows = torch.zeros(3, 2, layout.row, dtype=torch.uint8)
    views = layout.views(rows)
    assert views["tracker"].shape[-1] * (layout.kv.page // layout.tokens) >= 3 * head_dim
    for i, part in enumerate(views.values()):
        part.fill_(i + 1)
    for i, part in enumerate(views.values()):
        assert (part == i + 1).all()
    assert layout.views(rows)["k"].shape == (3, 2, layout.tokens, head_dim)


@pytest.mark.parametrize("head_dim,most", [(64, 1.01), (128, 1.03), (256, 1.01)])
def test_pages_of_kv4_are_hardly_padded_for_the_tail(head_dim, most):
    layout = BlockLayout(parse_recipe("kv4").kv, head_dim, torch.bfloat16)
    assert layout.tokens == 16 and layout.row <= most * PageLayout(layout.kv, head_dim).page_bytes


def test_pieces_depend_on_positions_only():
    for page, chunk in ((64, 65), (64, 1), (32, 20), (128, 1)):
        whole = pieces(0, 300, page, chunk)
        for cut in (64, 128, 256):
            assert [p for p in whole if p[0] >= cut] == pieces(cut, 300 - cut, page, chunk)
        assert max(n for _, n in whole) <= min(page, chunk)


def test_tail_blocks_that_are_kept():
    spec = TailSpec(
        block_size=16, num_kv_heads=1, head_size=64, dtype=torch.uint8, state_content_bytes=64, tokens_per_state=16,
        sliding_window=128, sink_blocks=1, margin=64, interval=512,
    )  # fmt: skip
    kept = [i for i in range(125) if spec.wanted(i, 2000)]
    points = [i for p in (512, 1024, 1536) for i in range(p // 16 - 8, p // 16)]
    assert kept == [0, *points, *range((2000 - 192) // 16, 125)]
    assert spec.max_admission_blocks_per_request(2000, 10**6) >= len(kept) + 9


@pytest.mark.parametrize("padding", [0, 3 * 2 * 32])
def test_blocks_of_several_pages_as_vllm_gives_them_beside_larger_states(padding):
    """vLLM's block of 3 pages of 2 heads, perhaps padded -> rows that do not overlap, null blocks null."""
    stride = 3 * 2 * 64 + padding
    raw = torch.arange(5 * stride, dtype=torch.int64).to(torch.uint8)
    rows = pool(raw.as_strided((5, 2, 3, 64), (stride, 3 * 64, 64, 1)))
    assert rows.shape == (15, 2, stride // 6) and rows.is_contiguous() and rows.data_ptr() == raw.data_ptr()
    assert torch.equal(rows.flatten(), raw)
    assert expand(torch.tensor([[2, 0, 1]]), 3).tolist() == [[6, 7, 8, 0, 0, 0, 3, 4, 5]]
    with pytest.raises(ValueError, match="16-byte rows"):
        pool(raw.as_strided((4, 2, 3, 64), (stride + 8, 192, 64, 1)))
