"""Targets against the sentences that describe them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.analysis.targets import duplicate_token_target, induction_target, previous_token_target


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9))
def test_targets_are_what_their_sentences_say(columns):
    """With pad = EOS a token after padding was what had followed an earlier EOS: padding counted as a token."""
    ids, mask = (list(part) for part in zip(*columns, strict=True))
    real = [place for place, is_token in enumerate(mask) if is_token]
    pairs = [(query, key) for query in range(len(ids)) for key in range(len(ids))]

    def before(place):
        return max((one for one in real if one < place), default=None)

    for target, holds in (
        (previous_token_target, lambda query, key: key == before(query)),
        (duplicate_token_target, lambda query, key: key < query and ids[key] == ids[query]),
        (
            induction_target,
            lambda query, key: key < query and before(key) is not None and ids[before(key)] == ids[query],
        ),
    ):
        found = target(torch.tensor([ids]), torch.tensor([mask]))[0]
        expected = [query in real and key in real and holds(query, key) for query, key in pairs]
        assert [bool(found[pair]) for pair in pairs] == expected
        if all(mask):
            assert torch.equal(target(torch.tensor([ids]))[0], found)
