"""Training finds a variable where a network keeps it, leaves the network alone, and can be stopped."""

import pytest
import torch

from hooklens.alignment import (
    AlignmentError,
    AlignmentInterruptedError,
    Basis,
    Counterfactuals,
    DasOptions,
    Site,
    train_das,
)
from hooklens.alignment.das import train
from hooklens.errors import HookNameError, InputError
from tests.alignment.pair_model import make_pair_model
from tests.annotations import unchecked

PAIRS = make_pair_model()
HERE = Site("blocks.1.hook_resid_pre", -1)
ONE = Counterfactuals.draw(PAIRS.causal_model, PAIRS.prompts, 200, variables=["first"])
BOTH = Counterfactuals.draw(PAIRS.causal_model, PAIRS.prompts, 200, changed=False)
SHORT = DasOptions(steps=10, check_every=5)
QUICK = DasOptions(steps=100, lr=0.05)


def fit(data=ONE, site=HERE, **options):
    return train_das(PAIRS.model, data, site, progress=False, **options)


def differences(rows):
    """The span of the differences between codes, which is all that a variable needs."""
    return Basis.of_span("x", (rows - rows.mean(0)).float(), n_dims=2)


def test_a_variable_is_found_where_it_is():
    result = fit(n_dims=2, options=DasOptions(steps=120, lr=0.05))
    assert result.accuracy == 1.0
    assert result.unpatched_accuracy == 0.0
    assert result.basis.overlap(differences(PAIRS.first)) > 0.9
    assert result.basis.overlap(differences(PAIRS.second)) < 0.1
    assert (result.basis.origin, result.basis.name) == ("das", HERE.name)


@pytest.mark.parametrize("site", [Site("blocks.1.hook_resid_pre", 0), Site("blocks.0.hook_resid_pre", -1)])
def test_it_is_not_found_where_it_is_not(site):
    assert fit(site=site, n_dims=3, options=QUICK).accuracy == 0.0


def test_several_variables_get_orthogonal_parts():
    result = fit(BOTH, n_dims={"second": 2, "first": 2}, options=DasOptions(steps=120, lr=0.05))
    assert result.accuracy == 1.0
    assert list(result.bases) == ["first", "second"]
    products = result.bases["first"].rows @ result.bases["second"].rows.T
    # 1e-5: float32.
    assert float(products.abs().max()) < 1e-5
    assert result.bases["first"].overlap(differences(PAIRS.first)) > 0.9
    assert result.bases["second"].overlap(differences(PAIRS.second)) > 0.9


def test_boundless_training_finds_how_many_dimensions_it_takes():
    result = fit(BOTH, boundless=True, options=QUICK)
    assert result.accuracy == 1.0
    sizes = {name: len(basis) for name, basis in result.bases.items()}
    assert all(2 <= size <= 4 for size in sizes.values()), sizes
    assert result.bases["first"].origin == "boundless das"


def test_a_variable_is_found_in_a_single_head():
    """At `hook_v` of the head that copies it, the variable is in three of four entries of the first position."""
    site = Site("blocks.0.attn.hook_v", [0], 0)
    assert fit(site=site, n_dims=2, options=QUICK).accuracy == 1.0
    assert fit(site=Site("blocks.0.attn.hook_v", [1], 0), n_dims=2, options=QUICK).accuracy == 0.0


