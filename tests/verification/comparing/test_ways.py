"""Ways of running cut the same sequences into pieces, and put them together again."""

import pytest
import torch

from hooklens.verification.comparing.ways import ragged_mask, runs_in_pieces, ways_to_run
from hooklens.verification.probe import make_probe
from tests.verification.networks import build


@pytest.mark.parametrize("name", ["learned", "windows", "rotary-dynamic", "no-positions"])
def test_pieces_are_the_whole(name: str) -> None:
    model = build(name).double()
    for way in ways_to_run(make_probe(model)):
        assert sum(way.pieces) == way.batch.tokens.shape[1]
        with torch.no_grad():
            run = way.run(model, capture=["hook_embed", "blocks.1.attn.hook_pattern"])
            whole = model(way.batch.tokens, attention_mask=way.batch.mask, positions=way.batch.given_positions)
        torch.testing.assert_close(run.logits[way.batch.mask], whole[way.batch.mask])
        n_rows, n_columns = way.batch.tokens.shape
        assert run.captures["hook_embed"].shape == (n_rows, n_columns, 24)
        assert run.captures["blocks.1.attn.hook_pattern"].shape == (n_rows, 4, n_columns, n_columns)


def test_frequencies_by_length_are_run_on_a_cache_as_far_as_they_are_those_of_all_lengths() -> None:
    assert runs_in_pieces(make_probe(build("rotary-dynamic")))
    assert not runs_in_pieces(make_probe(build("rotary-dynamic"), n_tokens=30))


def test_padding_stands_at_the_start_in_the_middle_and_at_the_end() -> None:
    mask = ragged_mask(torch.zeros(3, 12, dtype=torch.long), 6)
    assert mask.tolist() == [[True] * 12, [False] * 2 + [True] * 8 + [False] * 2, [True] * 4 + [False] * 4 + [True] * 4]
