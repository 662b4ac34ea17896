"""Losses of layers against whole distributions, over batches of any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.analysis.lens import lens_losses, read_streams
from hooklens.errors import InputError
from tests.model.networks import make_model, random_tokens


@settings(max_examples=10)
@given(batch_size=st.integers(1, 6), network=st.sampled_from(["rotary", "capped", "attention only"]))
def test_they_are_means_over_tokens(batch_size, network):
    model = make_model(network)
    tokens = random_tokens(5, 4)
    table = lens_losses(model, tokens, batch_size=batch_size, progress=False)
    _, cache = model.run_with_cache(tokens)
    *readings, final = (reading.logprobs.detach() for reading in read_streams(model, cache))
    assert table.layer.tolist() == [0, 1, 2]
    for line, q in zip(table.itertuples(), [*readings, final], strict=True):
        assert line.kl == pytest.approx(float((final.exp() * (final - q)).sum(-1).mean()), abs=1e-12)
        losses = -q[:, :-1].gather(-1, tokens[:, 1:, None])
        assert line.cross_entropy == pytest.approx(float(losses.mean()), abs=1e-12)


def test_rows_of_one_token_have_nothing_to_predict():
    table = lens_losses(make_model("rotary"), random_tokens(3, 1), progress=False)
    assert table.cross_entropy.isna().all()
    assert table.kl.notna().all()


def test_bad_arguments():
    model = make_model("rotary")
    for data, text in (
        ("text", "data is the text 'text'"),
        ([], "data is"),
        ([1, 2], "data is"),
        (torch.zeros(2, 3), r"data is a tensor \[2, 3\]"),
    ):
        with pytest.raises(InputError, match=text):
            lens_losses(model, data)
    with pytest.raises(InputError, match="no tokenizer"):
        lens_losses(model, ["text"], progress=False)
    with pytest.raises(InputError, match="30"):
        lens_losses(model, torch.full((1, 3), 30), progress=False)
