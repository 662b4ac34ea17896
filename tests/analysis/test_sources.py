"""Shares by source token against sums over vectors built one by one, and against attributions to heads."""

import pytest
import torch

from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.attribution import attribute_to_heads
from hooklens.analysis.sources import attribute_to_sources
from hooklens.errors import InputError
from tests.model.networks import ALL_CONFIGS, Allocations, make_config, make_model, pad_rows, random_tokens


@pytest.mark.parametrize("network", ALL_CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sources_sum_to_the_heads(network, side):
    model = make_model(network)
    tokens, mask = pad_rows([random_tokens(1, n, seed=n)[0] for n in (6, 3)], side)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    answers, wrong = torch.tensor([3, 8]), torch.tensor([1, 2])
    for pos in (-1, -2):
        table = attribute_to_sources(model, cache, answers, wrong, pos=pos)
        heads = attribute_to_heads(model, cache, answers, wrong, pos=pos).set_index(["component", "row"]).value
        sums = table.groupby(["component", "row"]).value.sum()
        assert set(sums.index.get_level_values(0)) == set(model.all_head_labels())
        for place, value in sums.items():
            assert value == pytest.approx(heads[place], abs=1e-12)
        for row, length in ((0, 6), (1, 3)):
            lines = table[(table.row == row) & (table.component == model.all_head_labels()[0])]
            assert lines.source.tolist() == list(range(length + pos + 1))
            real = tokens[row][mask[row].bool()]
            assert lines.token.tolist() == real[: length + pos + 1].tolist()


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_each_source_is_its_vector_read_by_the_model(network):
    model = make_model(network)
    _, cache = model.run_with_cache(random_tokens(2, 5))
    table = attribute_to_sources(model, cache, 3, pos=3).set_index(["layer", "head", "row", "source"]).value
    group = model.cfg.n_heads // model.cfg.n_kv_heads

    def apply_frozen(norm, vector, scale):
        if norm is None:
            return vector
        centred = vector - vector.mean() if norm.norm.kind == "layer" else vector
        gain = 1 if norm.w is None else (1 + norm.w if norm.norm.unit_offset else norm.w)
        return centred / scale * gain

    for (layer, head, row, source), value in table.items():
        block = model.blocks[layer]
        vector = cache["pattern", layer][row, head, 3, source] * (
            cache["v", layer][row, source, head // group] @ block.attn.W_O[head]
        )
        if block.ln1_post is not None:
            vector = apply_frozen(block.ln1_post, vector, cache[f"blocks.{layer}.ln1_post.hook_scale"][row, 3])
        if model.ln_final is not None:
            vector = apply_frozen(model.ln_final, vector, cache["ln_final.hook_scale"][row, 3])
        assert value == pytest.approx(float((vector @ model.W_U[:, 3]).detach()), abs=1e-12)


def test_one_row_without_a_batch_axis():
    model = make_model("grouped")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    expected = attribute_to_sources(model, cache, 3, 7)
    assert attribute_to_sources(model, cache.remove_batch_dim(), 3, 7).equals(expected)


def test_sources_of_a_network_that_is_not_causal():
    """Later tokens are sources, too."""
    model = make_model(make_config(causal=False))
    _, cache = model.run_with_cache(random_tokens(1, 5))
    table = attribute_to_sources(model, cache, 3, pos=1)
    heads = attribute_to_heads(model, cache, 3, pos=1).set_index("component").value
    for component, value in table.groupby("component").value.sum().items():
        assert value == pytest.approx(heads[component], abs=1e-12)
    assert table.source.max() == 4


def test_vectors_of_sources_are_not_built():
    model = make_model("grouped")
    _, cache = model.run_with_cache(random_tokens(3, 7))
    with Allocations() as allocations:
        attribute_to_sources(model, cache, torch.tensor([1, 2, 3]))
    # Rows x heads x positions x d_model.
    assert allocations.sizes
    assert allocations.with_numel(3 * 4 * 7 * 12) == []


def test_bad_input():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4), names_filter="pattern")
    with pytest.raises(MissingActivationError, match=r"blocks.0.attn.hook_v.*ln_final.hook_scale"):
        attribute_to_sources(model, cache, 3)
    _, cache = model.run_with_cache(random_tokens(1, 4), pos_slice=[-1])
    with pytest.raises(InputError, match=r"layer 0 attended to 4 positions, and the values of 1 were captured; capt"):
        attribute_to_sources(model, cache, 3)
