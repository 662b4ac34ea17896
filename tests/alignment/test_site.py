"""Sites in a model."""

import pytest
import torch

from hooklens.alignment import AlignmentError, Site
from hooklens.alignment.site import find_place
from hooklens.errors import HookNameError
from tests.annotations import unchecked
from tests.model.networks import make_model

MODEL = make_model("grouped")


@pytest.mark.parametrize(
    ("site", "positions", "head", "layer"),
    [
        ("blocks.1.hook_resid_pre", (0, 1, 2, 3, 4), None, 1),
        (Site("blocks.1.hook_mlp_out", -1), (4,), None, 1),
        (Site("blocks.0.attn.hook_z", [0, -2], -1), (0, 3), 3, 0),
        (Site("blocks.0.attn.hook_k", slice(2), 1), (0, 1), 1, 0),
        (Site("ln_final.hook_normalized", range(2)), (0, 1), None, None),
    ],
)
def test_positions_and_heads_are_counted_from_0(site, positions, head, layer):
    place = find_place(MODEL, site, 5)
    assert (place.positions, place.head, place.layer) == (positions, head, layer)


def test_vectors_are_those_at_the_positions_of_the_head():
    tensor = torch.randn(3, 5, 4, 6)
    place = find_place(MODEL, Site("blocks.0.attn.hook_z", [0, -2], 1), 5)
    assert torch.equal(place.read(tensor), tensor[:, [0, 3], 1])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: find_place(MODEL, "blocks.1.resid_pre", 5),
            HookNameError,
            "no hook point 'blocks.1.resid_pre'",
        ),
        (lambda: find_place(MODEL, Site("blocks.0.attn.hook_z"), 5), AlignmentError, "choose a head, Site"),
        (lambda: find_place(MODEL, Site("blocks.0.attn.hook_z", None, 4), 5), AlignmentError, "head: 4 out of range"),
        (lambda: find_place(MODEL, Site("blocks.0.attn.hook_k", None, 2), 5), AlignmentError, "there are 2 heads"),
        (lambda: find_place(MODEL, Site("blocks.0.hook_resid_pre", None, 0), 5), AlignmentError, "without heads"),
        (
            lambda: find_place(MODEL, Site("blocks.0.hook_resid_pre", 5), 5),
            AlignmentError,
            "pos: 5 out of range",
        ),
        (
            lambda: find_place(MODEL, Site("blocks.0.hook_resid_pre", slice(0)), 5),
            AlignmentError,
            "no position of prompts",
        ),
        (
            lambda: find_place(MODEL, Site("blocks.0.attn.hook_pattern"), 5),
            AlignmentError,
            r"\[batch pos d\] or",
        ),
        (lambda: find_place(MODEL, 3, 5), AlignmentError, "site is 3; expected alignment.Site"),
        (lambda: Site(3), AlignmentError, "name is 3; expected the full name"),
        (lambda: Site("x", "y"), AlignmentError, r"Site\('x'\): pos='y'"),
        (
            lambda: Site("x", 0, [1, 2]),
            AlignmentError,
            r"head is \[1, 2\]; expected the number",
        ),
    ],
)
def test_refusals(make, error, text):
    with unchecked(), pytest.raises(error, match=text):
        make()


def test_the_text_names_the_place():
    assert str(Site("blocks.0.attn.hook_z", -1, 2)) == "blocks.0.attn.hook_z, pos -1, head 2"
