"""Singular vectors in token space against dense decompositions."""

import pytest
import torch

from hooklens.analysis.circuits import (
    neuron_tokens,
    read_mlp_directions,
    read_ov_directions,
    top_ov_pairs,
    top_qk_pairs,
)
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, make_model


def behind(norm, W):
    """A map that reads the stream through a norm, without the norm's denominator and bias."""
    if norm is None:
        return W.detach()
    if norm.w is not None:
        W = (1 + norm.w if norm.norm.unit_offset else norm.w)[:, None] * W
    return (W - W.mean(0) if norm.norm.kind == "layer" else W).detach()


def through(norm, W):
    """Rows of a map that a norm follows, without its denominator and bias: the norm of each row, times its scale."""
    if norm is None:
        return W.detach()
    centred = W - W.mean(-1, keepdim=True) if norm.norm.kind == "layer" else W
    return (centred * (1 + norm.w if norm.norm.unit_offset else norm.w)).detach()


def embedding(model):
    """Tokens as they enter the stream, by a run."""
    tokens = torch.arange(model.cfg.d_vocab)[:, None]
    return model.run_with_cache(tokens, names_filter="hook_embed", stop_at_layer=0)[1]["hook_embed"][:, 0].detach()


def dense_ov(model, layer, head):
    block = model.blocks[layer]
    kv_head = head * model.cfg.n_kv_heads // model.cfg.n_heads
    if model.cfg.block(layer).attn.kind == "attention":
        reads = behind(block.ln1, block.attn.W_V[kv_head])
    else:
        reads = behind(block.ln1, block.attn.W_DKV) @ behind(block.attn.kv_latent_norm, block.attn.W_UV[head])
    return reads @ through(block.ln1_post, block.attn.W_O[head])


def dense_qk(model, layer, head):
    block = model.blocks[layer]
    attn, kv_head = block.attn, head * model.cfg.n_kv_heads // model.cfg.n_heads
    W_Q = through(attn.q_norm, behind(block.ln1, attn.W_Q[head]))
    return W_Q @ through(attn.k_norm, behind(block.ln1, attn.W_K[kv_head])).T * model.cfg.d_head**-0.5


@pytest.mark.parametrize("network", CONFIGS)
def test_ov_directions(network):
    """Signs of a pair of singular vectors are free, so both ends are compared as a set."""
    model = make_model(network)
    table = read_ov_directions(model, 1, 2, n_directions=3, k=2)
    U, S, Vh = torch.linalg.svd(dense_ov(model, 1, 2))
    assert table.singular_value.unique().tolist() == pytest.approx(S[:3].tolist())
    for direction in range(3):
        reads, writes = model.W_E @ U[:, direction], Vh[direction] @ behind(model.ln_final, model.W_U)
        expected = {
            (tuple((sign * reads).topk(2).indices.tolist()), tuple((sign * writes).topk(2).indices.tolist()))
            for sign in (1, -1)
        }
        lines = table[table.direction == direction]
        assert set(zip(lines.reads, lines.writes, strict=True)) == expected
        assert lines.end.tolist() == ["+", "-"]


@pytest.mark.parametrize("network", CONFIGS)
def test_mlp_directions(network):
    """Float64: singular values of a float32 decomposition would be off by 1e-7 of the largest."""
    model = make_model(network)
    block = model.blocks[0]
    reader = block.mlp.W_gate if model.cfg.gated_mlp else block.mlp.W_in
    U, S_in, _ = torch.linalg.svd(behind(block.ln1 if block.ln2 is None else block.ln2, reader))
    _, S_out, Vh = torch.linalg.svd(through(block.ln2_post, block.mlp.W_out))
    for weight, column, S, tokens in (
        ("out", "writes", S_out, Vh[0] @ behind(model.ln_final, model.W_U)),
        ("in", "reads", S_in, model.W_E @ U[:, 0]),
    ):
        table = read_mlp_directions(model, 0, weight=weight, n_directions=2, k=3)
        assert table.singular_value.unique().tolist() == pytest.approx(S[:2].tolist(), rel=1e-12)
        expected = {tuple((sign * tokens).topk(3).indices.tolist()) for sign in (1, -1)}
        assert set(table[table.direction == 0][column]) == expected


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("center", [False, True])
def test_top_pairs(network, center):
    """A factor on the embeddings was left out, which made values of models with one too small."""
    model = make_model(network)
    W_E = embedding(model)
    for read, dense, rows, columns in (
        (top_ov_pairs, W_E @ dense_ov(model, 0, 3) @ behind(model.ln_final, model.W_U), "source", "promoted"),
        (top_qk_pairs, W_E @ dense_qk(model, 0, 3) @ W_E.T, "query", "key"),
    ):
        expected = dense - dense.mean(1, keepdim=True) if center else dense
        table = read(model, 0, 3, k=4, center=center)
        assert table.value.tolist() == pytest.approx(expected.flatten().topk(4).values.tolist())
        found = [float(expected[pair]) for pair in zip(table[rows], table[columns], strict=True)]
        assert found == pytest.approx(table.value.tolist())


