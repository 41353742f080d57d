"""Recipe: every name parses back to what it names, and every wrong part is named with what is allowed."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant.recipe import (
    EXAMPLES,
    KV_BITS,
    LINEAR_EXAMPLES,
    ActivationRecipe,
    KVRecipe,
    Recipe,
    RecipeError,
    WeightRecipe,
    parse_recipe,
)


def fails(text, *parts):
    with pytest.raises(RecipeError) as e:
        parse_recipe(text)
    for part in parts:
        assert part in str(e.value), f"{part!r} not in {e.value}"


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_parse_to_themselves(text):
    recipe = parse_recipe(text)
    assert recipe.name == text and parse_recipe(recipe) is recipe


def test_bits_and_codec():
    got = parse_recipe("k4v3").kv
    assert (got.key_bits, got.value_bits, got.codec) == (4, 3, "live")
    got = parse_recipe("plaink8v2").kv
    assert (got.key_bits, got.value_bits, got.codec) == (8, 2, "plain")
    assert parse_recipe(" KV4 ").kv == KVRecipe()
    assert parse_recipe("plainkv4") == parse_recipe("plain4")
    assert Recipe().name == "none"


def test_defaults_are_spelt_out_nowhere():
    assert parse_recipe("kv4").kv == KVRecipe()
    for f in dataclasses.fields(KVRecipe):
        if f.name not in ("key_bits", "value_bits", "codec"):
            assert parse_recipe(f"kv4:{f.name}={f.default}").name == "kv4"


@st.composite
def recipes(draw):
    page = draw(st.sampled_from([16, 32, 64, 128, 512]))
    return KVRecipe(
        key_bits=draw(st.sampled_from(KV_BITS)),
        value_bits=draw(st.sampled_from(KV_BITS)),
        codec=draw(st.sampled_from(["live", "plain"])),
        page=page,
        hot=draw(st.integers(-1, 64)),
        ring=draw(st.integers(0, 4096)),
        sinks=draw(st.integers(0, 64)),
        rewind=draw(st.integers(0, page)),
        decay=draw(st.floats(0, 0.999)),
        blend=draw(st.floats(0.001, 1)),
    )


@given(recipes())
def test_name_and_parse_are_inverse(kv):
    if kv.rewind > KVRecipe(page=kv.page, rewind=0).page:
        return
    assert parse_recipe(Recipe(kv).name).kv == kv


@given(recipes(), st.sampled_from([16, 64, 80, 128, 256]))
def test_derived_sizes(kv, head_dim):
    assert kv.ring_slots % 16 == 0
    assert kv.ring_slots >= max(kv.ring, kv.page) + kv.rewind, "the ring must hold the open page and what crop returns"
    assert kv.ring_slots - max(kv.ring, kv.page) - kv.rewind < 16
    assert kv.chunk >= 1
    hot = kv.hot_channels(head_dim)
    assert 0 <= hot <= head_dim // 2 and (kv.codec == "live" or hot == 0)
    if kv.codec == "live" and kv.hot >= 0:
        assert hot == min(kv.hot, head_dim // 2)


@pytest.mark.parametrize(
    ("text", "meant"), [("kv5x", "kv4"), ("kv5", "kv4"), ("plan4", "plain4"), ("kv", "kv4"), ("k4v", "k4v3")]
)
def test_unknown_recipe_says_what_may_be_meant(text, meant):
    assert meant in EXAMPLES
    with pytest.raises(RecipeError) as e:
        parse_recipe(text)
    hint = re.search(r"Did you mean '(\w+)'\?", str(e.value))
    assert repr(text) in str(e.value) and hint and "Known: kvB" in str(e.value)
    assert hint[1][:2] == meant[:2]


def test_nonsense_gets_no_hint():
    with pytest.raises(RecipeError) as e:
        parse_recipe("zzz")
    assert "Did you mean" not in str(e.value) and all(x in str(e.value) for x in EXAMPLES)


@pytest.mark.parametrize("text", ["", "4", "kv4kv4", "kv1", "kv16", "k4v16", "plain5", "kv-4", "none"])
def test_unknown_recipe(text):
    fails(text, "unknown recipe", repr(text), str(KV_BITS))


ALLOWED = {
    "page": (["0", "8", "40", "528", "-16"], "a multiple of 16 from 16 to 512"),
    "hot": (["-2", "65"], "from 0 to 64, or -1 for the default"),
    "ring": (["-1", "65537"], "from 0 to 65536 tokens"),
    "sinks": (["-1", "65"], "from 0 to 64 tokens"),
    "rewind": (["-1", "513"], "from 0 to page="),
    "decay": (["-0.1", "1", "1.5", "nan"], "in [0, 1)"),
    "blend": (["0", "1.1", "-1", "nan"], "in (0, 1]"),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (values, _) in ALLOWED.items() for v in values])
def test_option_out_of_range_names_option_value_and_range(name, value):
    fails(f"kv4:{name}={value}", f"{name}=", value.lstrip("-"), ALLOWED[name][1])


def test_every_option_has_its_error_tested():
    options = {f.name for f in dataclasses.fields(KVRecipe)} - {"key_bits", "value_bits", "codec"}
    assert options == set(ALLOWED)


def test_wrong_fields():
    for field, value in (("key_bits", 5), ("value_bits", 1), ("codec", "magic")):
        with pytest.raises(RecipeError, match=field):
            KVRecipe(**{field: value})


def test_unknown_option():
    fails("kv4:rings=3", "unknown option 'rings'", "Did you mean 'ring'?", "kv4:rings=3", "sinks")
    fails("kv4:key_bits=3", "unknown option 'key_bits'")
    fails("kv4:codec=plain", "unknown option 'codec'")


@pytest.mark.parametrize(
    ("value", "kind"), [("ring=x", "a whole number"), ("ring=1.5", "a whole number"), ("decay=x", "a number")]
)
def test_option_of_the_wrong_kind(value, kind):
    fails(f"kv4:{value}", value.split("=")[0], repr(value.split("=")[1]), kind)


@pytest.mark.parametrize("text", ["kv4:ring", "kv4:ring=", "kv4:,", "kv4:ring=1,", "kv4:ring=1,ring"])
def test_option_without_value(text):
    fails(text, text)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVRecipe().ring = 3


@pytest.mark.parametrize("text", LINEAR_EXAMPLES)
def test_linear_examples_parse_to_themselves(text):
    assert parse_recipe(text).name == text and parse_recipe(text).linear is not None


def test_products_and_their_parts():
    got = parse_recipe("w8a4k4v3:ring=64,group=64,ahot=8,freeze=100,head=8,embed=8,clip=0")
    assert got.weights == WeightRecipe(8, group=64, head=8, embed=8, clip=0) and got.weights.stages == 2
    assert got.activations == ActivationRecipe(4, ahot=8, freeze=100)
    assert got.kv == KVRecipe(4, 3, ring=64)
    assert parse_recipe(got.name) == got
    assert got.linear == Recipe(None, got.weights, got.activations) and parse_recipe("kv4").linear is None
    assert parse_recipe("a8plain4").kv.codec == "plain"


def test_linear_sizes():
    w4, w8 = WeightRecipe(4), WeightRecipe(8)
    assert [w4.group_of(k) for k in (4096, 576, 896, 48)] == [128, 64, 128, 16]
    assert w4.bits_per_weight(4096) == 4.1875 and w8.bits_per_weight(4096) == 8.1875
    assert WeightRecipe(4, group=0).group_of(576) == 576
    assert [w4.clips(r) for r in (False, True)] == [False, True] and not w8.clips(True)
    assert WeightRecipe(4, clip=1).clips(False) and not WeightRecipe(4, clip=0).clips(True)
    a4 = ActivationRecipe(4)
    assert a4.hot_channels(576) == 36 and a4.bits_per_activation(512) == 4 + 0.5 + 0.5 + 64 / 512
    assert ActivationRecipe(8).hot_channels(576) == 0 and ActivationRecipe(4, ahot=0).hot_channels(576) == 0
    with pytest.raises(RecipeError, match=r"a weight \(N, 36\) cannot be packed"):
        w4.group_of(36)


@pytest.mark.parametrize("text", ["w5", "a3", "w4a16", "a8w4", "kv4w4", "w", "a", "w4a8kv5", "w4w4"])
def test_unknown_linear_recipe(text):
    fails(text, "unknown recipe", repr(text), str((4, 8)))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("w4:group=24", ["group=24", "power of two"]),
        ("w4:group=8", ["group=8", "16 to 512"]),
        ("w4:clip=2", ["clip=2", "0, 1 or -1"]),
        ("w4:head=4", ["head=4", "0 or 8"]),
        ("a4:ahot=1", ["ahot=1", "from 2 to 1024"]),
        ("a4:agroup=8", ["agroup=8", "one of"]),
        ("a4:freeze=-1", ["freeze=-1", "from 0"]),
        ("w4a8:ring=3", ["unknown option 'ring'", "group"]),
        ("w4a8:group=x", ["group='x'", "a whole number"]),
    ],
)
def test_linear_option_out_of_range(text, parts):
    fails(text, *parts)


def test_wrong_linear_fields():
    for make in (WeightRecipe, ActivationRecipe):
        with pytest.raises(RecipeError, match="bits=5"):
            make(5)


def test_raw_pages():
    kv = parse_recipe("raw:page=32").kv
    assert (kv.codec, kv.key_bits, kv.value_bits, kv.hot_channels(64)) == ("raw", 32, 32, 0)
    assert parse_recipe(kv.name).kv == kv and kv.name == "raw:page=32"
    assert parse_recipe("w4raw").kv.codec == "raw"
    with pytest.raises(RecipeError, match="key_bits=4"):
        KVRecipe(codec="raw")
