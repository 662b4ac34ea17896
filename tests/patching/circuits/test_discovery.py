from dataclasses import replace

import torch

from hooklens.patching import Circuit, Decision, Discovery, DiscoveryInterruptedError, DiscoveryStats

STATS = DiscoveryStats(
    edges=3, decided=2, unreachable=1, circuits_run=1, forwards=3, tokens=9.0, naive_forwards=4, naive_tokens=12
)
FOUND = Discovery(
    circuit=Circuit([("embed", "logits")]),
    decisions=(
        Decision(writer="m0", reader="logits", verdict="removed", damage=0.25, increase=0.25),
        Decision(writer="embed", reader="m0", verdict="unreachable"),
    ),
    damage=0.25,
    threshold=0.5,
    metric="KL",
    stats=STATS,
    held_out_damage=0.5,
    held_out_pairs=torch.tensor([False, True]),
)


def test_the_trace_is_a_table():
    table = FOUND.trace
    assert list(table.columns) == ["writer", "reader", "verdict", "damage", "increase"]
    assert table["writer"].tolist() == ["m0", "embed"]
    assert table["verdict"].tolist() == ["removed", "unreachable"]
    assert table["damage"].isna().tolist() == [False, True]
    assert table["damage"].dtype == table["increase"].dtype == "float64"


def test_an_empty_trace_has_the_same_columns():
    empty = replace(FOUND, circuit=Circuit(), decisions=()).trace
    assert list(empty.columns) == list(FOUND.trace.columns)


def test_the_error_carries_the_result():
    error = DiscoveryInterruptedError("stopped", FOUND)
    assert error.result is FOUND
    assert str(error) == "stopped"


def test_both_damages_are_shown():
    assert "0.250 on the pairs of the search, 0.500 on 1 held-out pair" in repr(FOUND)
    stopped = replace(FOUND, held_out_damage=None, held_out_pairs=torch.tensor([True, False, True]))
    assert "0.250 on the pairs of the search, 2 held-out pairs not measured" in repr(stopped)
    alone = replace(FOUND, held_out_damage=None, held_out_pairs=torch.zeros(2, dtype=torch.bool))
    assert "0.250 on the pairs of the search, none were held out" in repr(alone)
