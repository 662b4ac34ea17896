"""Tests of hooklens.hooks.names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import HookNameError
from hooklens.hooks.names import is_on_request, select_names
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, activations_of, make_model

NAMES = activations_of(make_model(CONFIGS["rotary"].replace(n_layers=12)))


def select(names_filter):
    return select_names(names_filter, NAMES, n_layers=12)


def test_none_is_all_but_the_on_request_points():
    assert set(NAMES) - set(select(None)) == {name for name in NAMES if is_on_request(name)}
    assert len(set(NAMES) - set(select(None))) == 12 * 5
    assert select("*") == NAMES


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("blocks.11.attn.hook_z", ["blocks.11.attn.hook_z"]),
        ("resid_pre", [f"blocks.{i}.hook_resid_pre" for i in range(12)]),
        ("attn", [f"blocks.{i}.attn.hook_pattern" for i in range(12)]),
        ("k1", ["blocks.1.attn.hook_k"]),
        ("k-1", ["blocks.11.attn.hook_k"]),
        (("pattern", -2), ["blocks.10.attn.hook_pattern"]),
        (("scale", 0, "ln1"), ["blocks.0.ln1.hook_scale"]),
        ("blocks.1?.hook_resid_post", ["blocks.10.hook_resid_post", "blocks.11.hook_resid_post"]),
        ("blocks.[01].attn.hook_q", ["blocks.0.attn.hook_q", "blocks.1.attn.hook_q"]),
        (["resid_post", "hook_embed"], ["hook_embed"] + [f"blocks.{i}.hook_resid_post" for i in range(12)]),
        ([("pattern", 1), "q0"], ["blocks.0.attn.hook_q", "blocks.1.attn.hook_pattern"]),
        (("resid_pre0", "hook_embed"), ["hook_embed", "blocks.0.hook_resid_pre"]),
        (lambda name: name.startswith("ln_final"), ["ln_final.hook_scale", "ln_final.hook_normalized"]),
    ],
)
def test_filters(names_filter, expected):
    assert select(names_filter) == expected


def test_a_layer_number_is_not_a_prefix():
    """`"blocks.1.*"` must not take in blocks 10 and 11."""
    assert {name.split(".")[1] for name in select("blocks.1.*")} == {"1"}
    assert select("pattern1") == ["blocks.1.attn.hook_pattern"]


def test_a_word_that_is_a_point_on_request_is_selected_by_naming_it():
    assert select("result") == [f"blocks.{i}.attn.hook_result" for i in range(12)]
    assert "blocks.0.attn.hook_result" in select("blocks.0.*")


@given(chosen=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_a_list_selects_what_it_names_in_the_order_of_the_model(chosen):
    assert select(chosen) == sorted(chosen, key=NAMES.index)
    assert select(chosen * 2) == select(chosen)


@pytest.mark.parametrize(
    ("names_filter", "text"),
    [
        (
            "blocks.0.attn.hook_patern",
            r"no hook point is called 'blocks.0.attn.hook_patern'\. Did you mean 'blocks.0.a",
        ),
        ("patern", r"no hook point is called 'patern'\. Did you mean 'pattern'"),
        ("blocks.*.attn.hook_zz", r"the glob 'blocks.\*.attn.hook_zz' matches no hook point"),
        (lambda name: "nothing" in name, r"the predicate '<lambda>' is true for none of the \d+ hook points"),
        (["hook_embed", "hook_embd"], r"no hook point is called 'hook_embd'\. Did you mean 'hook_embed'"),
        ("resid_mid", r"no hook point is called 'resid_mid'\. Did you mean 'resid_pre'"),
        (("resid_mid", 0), r"this model has no hook point \('resid_mid', 0\)"),
        ("k12", r"no hook point is called 'k12'"),
        (("pattern", 12), r"layer 12 is out of range; the model has 12 layers"),
        ([], r"the list of hook names is empty; use None for every point"),
        (["hook_embed", 3], r"a list of hook names holds \[3\]; expected strings"),
    ],
)
def test_a_filter_that_selects_nothing_is_refused(names_filter, text):
    """A typo inside a list gave a partial cache, and a filter that matched nothing an empty one, without a word."""
    with unchecked(), pytest.raises(HookNameError, match=text) as caught:
        select(names_filter)
    assert any(word in str(caught.value) for word in ("hook_table()", "layers", "expected strings", "use None"))


def test_all_typos_are_listed_at_once():
    with pytest.raises(HookNameError, match=r"'resid_prr'.*; .*'\*.nope'.*; .*'hook_q9q'"):
        select(["resid_prr", "hook_embed", "*.nope", "hook_q9q"])
