"""Tests of hooklens.axes: the glossary and the grammar of hook names."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.axes import ALIASES, AXES, HOOK_SITES, find_site, get_act_name, layer_of, name_repeats, resolve_layer
from hooklens.errors import HookNameError
from tests.annotations import unchecked


@pytest.mark.parametrize("site", HOOK_SITES.values(), ids=lambda site: site.template)
def test_sites_speak_the_glossary(site):
    assert set(site.axes) <= set(AXES)
    assert len(set(site.axes)) == len(site.axes)
    assert site.axes[0] == "batch"
    assert site.description
    assert site.per_layer == site.template.startswith("blocks.{i}.")


def test_only_points_with_a_copy_per_head_and_ids_are_on_request():
    on_request = {
        name
        for site in HOOK_SITES.values()
        # A splice's, known once `hooklens.sae` has been imported, are there when it is.
        if site.on_request
        and not site.discrete
        and not (name := site.template.rpartition(".")[2]).startswith("hook_sae_")
    }
    streams = {"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_result"}
    assert on_request == streams | {"hook_k_per_head", "hook_v_per_head"}


def test_what_repeats_a_point_for_each_query_head():
    assert name_repeats("blocks.11.attn.hook_k") == "blocks.11.attn.hook_k_per_head"
    assert name_repeats("blocks.0.attn.hook_v") == "blocks.0.attn.hook_v_per_head"
    for name in ("blocks.0.attn.hook_rot_k", "blocks.0.attn.hook_k_per_head", "hook_embed", "hook_k", "x"):
        assert name_repeats(name) is None
    for site in HOOK_SITES.values():
        if site.repeats is not None:
            original = HOOK_SITES[site.repeats]
            assert site.axes == tuple("head" if axis == "kv_head" else axis for axis in original.axes)
            assert site.template == f"{original.template}_per_head"


def test_find_site_knows_the_grammar_only():
    assert find_site("blocks.11.attn.hook_k").axes == ("batch", "pos", "kv_head", "d_head")
    assert find_site("hook_embed").axes == ("batch", "pos", "d_model")
    for name in ("blocks.hook_k", "blocks.x.attn.hook_k", "encoder.hook_hidden", "blocks.1.attn.hook_q_grad", ""):
        assert find_site(name) is None


def test_layer_of():
    assert layer_of("blocks.12.ln1.hook_scale") == 12
    assert layer_of("ln_final.hook_scale") is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("resid_pre", 3), "blocks.3.hook_resid_pre"),
        (("resid_pre3",), "blocks.3.hook_resid_pre"),
        (("k3",), "blocks.3.attn.hook_k"),
        (("pattern", 3), "blocks.3.attn.hook_pattern"),
        (("attn", 3), "blocks.3.attn.hook_pattern"),
        (("attn_logits", 0), "blocks.0.attn.hook_attn_scores"),
        (("query", 0), "blocks.0.attn.hook_q"),
        (("key", 0), "blocks.0.attn.hook_k"),
        (("value", 0), "blocks.0.attn.hook_v"),
        (("mlp_post", 1), "blocks.1.mlp.hook_post"),
        (("scale", 3, "ln1"), "blocks.3.ln1.hook_scale"),
        (("scale3ln1",), "blocks.3.ln1.hook_scale"),
        (("normalized", 0, "q_norm"), "blocks.0.attn.q_norm.hook_normalized"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("embed",), "hook_embed"),
        (("pos_embed",), "hook_pos_embed"),
        (("in",), "unembed.hook_in"),
        (("blocks.7.attn.hook_z",), "blocks.7.attn.hook_z"),
        (("normalized", "2", "ln1"), "blocks.2.ln1.hook_normalized"),
        (("k", np.int64(3)), "blocks.3.attn.hook_k"),
        (("k", torch.tensor(3)), "blocks.3.attn.hook_k"),
        (("scale3", None, "ln2"), "blocks.3.ln2.hook_scale"),
    ],
)
def test_shorthands(arguments, expected):
    assert get_act_name(*arguments) == expected


@given(template=st.sampled_from(sorted(HOOK_SITES)), layer=st.integers(0, 200))
def test_every_full_name_has_a_shorthand(template, layer):
    *path, point = template.split(".")
    word, part = point.removeprefix("hook_"), path[-1] if path and path[-1] != "{i}" else None
    name = template.replace("{i}", str(layer))
    given_layer = layer if "{i}" in template else None
    assert get_act_name(word, given_layer, part) == name
    assert get_act_name(name) == name
    assert find_site(name) is HOOK_SITES[template]
    assert layer_of(name) == given_layer


def test_negative_layers_count_from_the_end():
    assert get_act_name("resid_post", -1, n_layers=4) == "blocks.3.hook_resid_post"
    assert get_act_name("k-2", n_layers=4) == "blocks.2.attn.hook_k"
    assert resolve_layer(-4, 4, what="x") == 0


def test_aliases_lead_to_words_that_exist():
    words = {template.rpartition(".")[2].removeprefix("hook_") for template in HOOK_SITES}
    assert set(ALIASES.values()) <= words
    assert not set(ALIASES) & words


@pytest.mark.parametrize(
    ("arguments", "n_layers", "text"),
    [
        (("patern", 0), None, r"no hook point is called 'patern'\. Did you mean 'pattern'.*hook_table\(\) lists"),
        (("scale", 0), None, r"'scale' needs the module it sits in, one of 'k_norm', .*'ln', 'ln1'.*got None"),
        (("scale", 0, "ln9"), None, r"needs the module it sits in, one of .*; got 'ln9'"),
        (("pattern",), None, r"'pattern' exists once per block: give the layer, as in \('pattern', 0\)"),
        (("embed", 2), None, r"'hook_embed' exists once per model: leave the layer 2 out"),
        (("pattern", 4), 4, r"layer 4 is out of range; the model has 4 layers, 0 to 3 \(or -4 to -1 from the end\)"),
        (("pattern", -5), 4, r"layer -5 is out of range"),
        (("scale", None, "ln1"), None, r"give the layer, as in \('scale', 0, 'ln1'\)"),
        (
            ("attn_out", 1, "b"),
            None,
            r"'attn_out' sits in no module.*; got 'b'\. Full names: 'blocks\.1\.hook_attn_out'$",
        ),
        (
            ("scale", "-1", "b"),
            4,
            r"'ln1', .*; got 'b'\. Full names: .*'blocks\.3\.attn\.q_norm\.hook_scale', .*'blocks\.3\.ln1\.hook_scale'",
        ),
        (("resid_pre", 1, "{i}"), None, r"'resid_pre' sits in no module"),
        (("scale3ln1", None, "ln2"), None, r"'scale3ln1' already names a module; leave the part 'ln2' out"),
        (("k3\n",), None, r"no hook point is called 'k3\\n'"),
        (("k", 10**5000), None, r"'k': the layer has more than 9 digits"),
        (("pattern", -1), None, r"a negative layer \(-1\) needs the number of layers"),
    ],
)
def test_what_is_no_name_is_refused(arguments, n_layers, text):
    with pytest.raises(HookNameError, match=text):
        get_act_name(*arguments, n_layers=n_layers)


@pytest.mark.parametrize(
    "layer",
    [True, 2.0, "two", "2.0", "", "9" * 5000, np.True_, torch.tensor(True), torch.tensor([1]), np.array([1]), b"1"],
    ids=lambda layer: repr(layer)[:20],
)
def test_layers_of_another_kind_are_refused(layer):
    """Text raised a TypeError from inside, and True was layer 1."""
    with unchecked(), pytest.raises(HookNameError, match=r"'k': layer .*; expected a whole number such as 3"):
        get_act_name("k", layer)


@pytest.mark.parametrize("arguments", [(None,), (3,), (("k", 3),), ("scale", 0, 1), ("scale", 0, ["ln1"])])
def test_names_of_another_kind_are_refused(arguments):
    with unchecked(), pytest.raises(HookNameError, match=r"names no hook point; expected text"):
        get_act_name(*arguments)


_words = st.sampled_from(
    ["k", "scale", "attn", "resid_pre", "in", "embed", "blocks.1.hook_resid_pre", "k1", "scale1ln1"]
)
_odd = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
)
_parts = st.sampled_from(["ln1", "q_norm", "unembed", "b", "{i}"])


@given(
    name=_words | _odd, layer=_odd | st.integers(-3, 3).map(str), part=_parts | _odd, n_layers=st.none() | st.just(3)
)
def test_anything_gives_a_name_or_is_refused(name, layer, part, n_layers):
    try:
        with unchecked():
            found = get_act_name(name, layer, part, n_layers=n_layers)
    except HookNameError as error:
        found = None
        text = str(error)
    if found is None:
        assert "blocks.{i}" not in text
    else:
        assert find_site(found) is not None
        assert get_act_name(found) == found
