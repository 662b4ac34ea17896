"""What a model shows of itself, held against its weights and hook points."""

import pytest
import torch

from hooklens import HookedCausalLM
from tests.model.networks import ALL_CONFIGS, make_model


@pytest.mark.parametrize("name", ["grouped", "layers that lack parts", "learned, tied"])
def test_the_tree_has_all_weights_and_hook_points(name):
    model = make_model(name)
    page = model._repr_html_()
    description = model.cfg.description
    for word in {full.rpartition(".")[2] for full in [*description.weights, *description.points]}:
        assert f">{word}</th>" in page
    assert page.count("equal blocks") == (name != "layers that lack parts")


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_parts_are_counted_as_often_as_they_stand(name):
    """By part the product of its two numbers; together the model's parameters, a tied unembedding counted once."""
    model = make_model(name)
    counted = 0
    for _, _, cell, _ in model._summary().listing.rows:
        n, _, own = cell.rpartition(" x ")
        counted += 0 if cell in ("", "tied") else int(n or 1) * int(own.replace(",", ""))
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_attached_and_where_it_lies():
    model = make_model("grouped", dtype=torch.bfloat16)
    assert "hooks" not in repr(model)
    handle = model.add_hook("blocks.1.attn.hook_z", lambda tensor, hook: None)
    assert "hooks      1 at blocks.1.attn.hook_z" in repr(model)
    handle.remove()
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert f"weights    bfloat16, {n_bytes / 1000:.3g} kB on cpu" in repr(model)
    assert "mode       training" in repr(model.train())


def test_the_tree_of_modules_is_still_there():
    model = make_model("grouped")
    tree = torch.nn.Module.__repr__(model)
    assert "(q_proj): Linear" in tree
    assert repr(model.block_list()[0].attn.q_proj) in tree
    assert "torch.nn.Module.__repr__(model)" in repr(model)


def test_a_tokenizer_is_told_without_where_it_lies():
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    [line] = [line for line in repr(model).splitlines() if line.startswith("  tokenizer")]
    assert line.endswith(" of tiny-llama")
