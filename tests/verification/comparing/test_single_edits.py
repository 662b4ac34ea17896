"""Edits of single entries are held against a computation with the edit in its place."""

import pytest
import torch

from hooklens import HookedCausalLM, HookPoint, NormConfig
from hooklens.verification.comparing.single_edits import CONSISTENT, SINGLE, SingleEdits
from hooklens.verification.explicit import ExplicitRun
from hooklens.verification.probe import make_probe
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model
from tests.verification.mutants import MUTANTS
from tests.verification.mutation import put_in
from tests.verification.networks import build


def check(model: HookedCausalLM, names: list[str], *, explicit: bool) -> dict[str, bool]:
    edits = SingleEdits(make_probe(model), explicit=explicit)
    with unchecked(), torch.no_grad():
        results = [result for name in names for result in edits.check(name)]
    assert {result.check for result in results} == ({SINGLE} if explicit else {SINGLE, CONSISTENT})
    return {result.subject: result.passed for result in results}


def test_points_in_attention_are_edited_on_a_frozen_prefix_too() -> None:
    passed = check(build("qk-rms-norm").double(), ["hook_embed", "blocks.0.attn.hook_k"], explicit=True)

    assert passed == dict.fromkeys(
        ["hook_embed", "blocks.0.attn.hook_k", "blocks.0.attn.hook_k on a frozen prefix"], True
    )


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    ("fault", "point"),
    [
        ("an edit at hook_z acts on head 0 only", "blocks.0.attn.hook_z"),
        ("an edit at hook_v is lost for the last head", "blocks.0.attn.hook_v"),
        ("an edit at hook_resid_mid misses the skip connection", "blocks.0.hook_resid_mid"),
    ],
)
def test_a_large_model_is_held_against_what_it_shows(fault: str, point: str, explicit: bool) -> None:
    """Computing all of it for every edit would take too long; the layer of the edit is recomputed then."""
    [mutant] = [mutant for mutant in MUTANTS if mutant.fault == fault]
    assert all(check(build().double(), [point], explicit=explicit).values())
    with put_in(mutant):
        assert not all(check(build().double(), [point], explicit=explicit).values())


def test_pairs_of_edits_are_those_of_the_last_layer() -> None:
    edits = SingleEdits(make_probe(build("qk-rms-norm").double()), explicit=True)
    with unchecked(), torch.no_grad():
        results = list(edits.check_pairs())

    assert "blocks.1.attn.hook_k_per_head and blocks.1.attn.hook_rot_k" in {result.subject for result in results}
    assert all(result.passed for result in results)


def test_rounding_is_measured_in_the_edited_run(monkeypatch) -> None:
    """What an edit leaves to a norm may be next to nothing, and rounding then much of it; sound networks failed.

    Here the MLP's bias takes a position's stream away, but for 1 in 10,000, once the edit is in it and not before.
    """
    point, cfg = "blocks.0.hook_attn_out", make_config(n_layers=1, norm=NormConfig(kind="rms", eps=1e-30, bias=False))
    model = make_model(cfg)
    streams, edited = [], ExplicitRun.edited

    def edited_and_noted(run, edits):
        values = edited(run, edits)
        if list(edits) == [point]:
            streams.append(values["blocks.0.hook_resid_mid"])
        return values

    monkeypatch.setattr(ExplicitRun, "edited", edited_and_noted)
    with torch.no_grad():
        model.blocks[0].mlp.W_out.zero_()
    assert check(model, [point], explicit=True) == {point: True}
    with torch.no_grad():
        # The first row is that of the edit of the first position.
        model.blocks[0].mlp.b_out.copy_(-streams[0][0, 0] * (1 - 1e-4))
    assert check(model, [point], explicit=True) == {point: True}
    # What is more than rounding there is a fault.
    monkeypatch.setattr(HookPoint, "__call__", _raise_attention_by(1e-9))
    assert check(model, [point], explicit=True) == {point: False}


def _raise_attention_by(share: float):
    plain = HookPoint.__call__

    def call(point, tensor, call=None):
        found = plain(point, tensor, call)
        return found * (1 + share) if point.name == "blocks.0.hook_attn_out" else found

    return call
