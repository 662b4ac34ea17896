"""Which rows of quantised tensors on disk go into which maps, against what the rules make of plain tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from hooklens.adapters.conversion import HubModel, MemoryTensors
from hooklens.adapters.dequantised.bnb import Bnb8Bit
from hooklens.adapters.dequantised.tensors import DequantisedTensors
from hooklens.adapters.kept import KeptMaps, QuantisedWeight, find_rows
from hooklens.adapters.rules import Copy
from hooklens.errors import UnsupportedModelError
from tests.checkpoints import VARIANTS
from tests.quantised_models import NETWORKS

NAMES = ["neox-full-rotary", "llama-gqa", "falcon-7b", "falcon-40b"]


def opened(hf_model):
    """A checkpoint whose matrices in layers are int8, and the numbers in them as they were."""
    state, stored = hf_model.state_dict(), {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        stored[name] = tensor
        if (".layers." in name or ".h." in name) and tensor.ndim == 2:
            stored[name] = torch.randint(-127, 128, tensor.shape, generator=generator, dtype=torch.int8)
            scales = torch.rand(len(tensor), generator=generator) + 0.5
            stored[name.removesuffix(".weight") + ".SCB"] = scales
    source = DequantisedTensors(MemoryTensors(stored), Bnb8Bit(), where="here")
    return HubModel(hf_model.config.to_dict(), source, where="here")


@pytest.mark.parametrize("name", NAMES)
def test_kept_rows_are_those_that_rules_take(name) -> None:
    model = opened(VARIANTS[name]())
    plain, n_kept = dict(model.tensors()), 0
    weights = model.cfg.description.weights
    for weight, value in model.kept_tensors():
        if not isinstance(value, QuantisedWeight):
            assert torch.equal(value, plain[weight]), weight
            continue
        n_kept += 1
        dense = value.tensors["entries"].float() * value.tensors["scales"][:, None]
        assert dense.shape == value.shape == weights[weight].stored_shape
        if plain[weight].ndim == 2 or weight.endswith("W_O"):
            logical = dense.T.reshape(plain[weight].shape)
        else:
            logical = dense.view(len(plain[weight]), -1, dense.shape[1]).mT
        assert torch.equal(logical, plain[weight]), weight
    assert n_kept == sum(weight.startswith("blocks.") and len(one.stored) == 2 for weight, one in weights.items())


def test_plain_checkpoints_have_nothing_to_keep() -> None:
    hf_model = VARIANTS["llama-gqa"]()
    model = HubModel(hf_model.config.to_dict(), MemoryTensors(hf_model.state_dict()), where="here")
    with pytest.raises(UnsupportedModelError, match=r"here: quantize='keep', and .* are not quantised"):
        model.kept_tensors()


def test_numbers_in_another_order_are_told() -> None:
    """A rule under which the columns of a map are those on disk in another order."""
    hf_model = VARIANTS["llama-gqa"]()
    model = opened(hf_model)
    written = next(one for one in model._bound if one.ours == ("blocks.0.attn.W_O",))
    assert written.rule.pattern == "m (n h) -> n h m"
    other = replace(written, rule=replace(written.rule, pattern="m (h n) -> n h m"))
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\..*o_proj\.weight' holds .* another order"):
        KeptMaps([other], model._source, model._stored_names, model.cfg, where="here")


def test_rules_that_leave_columns_out_or_order_experts_anew_are_told() -> None:
    """All numbers of a row have to be there; the experts of one tensor are told by theirs."""
    cfg, (rule, weight) = _stack()
    shape = (3, 4, 5)
    [rows] = find_rows(rule(lambda tensor: tensor), [weight], cfg, shape, turned=False)
    assert rows.is_whole
    [rows] = find_rows(rule(lambda tensor: tensor[:, [2, 0]]), [weight], cfg, shape, turned=False)
    assert (rows.numbers.tolist(), rows.is_whole) == ([2, 0], False)
    for moved in (
        lambda tensor: tensor[..., :4],
        lambda tensor: tensor.flip(0),
        lambda tensor: tensor.flip(2),
        lambda tensor: tensor[:2],
        lambda tensor: torch.stack([tensor[0], tensor[1].flip(0), tensor[2]]),
    ):
        assert find_rows(rule(moved), [weight], cfg, shape, turned=False) is None
    [rows] = find_rows(rule(lambda tensor: tensor.mT), [weight], cfg, shape, turned=True)
    assert rows.is_whole


def _stack():
    """A config with experts, and a way to make rules of `W_in`, given what they do to the tensor as it is stored."""
    cfg = NETWORKS["mixture"]
    weight = cfg.description.weights["blocks.0.mlp.W_in"]

    @dataclass(frozen=True)
    class Moved(Copy):
        move: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

        def load(self, tensor, cfg):
            return (self.move(tensor).mT,)

    return cfg, (lambda move: Moved("experts", "blocks.{i}.mlp.W_in", move=move), weight)


def test_tables_and_experts_are_told() -> None:
    """What is no linear map of its own cannot be kept."""
    model = opened(VARIANTS["llama-gqa"]())
    table = next(one for one in model._bound if one.ours == ("embed.W_E",))
    query = next(one for one in model._bound if one.ours == ("blocks.0.attn.W_Q",))
    names = {**model._stored_names, table.hubs[0]: model._stored_names[query.hubs[0]]}
    with pytest.raises(UnsupportedModelError, match=r"1 quantised weights .* no linear map of its own"):
        KeptMaps([table], model._source, names, model.cfg, where="here")