def test_the_network_and_the_random_state_stay_as_they_are():
    weights = {name: one.clone() for name, one in PAIRS.model.state_dict().items()}
    asked = [one.requires_grad for one in PAIRS.model.parameters()]
    state = torch.get_rng_state()
    one, same, other = (fit(n_dims=2, options=SHORT, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.basis.rows, same.basis.rows)
    assert torch.equal(one.margins, same.margins)
    assert not torch.equal(one.basis.rows, other.basis.rows)
    assert all(torch.equal(weights[name], one) for name, one in PAIRS.model.state_dict().items())
    assert [one.requires_grad for one in PAIRS.model.parameters()] == asked
    assert all(one.grad is None for one in PAIRS.model.parameters())
    assert not PAIRS.model.training
    assert all(point.own is None for point in PAIRS.model.hook_points().values())


def test_batches_make_no_difference():
    one, split = (fit(n_dims=2, options=SHORT, batch_size=size) for size in ("auto", 7))
    # 1e-3: sums of gradients in another order, over 10 steps in float32.
    torch.testing.assert_close(one.basis.rows, split.basis.rows, rtol=1e-3, atol=1e-3)


def test_training_stops_when_the_validation_loss_no_longer_falls():
    result = fit(site=Site("blocks.1.hook_resid_pre", 0), n_dims=2, options=DasOptions(check_every=5, patience=3))
    assert result.stopped == "no lower validation loss"
    assert result.history[-1].step < 400
    losses = [one.validation_loss for one in result.history]
    assert min(losses) <= min(losses[-3:])


def test_the_best_rotation_is_kept(monkeypatch):
    """A last step that breaks everything is not what one gets."""
    look = train.DasTraining._look

    def breaking(self, loss):
        found = look(self, loss)
        if self.n_steps == 60:
            self.rotation.rows.weight = Basis.random("x", 2, 12, seed=5).rows
        return found

    monkeypatch.setattr(train.DasTraining, "_look", breaking)
    result = fit(n_dims=2, options=DasOptions(steps=61, lr=0.05, check_every=20))
    best = min(result.history, key=lambda one: one.validation_loss)
    assert best.step == 60
    assert result.history[-1].validation_accuracy < 0.5
    assert result.accuracy > 0.9


def test_an_interrupt_gives_what_there_is(monkeypatch):
    look = train.DasTraining._look

    def interrupted(self, loss):
        if self.n_steps == 60:
            raise KeyboardInterrupt
        return look(self, loss)

    monkeypatch.setattr(train.DasTraining, "_look", interrupted)
    with pytest.raises(
        AlignmentInterruptedError, match=r"train_das stopped after 60 of 400 steps \(KeyboardInterrupt"
    ) as got:
        fit(n_dims=2)
    assert [one.step for one in got.value.result.history] == [20, 40]
    assert got.value.result.stopped == "interrupted"
    assert all(one.grad is None for one in PAIRS.model.parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "n_dims is missing; give the dimensions of a variable, or boundless=True"),
        ({"n_dims": 2, "boundless": True}, "n_dims=2 and boundless=True, which trains it; give one of them"),
        ({"n_dims": 0}, "n_dims of 'first' is 0, expected a whole number >= 1"),
        ({"n_dims": {"frist": 2}}, r"n_dims are of \['frist'\], and the variables are \['first'\]"),
        ({"n_dims": 13}, r"n_dims are \{'first': 13\}, 13 in all, at blocks.1.*whose vectors have 12 entries"),
        ({"n_dims": 2, "held_out": 0}, "held_out is 0, expected a share"),
        ({"n_dims": 2, "batch_size": 0}, "batch_size is 0; expected 'auto' or"),
        ({"n_dims": 2, "seed": "x"}, "seed is 'x'"),
        ({"n_dims": 2, "boundless": 1}, "boundless is 1, expected True or False"),
        ({"n_dims": 2, "options": {}}, "options is {}, expected alignment.DasOptions"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, text):
    with unchecked(), pytest.raises(AlignmentError, match=text):
        fit(**options)


def test_sites_and_models_that_do_not_fit_are_refused():
    with pytest.raises(HookNameError, match="no hook point 'x'"):
        fit(site="x", n_dims=2)
    PAIRS.model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            fit(n_dims=2)
    finally:
        PAIRS.model.eval()


def test_options_that_are_none_are_all_named():
    with unchecked(), pytest.raises(AlignmentError) as got:
        DasOptions(steps=0, lr=-1, width_penalty=-1, validation=2, temperatures=(1, 0))
    for text in ("steps is 0", "lr is -1", "width_penalty is -1", "validation is 2", r"temperatures is (1, 0)"):
        assert text in str(got.value)
