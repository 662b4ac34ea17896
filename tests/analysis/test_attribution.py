"""Attributions against the model's logits and against vectors built one by one."""

import re
from functools import partial

import pytest
import torch

from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.attribution import attribute_to_components, attribute_to_heads, attribute_to_neurons
from hooklens.analysis.lens import logit_lens
from hooklens.errors import CacheError, InputError
from tests.model.networks import CONFIGS, Allocations, make_config, make_model, pad_rows, random_tokens


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


ATTRIBUTIONS = [attribute_to_components, attribute_to_heads, attribute_to_neurons]
READS = {
    **{attribute.__name__: partial(attribute, tokens=3, incorrect_tokens=5) for attribute in ATTRIBUTIONS},
    "logit_lens": logit_lens,
}


def alone(read, model, cache, row, **given):
    """What a row says by itself, without its padding."""
    table = read(model, cache=cache.unpad(row), **given)
    return table.assign(row=row)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_position_is_that_of_each_rows_own_tokens(name, side):
    """-1 was the last column: the lens left out rows that end with padding, attributions refused them."""
    model = make_model("capped")
    tokens, mask = pad_rows([random_tokens(1, n, seed=n)[0] for n in (5, 2, 3)], side)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    for pos in (-1, -2, 0, 1):
        where = {"pos_slice" if name == "logit_lens" else "pos": pos}
        table = READS[name](model, cache=cache, **where)
        for row in range(3):
            expected = alone(READS[name], model, cache, row, **where)
            found = table[table.row == row].reset_index(drop=True)
            for column in {"component", "stream", "top_tokens"} & set(expected):
                assert found[column].tolist() == expected[column].tolist()
            for column in expected.select_dtypes("number"):
                # Float64; sums of a batch may be taken in another order.
                assert found[column].tolist() == pytest.approx(expected[column].tolist(), abs=1e-12)


@pytest.mark.parametrize("name", READS)
def test_positions_cut_out_of_padding(name):
    """Rows of which nothing but padding was captured were left out by the lens; they have no position to read."""
    model = make_model("rotary")
    right, left = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    _, cache = model.run_with_cache(random_tokens(2, 4), attention_mask=right, pos_slice=-1)
    with pytest.raises(InputError, match=r"no token of rows \[1\] was captured: the 1 captured columns are padding"):
        READS[name](model, cache=cache)
    _, whole = model.run_with_cache(random_tokens(2, 4), attention_mask=left)
    _, cache = model.run_with_cache(random_tokens(2, 4), attention_mask=left, pos_slice=-1)
    values, expected = (
        READS[name](model, cache=one).select_dtypes("number").drop(columns="pos", errors="ignore")
        for one in (cache, whole)
    )
    assert values.equals(expected)


@pytest.mark.parametrize("name", READS)
def test_rows_that_lack_a_position_are_named(name):
    model = make_model("rotary")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    _, cache = model.run_with_cache(random_tokens(3, 4), attention_mask=mask)
    where = "pos_slice" if name == "logit_lens" else "pos"
    with pytest.raises(InputError, match=rf"{where}: row 1: 2 out of range; there are 2 captured .*; {where}: row 2"):
        READS[name](model, cache=cache, **{where: 2})


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


@pytest.mark.parametrize("attribute", ATTRIBUTIONS)
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
    with pytest.raises(CacheError, match=r"tokens have shape \[3\], the activations' batch and pos axes \[2\]"):
        attribute_to_components(model, cache, torch.tensor([1, 2, 3]), pos=0)
    with pytest.raises(InputError, match="k is 0, expected a whole number >= 1"):
        attribute_to_neurons(model, cache, 3, pos=0, k=0)
