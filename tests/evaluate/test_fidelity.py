"""The measures against hand computations, and the figures against what they must show."""

import json
import math

import pytest
import torch

from turboquant.evaluate import EvaluateError, fidelity
from turboquant.evaluate.fidelity import _forward, _statistics, standard_error
from turboquant.evaluate.heads import Head
from turboquant.integrations.transformers import TurboQuantCache
from turboquant.kernels.ops import BackendError
from turboquant.recipe import RecipeError

SCHEMA = {
    "recipe": str, "model": str, "dtype": str, "device": str, "kernel": str, "text": str, "version": str,
    "ctx": int, "tokens": int, "stride": int, "chunk": type(None), "backend": str, "cache_tokens": int,
    "nonfinite": int, "cache_bytes": int, "ring_bytes": int, "state_bytes": int, "base_cache_bytes": int,
    "ppl_base": float, "ppl": float, "dppl_percent": float, "dppl_se": float, "kl": float, "kl_se": float,
    "top1": float, "top1_se": float, "match": float, "match_se": float,
    "key_bits": float, "value_bits": float, "weight_bits": float, "activation_bits": float, "seconds": float,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tiny_llama, tiny_tokenizer, prose):
    names = ["base", "kv8", "kv4", "plain4", "plain4+ring", "plain4:ring=128"]
    return {r["recipe"]: r for r in fidelity(tiny_llama, tiny_tokenizer, names, prose, 512, 1024, name="tiny")}


def test_paired_standard_error_and_perplexity_by_hand():
    base, nll = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.1, 2.1, 3.3, 3.9])
    got = _statistics(base, nll, torch.tensor([[0.1, 0.3], [1.0, 0.0], [0.9, 0.7]]))
    d = [0.1, 0.1, 0.3, -0.1]
    mean = sum(d) / 4
    se = math.sqrt(sum((x - mean) ** 2 for x in d) / 3) / math.sqrt(4)
    assert got["dppl_percent"] == pytest.approx(100 * (math.exp(mean) - 1), rel=1e-5)
    assert got["dppl_se"] == pytest.approx(100 * se * math.exp(mean), rel=1e-5)
    assert got["ppl_base"] == pytest.approx(math.exp(2.5))
    assert got["ppl"] == pytest.approx(math.exp(2.6))
    assert (got["kl"], got["top1"], got["match"]) == pytest.approx((0.2, 50.0, 80.0))
    assert got["kl_se"] == pytest.approx(math.sqrt(0.02) / math.sqrt(2), rel=1e-5)
    assert standard_error(torch.ones(1)) == 0


def test_row_has_every_column_with_its_type(rows):
    for row in rows.values():
        assert {k: type(v) for k, v in row.items()} == SCHEMA
        json.dumps(row, allow_nan=False)


