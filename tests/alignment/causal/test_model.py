"""Causal models run as the functions they are made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.alignment import AlignmentError, CausalModel
from tests.annotations import unchecked


def make_adder() -> CausalModel:
    """Digits `[a, b, c]`: the sum of the first two, a carry, and the answer."""
    return CausalModel(
        # Not in the order in which they follow from each other.
        {"carry": lambda total: total // 10, "total": lambda tokens: tokens[:, 0] + tokens[:, 1]},
        lambda total, carry, tokens: total - 10 * carry + tokens[:, 2],
    )


PROMPTS = torch.tensor([[3, 4, 1], [7, 8, 2], [9, 9, 0]])


def test_values_follow_from_tokens_and_each_other():
    values = make_adder().run(PROMPTS)
    assert {name: one.tolist() for name, one in values.items()} == {
        "total": [7, 15, 18],
        "carry": [0, 1, 1],
        "output": [8, 7, 8],
    }


def test_what_is_set_reaches_what_follows_and_nothing_else():
    values = make_adder().run(PROMPTS, {"total": torch.tensor([12, 1, 18])})
    assert values["total"].tolist() == [12, 1, 18]
    assert values["carry"].tolist() == [1, 0, 1]
    assert values["output"].tolist() == [3, 3, 8]
    values = make_adder().run(PROMPTS, {"carry": torch.tensor([1, 0, 1])})
    assert values["total"].tolist() == [7, 15, 18]
    assert values["output"].tolist() == [-2, 17, 8]


@given(rows=st.lists(st.lists(st.integers(0, 9), min_size=9, max_size=9), min_size=1, max_size=5))
def test_an_interchange_takes_each_variable_from_its_own_source(rows):
    base, first, second = torch.tensor(rows).split(3, dim=1)
    expected = [
        (a[0] + a[1]) - 10 * ((b[0] + b[1]) // 10) + c[2]
        for c, a, b in zip(base.tolist(), first.tolist(), second.tolist(), strict=True)
    ]
    assert make_adder().interchange(base, {"total": first, "carry": second}).tolist() == expected


def test_the_printed_form_names_what_depends_on_what():
    assert repr(make_adder()) == "CausalModel(total(tokens); carry(total); output(total, carry, tokens))"


@pytest.mark.parametrize(
    ("variables", "output", "text"),
    [
        ({"a": 3}, lambda a: a, r"'a' is 3; expected functions of tokens and variables"),
        ({"a": lambda tokens: tokens}, "a", r"'output' is 'a'"),
        ({"output": lambda tokens: tokens}, lambda tokens: tokens, r"no variable can be called \['output'\]"),
        ({"tokens": lambda: None}, lambda tokens: tokens, r"no variable can be called \['tokens'\]"),
        (
            {"carry": lambda tokens: tokens},
            lambda cary: cary,
            r"'output' asks for 'cary'. Did you mean 'carry'\? There are 'tokens' and the variables \['carry'\]",
        ),
        ({"a": lambda b: b, "b": lambda a: a}, lambda a: a, r"variables \['a', 'b'\] depend on each other in a circle"),
    ],
)
def test_what_is_no_causal_model_is_refused(variables, output, text):
    with unchecked(), pytest.raises(AlignmentError, match=text):
        CausalModel(variables, output)


def test_values_that_do_not_fit_are_refused():
    model = make_adder()
    with pytest.raises(AlignmentError, match=r"no variable 'cary'. Did you mean 'carry'\? It has \['carry', 'total'\]"):
        model.run(PROMPTS, {"cary": torch.zeros(3)})
    with pytest.raises(
        AlignmentError, match=r"value of 'carry' is a tensor \[3\] of torch.float32; expected a tensor \[3\]"
    ):
        model.run(PROMPTS, {"carry": torch.zeros(3)})
    with pytest.raises(AlignmentError, match=r"value of 'carry' is a tensor \[2\]"):
        model.run(PROMPTS, {"carry": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(AlignmentError, match=r"'a' gave a tensor \[1\] of torch.int64; expected a tensor \[3\]"):
        CausalModel({"a": lambda tokens: tokens[0, :1]}, lambda a: a).run(PROMPTS)
    with pytest.raises(
        AlignmentError, match=r"the output is a tensor \[3\] of torch.float32; expected token ids \[3\]"
    ):
        CausalModel({}, lambda tokens: tokens[:, 0].float()).run(PROMPTS)
