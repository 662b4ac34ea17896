import warnings

import pytest
import torch

from hooklens.adapters.keys import ActivationKey, BiasFlag, ConfigMap, ConfigReader, Key, norm_key
from hooklens.adapters.keys.parts import _ACTIVATIONS
from hooklens.config import NormConfig
from hooklens.errors import UnsupportedModelError

MAP = ConfigMap(
    parts=(
        Key("hidden_size", "d_model", int, alias="n_embed"),
        Key("heads", "n_heads", int, default=None),
        ActivationKey("act", default="gelu"),
        norm_key("eps", "layer", default_eps=1e-5),
        BiasFlag("bias", ("qkv_bias", "out_bias"), default=True),
    ),
    fixed={"gated_mlp": True},
    pinned={"post_norm": False},
    inert=("note",),
)


def read(**config):
    return MAP.read(config, where="here")


def test_values_defaults_and_fixed_fields() -> None:
    norm = NormConfig(kind="layer", eps=1e-5)
    expected = {"d_model": 8, "act_fn": "gelu", "norm": norm, "qkv_bias": True, "out_bias": True, "gated_mlp": True}
    assert read(hidden_size=8) == expected
    assert read(hidden_size=8, heads=None, act=None, bias=None) == expected
    assert read(hidden_size=8, n_embed=16, heads=2)["d_model"] == 16


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(heads="2", act="xielu", bias=1, eps=True, post_norm=True, quantization_config={"bits": 4})
    text = str(caught.value)
    assert text.startswith("here: config.json describes a network that HookLens cannot build: ")
    for problem in (
        "hidden_size is missing",
        "heads is '2'; expected int",
        "act is 'xielu'; expected one of 'gelu', 'gelu_fast',",
        "bias is 1; expected true or false",
        "eps is True; expected float",
        "post_norm is True; expected False, the only value implemented",
        "quantization_config is {'bits': 4}; expected none: the weights are quantised",
    ):
        assert problem in text


def test_unknown_keys_give_one_warning_that_lists_them() -> None:
    with pytest.warns(UserWarning, match=r"here: .* does not know: 'logit_twist', 'mystery'") as caught:
        read(hidden_size=8, logit_twist=2, mystery={}, note="x", use_cache=True, _private=1, torch_dtype="float16")
    assert len(caught) == 1


def test_known_keys_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(hidden_size=8, note="x", use_cache=False, transformers_version="4.0", eos_token_id=[1, 2], post_norm=False)


def test_unknown_keys_of_nested_objects_carry_their_path() -> None:
    reader = ConfigReader({"rope": {"factor": 2.0, "twist": 1}, "other": 1})
    assert reader.nested("rope").get("factor", float) == 2.0
    assert reader.unused() == ["other", "rope.twist"]


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="hidden_size is -8; expected a size"):
        read(hidden_size=-8)


def test_update_touches_only_what_changed() -> None:
    config = {"n_embed": 8, "act": "gelu_fast", "note": "x"}
    known = {**MAP.read(config, where="here"), "n_heads": 2}
    assert MAP.update(config, known, known) == config
    assert MAP.update(config, known, {**known, "d_model": 16}) == {"hidden_size": 16, "act": "gelu_fast", "note": "x"}
    assert MAP.update(config, known, {**known, "act_fn": "relu"})["act"] == "relu"


@pytest.mark.parametrize("name", _ACTIVATIONS)
def test_activations_compute_what_transformers_computes(name) -> None:
    from transformers.activations import ACT2FN

    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
        "silu": lambda x: x * torch.sigmoid(x),
    }
    x = torch.linspace(-6, 6, 201, dtype=torch.float64)
    ours, theirs = functions[_ACTIVATIONS[name]](x), ACT2FN[name](x)
    # gelu_fast rounds sqrt(2 / pi) to ten digits; all others agree to the last bits of float64.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