def test_chunks_read_what_whole_windows_read(rows, tiny_llama, tiny_tokenizer, prose):
    """Every row reads its pages either way; the passes are as long as was asked, for the base too."""
    passes = []
    handle = tiny_llama.get_decoder().register_forward_pre_hook(
        lambda m, a, kw: passes.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    options = dict(ctx=512, tokens=1024, name="tiny", chunk=100, backend="reference")
    (row,) = fidelity(tiny_llama, tiny_tokenizer, ["kv4"], prose, **options)
    assert passes.count(100) == 2 * 5 and passes.count(12) == 2 and row["kernel"] == row["backend"] == "reference"
    for key in ("ppl", "kl", "top1", "match"):
        assert row[key] == pytest.approx(rows["kv4"][key], rel=0.02), key
    passes.clear()
    fidelity(tiny_llama, tiny_tokenizer, ["w4a8"], prose, **options)
    assert passes.count(100) == 2 * 5 and passes.count(12) == 2, "recipes without a cache too"
    handle.remove()
    with pytest.raises(BackendError, match="cuda"):
        fidelity(tiny_llama, tiny_tokenizer, ["kv4"], prose, **options | {"backend": "cuda"})


def test_base_is_exactly_nothing(rows):
    base = rows["base"]
    assert (base["kl"], base["dppl_percent"], base["dppl_se"]) == (0, 0, 0)
    assert (base["top1"], base["match"], base["key_bits"]) == (100, 100, 32)
    # 2 windows, 2 layers, keys and values, 2 heads of 32, 512 tokens, 4 bytes
    assert base["cache_bytes"] == base["base_cache_bytes"] == 2 * 2 * 2 * 2 * 32 * 512 * 4


def test_figures_order_as_they_must(rows):
    assert 0 < rows["kv8"]["kl"] < 1e-3
    assert rows["kv8"]["kl"] * 20 < rows["kv4"]["kl"] < rows["plain4+ring"]["kl"]
    assert rows["plain4"]["kl"] > 2 * rows["plain4+ring"]["kl"]
    assert rows["plain4"]["match"] < rows["plain4+ring"]["match"] < rows["kv8"]["match"]


def test_the_cache_and_the_baseline_agree_on_the_paper(rows):
    """Two implementations of one scheme: the real cache with its pages, and fake quantization of whole windows."""
    cache, fake = rows["plain4:ring=128"], rows["plain4+ring"]
    assert cache["kernel"] in ("cpu", "reference") and fake["kernel"] == "fake-quant"
    assert cache["kl"] == pytest.approx(fake["kl"], rel=0.02)
    assert cache["match"] == pytest.approx(fake["match"], abs=0.05)
    assert cache["key_bits"] == fake["key_bits"] == 4 + 16 / 32


@torch.no_grad()
def test_row_exact_windows_equal_single_steps(tiny_llama, tiny_tokenizer, prose):
    """A window fed at once reads what decode reads; fed without row_exact it does not."""
    ids = torch.tensor([tiny_tokenizer(prose[:400])["input_ids"], tiny_tokenizer(prose[500:900])["input_ids"]])
    decoder = tiny_llama.get_decoder()

    def run(step, row_exact):
        cache = TurboQuantCache(tiny_llama, "kv3")
        cache.row_exact = row_exact
        parts = [
            decoder(input_ids=ids[:, i : i + step], past_key_values=cache, use_cache=True).last_hidden_state
            for i in range(0, 400, step)
        ]
        return torch.cat(parts, 1)

    single = run(1, False)
    cache = TurboQuantCache(tiny_llama, "kv3")
    cache.row_exact = True
    whole = _forward(decoder, ids, cache)
    exact = decoder(input_ids=ids, use_cache=False).last_hidden_state
    noise = (single - exact).abs().max()
    assert (whole - single).abs().max() < 1e-3 * noise
    assert (run(400, False) - single).abs().max() > 0.1 * noise


def test_stride_and_batch_change_what_they_say_and_no_more(tiny_llama, tiny_tokenizer, prose, rows):
    some = fidelity(tiny_llama, tiny_tokenizer, ["kv4"], prose, 512, 1024, stride=3, batch=1)[0]
    assert some["ppl"] == pytest.approx(rows["kv4"]["ppl"], rel=1e-5)
    assert some["kl"] != rows["kv4"]["kl"] and some["kl"] == pytest.approx(rows["kv4"]["kl"], rel=0.3)
    assert some["cache_tokens"] == 512


def test_rerun_keeps_finished_rows_and_measures_the_rest(tiny_llama, tiny_tokenizer, prose, tmp_path):
    path = tmp_path / "rows.json"
    run = lambda names, ctx=128: fidelity(tiny_llama, tiny_tokenizer, names, prose, ctx, 256, name="t", json=path)  # noqa: E731
    run(["int8-token"])
    saved = json.loads(path.read_text())
    saved[0]["seconds"] = 12345.0
    path.write_text(json.dumps(saved))
    both = run(["int4-token", "int8-token"])
    assert [r["recipe"] for r in both] == ["int4-token", "int8-token"]
    assert both[1]["seconds"] == 12345.0 != both[0]["seconds"]
    assert {r["recipe"] for r in json.loads(path.read_text())} == {"int4-token", "int8-token"}
    assert run(["int8-token"], ctx=64)[0]["seconds"] != 12345.0, "other settings must be measured again"
    assert list(tmp_path.iterdir()) == [path], "temporary files are left"


def test_a_file_that_holds_no_rows_is_left_alone(tiny_llama, tiny_tokenizer, prose, tmp_path):
    path = tmp_path / "precious.json"
    path.write_text('{"a": 1}')
    with pytest.raises(EvaluateError, match=r"precious\.json"):
        fidelity(tiny_llama, tiny_tokenizer, ["kv4"], prose, 128, 128, json=path)
    assert path.read_text() == '{"a": 1}'


def test_the_model_is_left_as_it_was(tiny_llama, tiny_tokenizer, prose):
    before = tiny_llama.config._attn_implementation
    fidelity(tiny_llama, tiny_tokenizer, ["kv4", "int8-token"], prose, 96, 96)
    assert tiny_llama.config._attn_implementation == before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"recipes": ["kv5x"]}, RecipeError, ["kv5x", "kv4", "kivi-g32"]),
        ({"recipes": []}, EvaluateError, ["recipes"]),
        ({"texts": "short text"}, EvaluateError, ["10 tokens", "ctx=512"]),
        ({"tokens": 10**6}, EvaluateError, ["tokens=1000000", "windows"]),
        ({"ctx": 1}, EvaluateError, ["ctx=1"]),
        ({"stride": 0}, EvaluateError, ["stride=0"]),
        ({"chunk": 0}, EvaluateError, ["chunk=0"]),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    tiny_llama, tiny_tokenizer, prose, monkeypatch, arguments, error, words
):
    monkeypatch.setattr(type(tiny_llama), "forward", lambda *a, **k: pytest.fail("work was begun"))
    given = {"recipes": ["kv4"], "texts": prose, "ctx": 512, "tokens": 1024} | arguments
    with pytest.raises(error) as e:
        fidelity(tiny_llama, tiny_tokenizer, **given)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_kl_is_from_the_unquantized_model():
    """KL(base || changed), not the other way round: 0.5·ln(0.5/0.9) + 0.5·ln(0.5/0.1)."""
    head = Head(None, torch.nn.Linear(2, 2, bias=False), None, 1.0)
    head.linear.weight.data = torch.eye(2)
    base, changed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    kl, _, match = head.compare(base, changed)[:, 0].tolist()
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)
    assert match == pytest.approx(0.6, rel=1e-5)


def test_a_baseline_with_a_ring_pays_for_it(rows):
    with_ring, without = rows["plain4+ring"], rows["plain4"]
    assert with_ring["cache_bytes"] - without["cache_bytes"] == with_ring["ring_bytes"] > 0


def test_rows_of_other_settings_stay_in_the_file(tiny_llama, tiny_tokenizer, prose, tmp_path):
    path = tmp_path / "rows.json"
    for ctx in (128, 256):
        fidelity(tiny_llama, tiny_tokenizer, ["kv8"], prose, ctx, 256, name="tiny", json=path)
    assert [row["ctx"] for row in json.loads(path.read_text())] == [128, 256]


def test_a_ctx_the_model_was_not_made_for(tiny_llama, tiny_tokenizer, prose):
    most = tiny_llama.config.max_position_embeddings
    with pytest.raises(EvaluateError, match=f"ctx={most + 1} is more than this model was made for: at most {most}"):
        fidelity(tiny_llama, tiny_tokenizer, ["kv4"], prose, most + 1, most + 1)
