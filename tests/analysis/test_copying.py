"""Copying scores against the whole circuit, d_vocab x d_vocab, in float64."""

import pytest
import torch

from hooklens.analysis import copying
from hooklens.analysis.copying import copying_scores
from hooklens.errors import InputError
from tests.analysis.test_circuits import behind, dense_ov
from tests.model.networks import ALL_CONFIGS, Allocations, make_config, make_model


@pytest.mark.parametrize("network", ALL_CONFIGS)
@pytest.mark.parametrize("block", [2**24, 50])
def test_scores_are_those_of_the_whole_circuit(network, block, monkeypatch):
    monkeypatch.setattr(copying, "_BLOCK_ENTRIES", block)
    model = make_model(network)
    table = copying_scores(model, k=4)
    few = copying_scores(model, k=4, tokens=[3, 5, 8])
    assert table.index.tolist() == model.all_head_labels()
    for label, line in table.iterrows():
        layer, head = int(line.layer), int(line["head"])
        circuit = (model.W_E @ dense_ov(model, layer, head) @ behind(model.ln_final, model.W_U)).detach()
        eigenvalues = torch.linalg.eigvals(circuit)
        expected = float(eigenvalues.sum().real / eigenvalues.abs().sum())
        # The eigenvalues that are zero come out of the whole matrix as noise of a defective one.
        assert line.eigenvalue_score == pytest.approx(expected, abs=1e-6)
        copies = [token in circuit[token].topk(4).indices.tolist() for token in range(model.cfg.d_vocab)]
        assert line.top_k_score == pytest.approx(sum(copies) / model.cfg.d_vocab)
        assert few.loc[label].top_k_score == pytest.approx(sum(copies[token] for token in (3, 5, 8)) / 3)


def test_a_head_that_copies_and_one_that_suppresses():
    """`W_V W_O = +-1` on the stream, tied embeddings without a norm in between: each token raises itself most."""
    model = make_model(make_config(norm_before=False, final_norm=None))
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
        for head, sign in ((0, 1), (1, -1)):
            model.blocks[0].attn.W_V[head].copy_(torch.eye(12, 6))
            model.blocks[0].attn.W_O[head].copy_(sign * torch.eye(6, 12))
        directions = torch.nn.functional.normalize(model.W_E[:, :6], dim=1)
        model.embed.W_E[:, :6].copy_(directions)
        model.unembed.W_U[:6].copy_(directions.T)
    table = copying_scores(model, k=1)
    assert table.eigenvalue_score["L0H0"] == pytest.approx(1)
    assert table.eigenvalue_score["L0H1"] == pytest.approx(-1)
    assert table.eigenvalue_score["L0H2"] == 0
    assert table.top_k_score["L0H0"] == 1
    assert table.top_k_score["L0H1"] == 0


def test_the_whole_circuit_is_never_made(monkeypatch):
    monkeypatch.setattr(copying, "_BLOCK_ENTRIES", 5 * 23)
    with Allocations() as allocations:
        copying_scores(make_model("rotary"))
    assert allocations.with_numel(5 * 23)
    assert allocations.with_numel(23 * 23) == []


def test_bad_input():
    with pytest.raises(InputError, match="k=24; expected 1 to 23, the size of the vocabulary"):
        copying_scores(make_model("rotary"), k=24)
    with pytest.raises(InputError, match=r"tokens holds \[3, 23\]; expected token ids from 0 to 22"):
        copying_scores(make_model("rotary"), tokens=[3, 23])
