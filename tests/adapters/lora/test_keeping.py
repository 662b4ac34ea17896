"""Adapters taken apart for the maps of a network: what each map takes of them, by brute force."""

import dataclasses

import pytest
import torch

from hooklens.adapters import open_checkpoint
from hooklens.adapters.lora import open_adapter
from hooklens.adapters.lora.keeping import join_adapter, keep_adapter
from hooklens.errors import UnsupportedModelError
from tests.adapted_models import CASES, make_adapted


@pytest.fixture(params=[case for case in CASES if case not in ("tied", "latent")])
def opened(request, tmp_path):
    made = make_adapted(request.param, tmp_path, embedding=True, use_dora=True)
    return open_checkpoint(made.base), open_adapter(made.adapter)


def test_what_maps_add_together_is_what_the_adapter_adds(opened):
    """A change of a weight on disk, put through the family's map, is the changes of the maps that it holds."""
    checkpoint, adapter = opened
    kept = keep_adapter(adapter, checkpoint.cfg)
    modules = {one.name: one for one in adapter.modules}
    by_module = {}
    for change in kept.changes:
        by_module.setdefault(change.module, []).append(change)
        whole = modules[change.module].B @ modules[change.module].A
        torch.testing.assert_close(change.B @ change.A, whole[change.rows.numbers], rtol=0, atol=1e-12)
        assert torch.equal(change.magnitude, modules[change.module].magnitude[change.rows.numbers])
    assert by_module.keys() == modules.keys()
    for name, changes in by_module.items():
        # Each output of the module is of one map, and what reads the input is one matrix.
        rows = torch.cat([change.rows.numbers for change in changes])
        assert torch.equal(rows.sort().values, torch.arange(len(modules[name].B)))
        assert all(change.A is changes[0].A for change in changes)


def test_put_together_again_it_is_what_was_read(opened):
    checkpoint, adapter = opened
    kept = keep_adapter(adapter, checkpoint.cfg)
    wholes = {name: tensor for whole in kept.wholes for name, tensor in whole.tensors.items()}
    joined = join_adapter(
        kept.without_values(),
        lambda change: next(one for one in kept.changes if one.weight == change.weight),
        wholes.__getitem__,
    )
    for module in adapter.modules:
        found = {name: value for name, value in joined.items() if name.startswith(f"base_model.model.{module.name}.")}
        values = list(found.values())
        for tensor in (module.A, module.B, module.magnitude):
            assert any(tensor.shape == value.shape and torch.equal(tensor, value) for value in values)


def test_layers_that_are_taken(opened):
    checkpoint, adapter = opened
    whole, kept = (keep_adapter(adapter, checkpoint.cfg, layers) for layers in (None, [1]))
    expected = {one.weight: one for one in whole.changes if not one.weight.startswith(("blocks.0", "blocks.2"))}
    assert [one.weight for one in kept.changes] == [name.replace("blocks.1", "blocks.0") for name in expected]
    for one, other in zip(kept.changes, expected.values(), strict=True):
        assert torch.equal(one.B, other.B)


def test_a_network_from_no_checkpoint_is_refused(opened):
    checkpoint, adapter = opened
    with pytest.raises(UnsupportedModelError, match="was not read from a checkpoint in Hugging Face format"):
        keep_adapter(adapter, dataclasses.replace(checkpoint.cfg, origin=None))
