import math
from dataclasses import replace

import pytest
import torch

from hooklens import edits, patching
from hooklens.errors import InputError
from hooklens.patching import Circuit
from hooklens.patching.graph.nodes import list_edges, list_readers, list_writers
from hooklens.patching.known import check
from hooklens.viz.charts import CROSS
from tests.annotations import unchecked
from tests.patching.known.tasks import make_claim
from tests.patching.masked_reference import MaskedReference


@pytest.mark.parametrize("norm", [None, "rms"])
def test_a_circuit_set_by_hand_holds(norm):
    known = patching.known.induction(norm=norm)
    found = check(known, n=16)
    assert found.accuracy == found.strictness == found.least_inside == 1.0
    assert found.most_outside == 0.0
    assert dict(found.interchange) == dict.fromkeys(("token", "previous", "query", "answer"), 1.0)


def test_shares_against_one_forward_at_a_time():
    """A claim that does not hold, whose numbers lie between 0 and 1."""
    known = make_claim(seed=3)
    found = check(known, n=200, seed=5)
    clean, corrupted = known.prompts(200, seed=5)
    reference = MaskedReference(known.model, clean, corrupted)
    with torch.no_grad():
        plain, other = (known.model(tokens)[:, -1].argmax(-1) for tokens in (clean, corrupted))
        _, cache = known.model.run_with_cache(corrupted, names_filter="*hook_result")
    right = torch.cat([plain == clean[:, 0], other == corrupted[:, 0]])
    assert found.accuracy == pytest.approx(float(right.double().mean()))
    full = Circuit.full(known.model.cfg)
    for edge in list_edges(known.model.cfg):
        changed = reference.logits(full.without_edges([edge]))[:, -1].argmax(-1) != plain
        assert found.changed[edge] == pytest.approx(float(changed.double().mean()))
    stays = reference.logits(known.circuit)[:, -1].argmax(-1) == plain
    assert found.strictness == pytest.approx(float(stays.double().mean()))
    edit = edits.Replace("blocks.0.attn.hook_result", cache["blocks.0.attn.hook_result"][:, -1, 1], pos=-1, head=1)
    with torch.no_grad():
        exchanged = known.model.run_with_hooks(clean, edits=[edit])[:, -1].argmax(-1)
    follows = (exchanged == corrupted[:, 0]).double().mean()
    assert found.interchange["copied"] == pytest.approx(float(follows))
    for share in (found.accuracy, found.strictness, found.interchange["copied"], found.most_outside):
        assert 0 < share < 1


def test_a_circuit_that_lacks_an_edge_is_found_out():
    known = patching.known.induction()
    missing = known.circuit.edges[-1]
    found = check(replace(known, circuit=known.circuit.without_edges([missing])), n=8)
    assert found.strictness == 0.0
    assert found.most_outside == found.changed[missing] == 1.0
    more = check(replace(known, circuit=known.circuit.with_edges([("embed", "logits")])), n=8)
    assert more.least_inside == 0.0
    assert more.strictness == 1.0


def test_table_and_text():
    found = check(make_claim(), n=16)
    table = found.to_dataframe()
    assert list(table.columns) == ["writer", "reader", "in_circuit", "changed"]
    assert len(table) == len(list_edges(make_claim().model.cfg))
    assert table["in_circuit"].sum() == 2
    assert table["changed"].between(0, 1).all()
    text = repr(found)
    assert text.startswith(f"KnownCheck of 'copy' on 16 pairs\n  accuracy                      {found.accuracy:.3f}\n")
    assert f"copied {found.interchange['copied']:.3f}" in text
    assert f"at least {found.least_inside:.3f} in the circuit, at most {found.most_outside:.3f} outside" in text


def test_figure():
    found = check(make_claim(), n=16)
    figure = found.plot()
    writers, readers = list_writers(make_claim().model.cfg), list_readers(make_claim().model.cfg)
    drawn = torch.tensor(figure.data[0].z, dtype=torch.float64)
    expected = [[found.changed.get((str(one), str(other)), math.nan) for other in readers] for one in writers]
    assert torch.allclose(drawn, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert sum(CROSS in str(text) for row in figure.data[0].text for text in row) == 2
    assert "copy: answers changed by one edge" in figure.layout.title.text
    assert found.plot(backend="matplotlib", title="mine").axes


def test_without_edges_there_is_nothing_to_change():
    found = check(replace(make_claim(), circuit=Circuit()), n=4)
    assert found.least_inside == 1.0


@unchecked()
def test_refusals():
    with pytest.raises(InputError, match="known is 3, expected a KnownCircuit"):
        check(3)
    with pytest.raises(InputError, match="n is 0, expected a whole number"):
        check(make_claim(), n=0)
