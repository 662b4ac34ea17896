"""Files as the `tuned-lens` and `jlens` packages write them."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hooklens.analysis.lens import JacobianLens, TunedLens
from hooklens.errors import CheckpointError, InputError, TransformError
from tests.model.networks import make_model


@pytest.fixture(scope="module")
def model():
    return make_model("rotary", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    """What `tuned_lens.TunedLens.save` writes: the state dict of a list of linear maps, and a config."""
    translators = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
    torch.save(translators.state_dict(), tmp_path / "params.pt")
    config = {
        "base_model_name_or_path": "some/model", "d_model": 12, "num_hidden_layers": 2, "bias": True,
        "base_model_revision": None, "unembed_hash": "0" * 64, "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, translators


def test_a_tuned_lens(model, folder):
    path, translators = folder
    lens = TunedLens.load(path, model=model)
    stream = torch.randn(2, 3, 12)
    for layer, translator in enumerate(translators):
        # As `TunedLens.transform_hidden` of the package.
        assert_close(lens.apply(stream, layer), (stream + translator(stream)).detach())
    lens.check(model)
    assert lens.to_dataframe().empty
    with pytest.raises(InputError, match="published files, which hold no losses"):
        lens.plot()
    lens.save(path / "own")
    assert TunedLens.load(path / "own", model=model) == lens


def test_a_tuned_lens_without_bias(model, folder):
    path, translators = folder
    config = json.loads((path / "config.json").read_text()) | {"bias": False}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing, unexpected or misshapen: \['0.bias', '1.bias'\]"):
        TunedLens.load(path, model=model)
    torch.save({name: w for name, w in translators.state_dict().items() if "weight" in name}, path / "params.pt")
    assert not TunedLens.load(path, model=model).bias.any()


def test_a_tuned_lens_of_something_else(model, folder):
    path, _ = folder
    with pytest.raises(InputError, match="does not know the weights it is of; give the model"):
        TunedLens.load(path)
    with pytest.raises(TransformError, match=r"the model's were processed \(fold_ln.*load the model anew"):
        TunedLens.load(path, model=model.process_weights(fold_ln=True))
    config = json.loads((path / "config.json").read_text()) | {"d_model": 13}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"another model \('some/model'\): d_model is 13, the model's is 12"):
        TunedLens.load(path, model=model)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        TunedLens.load(path, model=model)


def test_a_file_that_would_run_code_is_not_run(model, folder):
    path, _ = folder

    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"0.weight": Harm()}, path / "params.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*params\.pt"):
        TunedLens.load(path, model=model)


def test_a_jacobian_lens(model, tmp_path):
    """Layer 0 there is the stream that leaves block 0: the one that enters block 1."""
    jacobian = torch.randn(12, 12)
    state = {"J": {0: jacobian.half()}, "n_prompts": 7, "source_layers": [0], "d_model": 12}
    torch.save(state, tmp_path / "lens.pt")
    lens = JacobianLens.load(tmp_path / "lens.pt", model=model)
    assert lens.layers == (1,)
    assert lens.n_prompts == 7
    stream = torch.randn(2, 3, 12)
    assert_close(lens.apply(stream, 1), stream @ jacobian.half().float().T)
    assert JacobianLens.load(tmp_path, model=model) == lens
    with pytest.raises(InputError, match="does not know the weights it is of"):
        JacobianLens.load(tmp_path / "lens.pt")
    torch.save(state | {"J": {3: jacobian}}, tmp_path / "lens.pt")
    with pytest.raises(InputError, match="streams that leave layers up to 3"):
        JacobianLens.load(tmp_path / "lens.pt", model=model)
    torch.save(state | {"J": {0: jacobian[1:]}}, tmp_path / "lens.pt")
    with pytest.raises(CheckpointError, match=r"J of layers \[0\] is no matrix \[12 12\]"):
        JacobianLens.load(tmp_path / "lens.pt", model=model)
    torch.save({"jacobian_sum": {}}, tmp_path / "lens.pt")
    with pytest.raises(CheckpointError, match="expected the keys J, n_prompts and d_model"):
        JacobianLens.load(tmp_path / "lens.pt", model=model)
