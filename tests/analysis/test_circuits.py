"""Singular vectors in token space against dense decompositions."""

import pytest
import torch

from hooklens.analysis.circuits import read_mlp_directions, read_ov_directions, top_ov_pairs
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, make_model


def dense_ov(model, layer, head):
    block = model.blocks[layer]
    kv_head = head * model.cfg.n_kv_heads // model.cfg.n_heads
    W_V = block.attn.W_V[kv_head]
    if block.ln1 is not None:
        gain = 1 + block.ln1.w if block.ln1.cfg.unit_offset else block.ln1.w
        W_V = gain[:, None] * W_V
        if block.ln1.cfg.kind == "layer":
            W_V = W_V - W_V.mean(0)
    return (W_V @ block.attn.W_O[head]).detach()


@pytest.mark.parametrize("network", CONFIGS)
def test_ov_directions(network):
    """Signs of a pair of singular vectors are free, so both ends are compared as a set."""
    model = make_model(network)
    table = read_ov_directions(model, 1, 2, n_directions=3, k=2)
    U, S, Vh = torch.linalg.svd(dense_ov(model, 1, 2))
    assert table.singular_value.unique().tolist() == pytest.approx(S[:3].tolist())
    for direction in range(3):
        reads, writes = model.W_E @ U[:, direction], Vh[direction] @ model.W_U
        expected = {
            (tuple((sign * reads).topk(2).indices.tolist()), tuple((sign * writes).topk(2).indices.tolist()))
            for sign in (1, -1)
        }
        lines = table[table.direction == direction]
        assert set(zip(lines.reads, lines.writes, strict=True)) == expected
        assert lines.end.tolist() == ["+", "-"]


@pytest.mark.parametrize("network", ["rotary", "grouped"])
def test_mlp_directions(network):
    """In float32: 1e-5 of the singular values."""
    model = make_model(network)
    table = read_mlp_directions(model, 0, n_directions=2, k=3)
    _, S, Vh = torch.linalg.svd(model.blocks[0].mlp.W_out.detach())
    assert table.singular_value.unique().tolist() == pytest.approx(S[:2].tolist(), rel=1e-5)
    writes = Vh[0] @ model.W_U
    expected = {tuple((sign * writes).topk(3).indices.tolist()) for sign in (1, -1)}
    assert set(table[table.direction == 0].writes) == expected
    assert "reads" in read_mlp_directions(model, 0, weight="in").columns


def test_top_pairs():
    model = make_model("grouped")
    dense = (model.W_E @ dense_ov(model, 0, 3) @ model.W_U).detach()
    table = top_ov_pairs(model, 0, 3, k=4)
    assert table.value.tolist() == pytest.approx(dense.flatten().topk(4).values.tolist())
    assert [float(dense[pair]) for pair in zip(table.source, table.promoted, strict=True)] == pytest.approx(
        table.value.tolist()
    )


def test_bad_input():
    model = make_model("rotary")
    with pytest.raises(InputError, match="layer 2, head 0 is not in the model; it has layers 0 to 1 with heads 0 to 3"):
        read_ov_directions(model, 2, 0)
    with pytest.raises(
        InputError, match="n_directions=7, k=1; expected 1 to 6 directions, the rank, and 1 to 23 tokens"
    ):
        read_ov_directions(model, 0, 0, n_directions=7, k=1)
    with unchecked(), pytest.raises(InputError, match="weight is 'gate'; expected 'in' or 'out'"):
        read_mlp_directions(model, 0, weight="gate")
