"""Edits as values are held against the same written as loops."""

from dataclasses import replace

import pytest
import torch

from hooklens.hooks.edits import Zero
from hooklens.verification.comparing.edit_values import check_edit_values
from hooklens.verification.probe import make_probe
from tests.annotations import unchecked
from tests.verification.networks import build


@pytest.mark.parametrize("name", ["learned", "attn-softcap"])
def test_sound_networks_pass(name: str) -> None:
    with unchecked(), torch.no_grad():
        results = list(check_edit_values(make_probe(build(name))))

    assert {"Zero", "Scale", "Add", "Mean", "Replace", "Project"} == {
        result.subject.partition("(")[0] for result in results
    }
    assert {"whole", "padded", "on a cache", "padded on a cache"} == {
        result.subject.rpartition(", ")[2] for result in results
    }
    assert all(result.passed for result in results), [str(result) for result in results if not result.passed]


def test_an_edit_of_the_token_before_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Zero.apply
    monkeypatch.setattr(
        Zero,
        "apply",
        lambda edit, tensor, point, tokens: apply(
            replace(edit, pos=-2) if edit.pos == -1 else edit, tensor, point, tokens
        ),
    )
    with unchecked(), torch.no_grad():
        failed = [result.subject for result in check_edit_values(make_probe(build())) if not result.passed]

    assert failed
    assert all("Zero(" in subject and "pos=-1" in subject for subject in failed)


def test_what_a_projection_leaves_may_be_next_to_nothing() -> None:
    """A sound network failed: of a stream along the direction, rounding is most of what a projection leaves."""
    model = build()
    with unchecked(), torch.no_grad():
        direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
        last = model.blocks[-2]
        last.mlp.b_out.add_(3000 * direction / direction.norm())
        results = list(check_edit_values(make_probe(model)))
    assert all(result.passed for result in results), [str(result) for result in results if not result.passed]
