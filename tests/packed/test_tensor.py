"""PackedTensor: bytes and sizes; checkpoints: every defect is named before anything is loaded."""

import doctest

import pytest
import torch
from safetensors.torch import save_file

import turboquant.packed.tensor
from turboquant.maths.weights import decode_weight, encode_weight
from turboquant.packed.checkpoint import FORMAT, CheckpointError, check, check_format, headers
from turboquant.packed.tensor import NAMES, PackedTensor
from turboquant.recipe import WeightRecipe


def test_doctest():
    found = doctest.testmod(turboquant.packed.tensor, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


@pytest.mark.parametrize("shape", [(24, 64), (3, 24, 576)])
@pytest.mark.parametrize(
    "recipe", [WeightRecipe(4), WeightRecipe(8), WeightRecipe(4, group=0), WeightRecipe(8, group=32)]
)
def test_quantize_and_sizes(shape, recipe):
    w = torch.randn(shape)
    p = PackedTensor.quantize(w, recipe)
    assert p.shape == shape and p.stages == recipe.stages and p.group == recipe.group_of(shape[-1])
    for name, t in p.tensors().items():
        assert (tuple(t.shape), t.dtype) == PackedTensor.specs(shape, recipe)[name]
    assert p.nbytes * 8 / w.numel() == pytest.approx(recipe.bits_per_weight(shape[-1]))
    want = decode_weight(encode_weight(w, p.group, recipe.stages, recipe.clips(False)))
    assert torch.equal(p.dequantize(), want)
    if len(shape) == 3:
        assert torch.equal(p.select(1).dequantize(), want[1])
    if recipe.stages == 2:
        assert 5 < (p.dequantize(1) - w).norm() / (want - w).norm() < 40


def test_one_row_is_one_row():
    """One-hot rows: the output of a product with the packed weight is the decoded weight itself."""
    p = PackedTensor.quantize(torch.randn(16, 32), WeightRecipe(8))
    assert torch.equal(torch.eye(32) @ p.dequantize().T, p.dequantize().T)


@pytest.fixture
def good(tmp_path):
    """A file with a packed weight and a norm, and what is expected in it."""
    p = PackedTensor.quantize(torch.randn(16, 32), WeightRecipe(4))
    tensors = {f"layer.{n}": t for n, t in p.tensors().items()} | {"norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    expected = {f"layer.{n}": spec for n, spec in PackedTensor.specs((16, 32), WeightRecipe(4)).items()}
    expected["norm.weight"] = ((32,), None)
    return tmp_path / "model.safetensors", tensors, expected


def test_a_sound_checkpoint(good):
    path, tensors, expected = good
    save_file(tensors, path)
    check([path], expected)
    assert set(headers([path])) == set(tensors) and set(NAMES) <= {n.removeprefix("layer.") for n in tensors}


@pytest.mark.parametrize("name", ["layer.weight", "layer.weight_scale", "norm.weight"])
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "extra"])
def test_damaged_tensors(good, name, damage):
    path, tensors, expected = good
    t = tensors[name]
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.cat([t, t])
    elif damage == "dtype":
        tensors[name] = t.to(torch.int64)
    else:
        name = "layer.weight_more"
        tensors[name] = t.clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as e:
        check([path], expected)
    assert str(path) in str(e.value) and repr(name) in str(e.value)


def test_damaged_files(good, tmp_path):
    path, tensors, expected = good
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        check([path], expected)
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        check([tmp_path / "none.safetensors"], expected)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="safetensors files only"):
        check([tmp_path / "model.bin"], expected)


def test_the_same_tensor_in_two_shards(good, tmp_path):
    path, tensors, expected = good
    save_file(tensors, path)
    save_file({"norm.weight": tensors["norm.weight"]}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"'norm.weight' stands also in model\.safetensors"):
        check([path, tmp_path / "more.safetensors"], expected)


def test_tied_tensors_may_be_missing(good):
    path, tensors, expected = good
    save_file(tensors, path)
    check([path], expected | {"head.weight": ((3, 3), None)}, optional=["head.weight"])


@pytest.mark.parametrize("value", [FORMAT + 1, 0, "1", None, True])
def test_formats_of_the_future(value):
    with pytest.raises(CheckpointError, match=r"config\.json: format .* is not known"):
        check_format(value, "config.json")
    check_format(FORMAT, "config.json")
