"""PageLayout: the one byte contract. Sections aligned and disjoint, sizes that add up, every field bit-equal."""

import dataclasses
import doctest

import pytest
import torch

from turboquant.maths import codec
from turboquant.maths.tracker import page_stats
from turboquant.packed import page as module
from turboquant.packed.page import ALIGN, PageLayout, pack_page, unpack_keys, unpack_values
from turboquant.recipe import EXAMPLES, KVRecipe, RecipeError, parse_recipe

SIZES = ("kv4:page=16,rewind=16", "kv4:page=128", "kv4:hot=0", "k3v2:hot=7", "kv4:page=512,hot=64")
RECIPES = (*EXAMPLES, "plain8", *SIZES)
DIMS = (16, 64, 80, 128, 256)
LAYOUTS = [PageLayout(parse_recipe(r).kv, d) for r in RECIPES for d in DIMS]
IDS = [f"{x.kv.name}-{x.head_dim}" for x in LAYOUTS]


def test_doctest():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_fields_are_disjoint_aligned_and_add_up(layout):
    fields = sorted(layout.fields.values(), key=lambda f: f.offset)
    assert [f.name for f in fields] == list(layout.fields), "listed in the order of the bytes"
    at = padding = 0
    for f in fields:
        assert f.offset >= at, f"{f.name} overlaps"
        padding += f.offset - at
        at = f.offset + f.nbytes
        assert f.offset % f.dtype.itemsize == 0
        if f.bits or f.name.endswith("hot_codes") or f.name.startswith("value_log") or f.name == "value_scale":
            assert f.offset % ALIGN == 0, f"section {f.name} is not aligned"
        if f.bits:
            assert f.shape == (layout.kv.page, layout.head_dim)
            assert f.nbytes * 8 == layout.kv.page * layout.head_dim * f.bits
    coded = {f.name: f.bits for f in fields if f.bits}
    assert coded == {"key_codes": layout.kv.key_bits, "value_codes": layout.kv.value_bits}
    assert fields[0].offset == 0 and layout.page_bytes % ALIGN == 0
    padding += layout.page_bytes - at
    assert sum(f.nbytes for f in fields) + padding == layout.page_bytes
    assert padding < ALIGN * len(fields)
    assert layout.key_bytes % ALIGN == 0
    numbers = layout.kv.page * layout.head_dim
    assert (layout.key_bits + layout.value_bits) * numbers == pytest.approx(layout.page_bytes * 8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_key_rows_start_aligned_again(layout):
    row = layout.fields["key_codes"].nbytes // layout.kv.page
    assert layout.row_tokens * row % ALIGN == 0
    assert all(n * row % ALIGN for n in range(1, layout.row_tokens))


def test_cost_of_a_page():
    """The bars of the project, everything in a page included."""
    for d, key_most, value_most in ((128, 4.65, 4.2), (64, 5.0, 4.35)):
        layout = PageLayout(parse_recipe("kv4").kv, d)
        assert 4 < layout.key_bits <= key_most
        assert 4 < layout.value_bits <= value_most
    for d in DIMS:
        bits = [PageLayout(parse_recipe(r).kv, d) for r in ("kv2", "kv3", "kv4", "kv8")]
        assert [x.key_bits for x in bits] == sorted(x.key_bits for x in bits)
        assert [x.value_bits for x in bits] == sorted(x.value_bits for x in bits)


def test_str_lists_every_field_and_the_true_bits():
    layout = PageLayout(KVRecipe(), 64)
    text = str(layout)
    assert all(name in text for name in layout.fields)
    assert f"{layout.page_bytes} bytes" in text and f"key {layout.key_bits:.3f}" in text


def random_values(layout, lead):
    out = {}
    for name, f in layout.fields.items():
        if f.bits:
            out[name] = torch.randint(0, 2**f.bits, (*lead, *f.shape), dtype=torch.uint8)
        else:
            raw = torch.randint(0, 256, (*lead, *f.shape, f.dtype.itemsize), dtype=torch.uint8)
            out[name] = raw.view(f.dtype).squeeze(-1)
    return out


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_every_field_comes_back_bit_equal(layout, lead):
    """Any bytes, NaN in the fp16 fields included."""
    values = random_values(layout, lead)
    pages = layout.write(values)
    assert pages.shape == (*lead, layout.page_bytes) and pages.dtype == torch.uint8
    for name, want in values.items():
        got = layout.read(pages, name)
        assert got.shape == want.shape and got.dtype == want.dtype
        raw = lambda t: t.contiguous().view(torch.uint8)  # noqa: E731
        assert torch.equal(raw(got), raw(want)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_padding_is_zero_and_each_byte_has_one_owner(layout):
    ones = {n: torch.full(f.shape, 255, dtype=torch.uint8) for n, f in layout.fields.items() if f.bits}
    values = {n: (v & (2 ** layout.fields[n].bits - 1)) for n, v in ones.items()}
    for name, f in layout.fields.items():
        if not f.bits:
            values[name] = torch.full((*f.shape, f.dtype.itemsize), 255, dtype=torch.uint8).view(f.dtype).squeeze(-1)
    page = layout.write(values)
    owned = torch.zeros(layout.page_bytes, dtype=torch.bool)
    for f in layout.fields.values():
        owned[f.offset : f.offset + f.nbytes] = True
    assert (page[owned] == 255).all() and not page[~owned].any()


def test_write_wants_exactly_its_fields():
    layout = PageLayout(KVRecipe(), 64)
    values = random_values(layout, ())
    missing = {k: v for k, v in values.items() if k != "key_base"}
    for wrong in (missing, values | {"more": values["key_base"]}):
        with pytest.raises(ValueError, match="a page needs the fields"):
            layout.write(wrong)


def leaves(x):
    for f in dataclasses.fields(x):
        value = getattr(x, f.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{f.name}.{n}", v) for n, v in leaves(value))
        else:
            yield f.name, value


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_codes_survive_the_page(layout):
    """encode -> pack -> unpack gives every code and header value of a real encoding back, bit for bit."""
    kv, d = layout.kv, layout.head_dim
    k, v = torch.randn(2, 2, kv.page, d) * 3 + 1, torch.randn(2, 2, kv.page, d)
    usable = torch.ones(2, 2, kv.page, dtype=torch.bool)
    if kv.codec == "plain":
        keys, values = codec.encode_plain(k, kv.key_bits), codec.encode_plain(v, kv.value_bits)
    else:
        stats = page_stats(k, torch.rand(2, 2, d), usable)
        keys = codec.encode_keys(k, stats, kv.key_bits, layout.hot, usable)
        values = codec.encode_values(v, kv.value_bits, usable)
    pages = pack_page(layout, keys, values)
    for want, got in ((keys, unpack_keys(layout, pages)), (values, unpack_values(layout, pages))):
        for (name, a), (same, b) in zip(leaves(want), leaves(got), strict=True):
            assert name == same and a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("head_dim", [0, 8, 15, 40, 100, 272, 512])
def test_head_dims_that_the_codec_cannot_take(head_dim):
    with pytest.raises(RecipeError, match=rf"head_dim={head_dim} is not supported: .* multiple of 16, 16 to 256"):
        PageLayout(KVRecipe(), head_dim)


def test_a_stride_adds_zeros_behind_a_page_and_nothing_else():
    kv = parse_recipe("kv4").kv
    page, wide = PageLayout(kv, 64), PageLayout(kv, 64, 4672)
    assert (page.page_bytes, wide.page_bytes, PageLayout(kv, 64, 16).page_bytes) == (4640, 4672, 4640)
    data = torch.randint(0, 256, (3, page.page_bytes), dtype=torch.uint8)
    fields = {name: page.read(data, name) for name in page.fields}
    written = wide.write(fields)
    assert torch.equal(written[:, :4640], page.write(fields)) and not written[:, 4640:].any()


def test_raw_pages_are_the_numbers():
    layout = PageLayout(parse_recipe("raw:page=16,rewind=16").kv, 16)
    k, v = torch.randn(2, 16, 16), torch.randn(2, 16, 16)
    data = layout.write({"key_codes": k, "value_codes": v})
    assert torch.equal(data, torch.cat([k.flatten(1), v.flatten(1)], 1).view(torch.uint8))
    assert torch.equal(layout.read(data, "key_codes"), k) and torch.equal(layout.read(data, "value_codes"), v)
