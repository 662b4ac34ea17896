"""Interchanges measured by a sweep, against plain full forwards with hooks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.alignment import Basis
from hooklens.alignment.runs import margin_of
from hooklens.alignment.tables import measuring
from hooklens.alignment.tables.measuring import measure_cells
from tests.alignment.test_runs import LENGTH, make_bases, make_data, model_of, run_whole
from tests.model.networks import CONFIGS, make_model

WORDS = ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]


@settings(max_examples=30)
@given(
    network=st.sampled_from(list(CONFIGS)),
    word=st.sampled_from(WORDS),
    layer=st.integers(0, 1),
    positions=st.sampled_from([[0], [4, 1], [2, 3, 4]]),
    read_at=st.sampled_from([-1, 2]),
    variables=st.sampled_from([("a",), ("a", "b")]),
    whole=st.booleans(),
    batch_size=st.sampled_from(["auto", 2]),
)
def test_margins_are_those_of_whole_runs(network, word, layer, positions, read_at, variables, whole, batch_size):
    model, name = model_of(network), f"blocks.{layer}.{word}"
    if name not in model.hook_points() or not model.cfg.causal:
        return
    variables = variables[:1] if whole else variables
    data = make_data(variables=variables, pos=read_at)
    # Each position has a basis of its own.
    plain = {position: make_bases(variables, model.cfg.d_model, seed=position) for position in positions}
    bases = {
        position: {variable: Basis(name, rows) for variable, (rows, _) in found.items()}
        for position, found in plain.items()
    }
    margins, unpatched = measure_cells(model, data, name, bases, whole=whole, batch_size=batch_size)
    with torch.no_grad():
        for place, position in enumerate(positions):
            expected = run_whole(model, data, name, [position], None, None if whole else plain[position])
            # 1e-10: sums of other orders in float64.
            torch.testing.assert_close(margins[place], margin_of(expected, data.labels), rtol=1e-10, atol=1e-10)
        logits = model(data.base)[:, read_at]
    torch.testing.assert_close(unpatched, margin_of(logits, data.labels), rtol=1e-10, atol=1e-10)
    assert data.base.shape[1] == LENGTH


def test_rows_that_do_not_fit_into_memory_together_come_in_groups(monkeypatch):
    model, data, name = make_model("rotary"), make_data(7), "blocks.1.hook_resid_pre"
    bases = {2: {"a": Basis(name, make_bases(["a"], 12)["a"][0])}}
    together = measure_cells(model, data, name, bases, whole=False, batch_size="auto")
    monkeypatch.setattr(measuring, "pairs_per_group", lambda *given: 3)
    split = measure_cells(model, data, name, bases, whole=False, batch_size="auto")
    for one, other in zip(together, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