def test_query_key_pairs_are_differences_of_scores():
    """By the run: with embeddings that the first norm only scales, scores of tokens at one position are the circuit's.

    Queries and keys stand at the same position, so that rotations cancel; biases are taken away.
    """
    model = make_model("grouped")
    with torch.no_grad():
        model.embed.W_E.div_(model.W_E.pow(2).mean(1, keepdim=True).sqrt())
    tokens = torch.arange(model.cfg.d_vocab)[:, None]
    _, cache = model.run_with_cache(tokens, names_filter="attn_scores")
    W_E = model.W_E.detach()
    own = (W_E @ dense_qk(model, 0, 3) @ W_E.T).diagonal()
    # eps of the norm, 1e-6, against a mean square of 1, on both sides.
    assert cache["attn_scores", 0][:, 3, 0, 0].tolist() == pytest.approx(own.tolist(), rel=3e-6)


@pytest.mark.parametrize("network", CONFIGS)
def test_tokens_of_neurons(network):
    model = make_model(network)
    block = model.blocks[1]
    reader = block.mlp.W_gate if model.cfg.gated_mlp else block.mlp.W_in
    excites = (embedding(model) @ behind(block.ln1 if block.ln2 is None else block.ln2, reader)).detach()
    promotes = through(block.ln2_post, block.mlp.W_out) @ behind(model.ln_final, model.W_U)
    table = neuron_tokens(model, 1, [7, -1], k=3).set_index("neuron")
    assert table.index.tolist() == [7, 19]
    for neuron, line in table.iterrows():
        for tokens, values, expected in (
            (line.excited_by, line.excitations, excites[:, neuron].topk(3)),
            (line.promotes, line.promotions, promotes[neuron].topk(3)),
        ):
            assert list(tokens) == expected.indices.tolist()
            assert values == pytest.approx(tuple(expected.values.tolist()))
    assert neuron_tokens(model, 1).neuron.tolist() == list(range(20))


@pytest.mark.parametrize("network", CONFIGS)
def test_a_model_reads_the_same_after_folding_its_norms(network):
    """What is written was read by `W_U` without the final norm's weight, so nine in ten tokens of a Llama differed."""
    model = make_model(network)
    folded = model.process_weights(fold_ln=True)
    for read in (
        lambda m: read_ov_directions(m, 1, 2),
        lambda m: read_mlp_directions(m, 1),
        lambda m: read_mlp_directions(m, 1, weight="in"),
    ):
        ours, theirs = read(model), read(folded)
        assert ours.singular_value.tolist() == pytest.approx(theirs.singular_value.tolist())
        for column in {"reads", "writes"} & set(ours.columns):
            # Rounding may turn a pair of singular vectors around.
            assert set(zip(ours.direction, ours[column], strict=True)) == set(
                zip(theirs.direction, theirs[column], strict=True)
            )
    for read_pairs in (top_ov_pairs, top_qk_pairs):
        ours, theirs = (read_pairs(m, 0, 1, k=3) for m in (model, folded))
        assert ours.value.tolist() == pytest.approx(theirs.value.tolist())
        assert ours.iloc[:, :2].equals(theirs.iloc[:, :2])
    ours, theirs = (neuron_tokens(m, 0, k=1) for m in (model, folded))
    assert ours[["excited_by", "promotes"]].equals(theirs[["excited_by", "promotes"]])


def test_half_precision_is_decomposed_in_float32():
    """bfloat16 products would move the singular values by some 1e-3."""
    model = make_model("rotary", dtype=torch.bfloat16)
    wide = make_model("rotary", dtype=torch.bfloat16).double()
    for read in (lambda m: read_ov_directions(m, 1, 2), lambda m: read_mlp_directions(m, 1, weight="in")):
        assert read(model).singular_value.tolist() == pytest.approx(read(wide).singular_value.tolist(), rel=1e-5)
    assert top_ov_pairs(model, 0, 1).value.tolist() == pytest.approx(top_ov_pairs(wide, 0, 1).value.tolist(), rel=1e-5)


def test_bad_input():
    model = make_model("rotary")
    with pytest.raises(InputError, match="layer 2, head 0 is not in the model; it has layers 0 to 1 with heads 0 to 3"):
        read_ov_directions(model, 2, 0)
    with pytest.raises(
        InputError, match="n_directions=7, k=1; expected 1 to 6 directions, the rank, and 1 to 23 tokens"
    ):
        read_ov_directions(model, 0, 0, n_directions=7, k=1)
    with unchecked(), pytest.raises(InputError, match="weight is 'gate', expected 'in' or 'out'"):
        read_mlp_directions(model, 0, weight="gate")
    with pytest.raises(InputError, match=r"neurons: \[20\] out of range; there are 20 neurons of this MLP"):
        neuron_tokens(model, 0, [20])
    with pytest.raises(InputError, match="k=24; expected 1 to 23, the size of the vocabulary"):
        neuron_tokens(model, 0, k=24)


def test_latent_attention_has_an_ov_circuit_and_no_qk_circuit():
    """Of a key only a part goes through a norm, whose denominator cannot be left out of a sum."""
    model = make_model("latent attention")
    found = read_ov_directions(model, 1, 2, n_directions=3).singular_value.unique().tolist()
    expected = torch.linalg.svdvals(dense_ov(model, 1, 2))[: len(found)].tolist()
    assert found == pytest.approx(expected)
    with pytest.raises(InputError, match=r"layer 1 has latent attention: of a head's key only what does not turn goes"):
        top_qk_pairs(model, 1, 0)
