"""Tests of hooklens.evaluation.fingerprint: equal for the same model, different for any other."""

import torch

from hooklens.evaluation.fingerprint import model_fingerprint, sample_entries, token_fingerprint
from tests.model.networks import CONFIGS, make_model


def test_models_are_told_apart():
    model = make_model("grouped")
    others = [
        make_model("grouped", seed=1),
        make_model("grouped", dtype=torch.float32),
        make_model(CONFIGS["grouped"].replace(act_fn="gelu")),
        make_model("grouped").process_weights(fold_ln=True),
    ]
    assert model_fingerprint(model) == model_fingerprint(make_model("grouped"))
    assert len({model_fingerprint(other) for other in [model, *others]}) == 5


def test_samples_are_spread_over_a_tensor_of_any_layout():
    tensor = torch.arange(1000.0).view(10, 100).T
    sampled = sample_entries(tensor)
    assert len(sampled) == len(set(sampled)) == 64
    assert {float(tensor[0, 0]), float(tensor[-1, -1])} <= set(sampled)
    assert sample_entries(torch.tensor([5.0])) == [5.0]


def test_tokens_are_told_apart():
    assert token_fingerprint([1, 23]) != token_fingerprint([12, 3])
    assert token_fingerprint([1, 23]) == token_fingerprint((1, 23))
