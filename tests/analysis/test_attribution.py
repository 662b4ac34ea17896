"""Attributions against the model's logits and against vectors built one by one."""

import re

import pytest
import torch

from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.attribution import attribute_to_components, attribute_to_heads, attribute_to_neurons
from hooklens.analysis.lens import logit_lens
from hooklens.errors import CacheError, InputError
from tests.model.networks import CONFIGS, Allocations, make_config, make_model, random_tokens


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("attribute", [attribute_to_components, attribute_to_heads, attribute_to_neurons])
def test_every_table_sums_to_the_logit_difference(network, attribute):
    model = make_model(network)
    _, cache = model.run_with_cache(random_tokens(2, 4))
    logits = cache["unembed.hook_out"]
    answers, wrong = torch.tensor([3, 8]), torch.tensor([1, 2])
    for pos in (-1, 1):
        sums = attribute(model, cache, answers, wrong, pos=pos).groupby("row").value.sum()
        for row in range(2):
            assert sums[row] == pytest.approx(float(logits[row, pos, answers[row]] - logits[row, pos, wrong[row]]))
    assert attribute(model, cache, 5).groupby("row").value.sum()[0] == pytest.approx(float(logits[0, -1, 5]))


@pytest.mark.parametrize("network", CONFIGS)
def test_values_are_those_of_the_stacks(network):
    model = make_model(network)
    _, cache = model.run_with_cache(random_tokens(2, 4))
    for attribute, stack in (
        (attribute_to_heads, cache.stack_head_results(return_labels=True)),
        (attribute_to_neurons, cache.stack_neuron_results(return_labels=True)),
        (attribute_to_components, cache.decompose_resid(return_labels=True)),
    ):
        expected = cache.logit_attrs(stack[0][:, :, -1], 3, 7, pos_slice=-1)
        table = attribute(model, cache, 3, 7)
        for row in range(2):
            lines = table[table.row == row].set_index("component").value
            assert lines[stack[1]].tolist() == pytest.approx(expected[:, row].tolist())


def test_the_largest_neurons_and_the_rest():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    everything = attribute_to_neurons(model, cache, 3)
    few = attribute_to_neurons(model, cache, 3, k=2)
    neurons = everything[everything.component.str.match(r"L\dN")].set_index("component").value
    assert few.component.tolist()[:2] == neurons.abs().nlargest(2).index.tolist()
    assert few.component.tolist()[2:] == ["remainder", "bias"]
    assert few.value.sum() == pytest.approx(everything.value.sum())


def test_neurons_are_never_built():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(3, 4))
    with Allocations() as allocations:
        attribute_to_neurons(model, cache, torch.tensor([1, 2, 3]))
    # 20 neurons, 3 rows, d_model 12.
    assert allocations.sizes
    assert allocations.with_numel(20 * 3 * 12, 40 * 3 * 12) == []


@pytest.mark.parametrize("read", [attribute_to_heads, lambda model, cache, token: logit_lens(model, cache)])
def test_positions_cut_out_of_padding(read):
    """With `pos_slice=-1` the last column was read in every row, padding or not."""
    model = make_model("rotary")
    right, left = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    _, cache = model.run_with_cache(random_tokens(2, 4), attention_mask=right, pos_slice=-1)
    if read is attribute_to_heads:
        with pytest.raises(InputError, match=r"position -1 is padding in rows \[1\]; give a position that is a token"):
            read(model, cache, 3)
    else:
        assert set(read(model, cache, 3)["row"]) == {0}
    _, whole = model.run_with_cache(random_tokens(2, 4), attention_mask=left)
    _, cache = model.run_with_cache(random_tokens(2, 4), attention_mask=left, pos_slice=-1)
    values = read(model, cache, 3).select_dtypes("number").drop(columns="pos", errors="ignore")
    assert values.equals(read(model, whole, 3).select_dtypes("number").drop(columns="pos", errors="ignore"))


def test_a_model_without_layers():
    """Its logits come from the embedding alone (Elhage et al. 2021, "zero-layer transformers")."""
    model = make_model(make_config(n_layers=0))
    logits, cache = model.run_with_cache(random_tokens(1, 4))
    for attribute in (attribute_to_components, attribute_to_heads):
        assert attribute(model, cache, 3).value.sum() == pytest.approx(float(logits[0, -1, 3].detach()))
    assert logit_lens(model, cache).stream.tolist() == ["final_post"]
    with pytest.raises(CacheError, match="there are no neurons below layer 0"):
        attribute_to_neurons(model, cache, 3)


def test_ids_in_a_list():
    """A list of ids went to the tokenizer, which takes text only."""
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(2, 4))
    expected = attribute_to_heads(model, cache, torch.tensor([3, 8]), torch.tensor([1, 2]))
    assert attribute_to_heads(model, cache, [3, 8], [1, 2]).equals(expected)


def test_one_row_without_a_batch_axis():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    assert attribute_to_heads(model, cache.remove_batch_dim(), 3, 7).equals(attribute_to_heads(model, cache, 3, 7))


@pytest.mark.parametrize("attribute", [attribute_to_components, attribute_to_heads, attribute_to_neurons])
def test_all_that_is_missing_is_told_at_once(attribute):
    """Capturing the names of the message is enough; the norm's scale alone was named first."""
    model = make_model("capped")
    _, cache = model.run_with_cache(random_tokens(1, 4), names_filter="pattern")
    with pytest.raises(
        MissingActivationError, match="attribution needs activations that this cache does not"
    ) as caught:
        attribute(model, cache, 3)
    named = re.findall(r"'([^']+)'", str(caught.value))
    _, enough = model.run_with_cache(random_tokens(1, 4), names_filter=named)
    assert attribute(model, enough, 3).value.sum() == pytest.approx(
        float(
            model.run_with_cache(random_tokens(1, 4), names_filter="unembed.hook_out")[1]["unembed.hook_out"][0, -1, 3]
        )
    )


def test_bad_input():
    model = make_model("rotary")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    _, cache = model.run_with_cache(random_tokens(2, 4), attention_mask=mask)
    with pytest.raises(InputError, match=r"position -1 is padding in rows \[1\]; .*cache.unpad\(row\)"):
        attribute_to_components(model, cache, 3)
    with pytest.raises(CacheError, match=r"tokens have shape \[3\], the activations' batch and pos axes \[2\]"):
        attribute_to_components(model, cache, torch.tensor([1, 2, 3]), pos=0)
    with pytest.raises(InputError, match="k=0; expected at least 1"):
        attribute_to_neurons(model, cache, 3, pos=0, k=0)
