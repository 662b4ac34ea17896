"""Arguments of wrong kinds: only results, or the package's own errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.activation_cache import ActivationCache, MissingActivationError
from hooklens.activation_cache.arguments import choose
from hooklens.errors import CacheError, HookLensError
from tests.activation_cache.captures import CFG, make_cache
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens


@pytest.fixture(scope="module")
def cache():
    return make_model("learned, tied").run_with_cache(random_tokens(2, 5))[1]


ODD = [
    None, True, False, 0, 1, -1, 10**30, 0.5, float("nan"), 1j, "", "no", "1", b"1", [], [0], [0, 0], [True], [None],
    [[0]], ["a"], (), (0,), (0, 1), {0}, {}, {"a": 1}, object(), int, slice(None), slice(1), slice(0.5), slice("a"),
    slice(0, 5, 0), range(2), np.int64(1), np.bool_(True), np.float64(1.0), np.array([0, 1]), np.array([0.5]),
    np.array("a"), np.zeros((2, 2), dtype=int), torch.tensor(1), torch.tensor(True), torch.tensor(0.5),
    torch.tensor([1, 0]), torch.tensor([True, False]), torch.zeros(0), torch.zeros(12), torch.zeros(12, 2),
    torch.zeros(12).long(), torch.zeros(12, dtype=torch.complex64), torch.zeros(2, 5, 12), torch.zeros(3, 2, 5, 12),
    torch.float32, torch.device("cpu"),
]  # fmt: skip

METHODS = {
    "accumulated_resid": ("layer", "incl_mid", "apply_ln", "pos_slice", "mlp_input", "return_labels"),
    "decompose_resid": ("layer", "mlp_input", "mode", "apply_ln", "pos_slice", "incl_embeds", "return_labels"),
    "stack_activation": ("activation_name", "layer", "sublayer_type"),
    "stack_head_results": (
        "layer", "return_labels", "incl_remainder", "pos_slice", "apply_ln", "project_output_onto",
    ),
    "stack_neuron_results": (
        "layer", "pos_slice", "neuron_slice", "return_labels", "incl_remainder", "apply_ln", "project_output_onto",
    ),
    "get_full_resid_decomposition": (
        "layer", "mlp_input", "expand_neurons", "apply_ln", "pos_slice", "return_labels", "project_output_onto",
    ),
    "apply_ln_to_stack": (
        "residual_stack", "layer", "mlp_input", "pos_slice", "batch_slice", "has_batch_dim", "whole_streams",
    ),
    "logit_attrs": ("residual_stack", "tokens", "incorrect_tokens", "pos_slice", "batch_slice", "has_batch_dim"),
    "logit_attr_bias": ("tokens", "incorrect_tokens"),
    "apply_slice_to_batch_dim": ("rows",),
    "unpad": ("row",),
    "to": ("device", "dtype"),
    "with_weights": ("weights",),
    "axes_of": ("name",),
}  # fmt: skip
REQUIRED = {
    "residual_stack": torch.zeros(3, 2, 5, 12).double(), "tokens": 3, "activation_name": "resid_pre",
    "rows": 0, "row": 0, "weights": {}, "name": "hook_embed",
}  # fmt: skip
FLAGS = {
    "incl_mid", "apply_ln", "mlp_input", "return_labels", "incl_embeds", "incl_remainder", "expand_neurons",
    "has_batch_dim", "whole_streams",
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "argument"), [(method, argument) for method, arguments in METHODS.items() for argument in arguments]
)
def test_odd_arguments_give_a_result_or_an_own_error(cache, method, argument):
    required = {name: REQUIRED[name] for name in METHODS[method] if name in REQUIRED}
    for value in ODD:
        try:
            with unchecked():
                getattr(cache, method)(**{**required, argument: value})
        except HookLensError:
            continue
        assert argument not in FLAGS or isinstance(value, bool | np.bool_), value


@pytest.mark.parametrize("method", METHODS)
def test_unknown_keywords_are_type_errors(cache, method):
    required = {name: REQUIRED[name] for name in METHODS[method] if name in REQUIRED}
    with pytest.raises(TypeError, match="unexpected keyword"):
        getattr(cache, method)(**required, no_such_argument=1)


@pytest.mark.parametrize("arguments", [{"tensors": value} for value in ODD] + [{"tokens": value} for value in ODD])
def test_odd_contents_are_refused_or_held(arguments):
    try:
        with unchecked():
            held = ActivationCache(**{"tensors": {}, "cfg": CFG, **arguments})
    except CacheError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in held.values())


_odd = st.sampled_from(ODD) | st.none() | st.integers() | st.floats() | st.text(max_size=5)
_names = st.sampled_from(["k", "attn_out", "scale", "embed", "resid_pre", "k1", "pattern_grad", "hook_embed", "_grad"])
_keys = _odd | _names | st.tuples(_names | _odd, _odd) | st.tuples(_names | _odd, _odd, _odd | st.just("ln1"))


HELD = make_cache()


@settings(max_examples=300)
@given(key=_keys | st.lists(_odd, max_size=4).map(tuple))
def test_keys_give_an_activation_or_are_missing(key):
    text = ""
    try:
        with unchecked():
            found = HELD[key]
            assert found is HELD[next(name for name, tensor in HELD.items() if tensor is found)]
    except MissingActivationError as error:
        text = str(error)
    assert "{i}" not in text
    with unchecked():
        assert (key in HELD) is (not text)


def test_keys_take_layers_as_numbers_of_any_library_and_text():
    held = make_cache()
    for layer in ("1", np.int64(1), torch.tensor(1), "-2"):
        assert held["resid_pre", layer] is held["resid_pre", 1]
        assert held["scale", layer, "ln1"] is held["scale", 1, "ln1"]


def test_a_wrong_module_is_answered_with_hook_names():
    """The text named a template, `'{i}'`, as the module to give."""
    with pytest.raises(
        MissingActivationError, match=r"'attn_out' sits in no module.*Full names: 'blocks.1.hook_attn_out'"
    ):
        make_cache()["attn_out", 1, "b"]
    with pytest.raises(MissingActivationError, match=r"got 'b'. Full names: .*'blocks.2.ln1.hook_scale'"):
        make_cache()["scale", -1, "b"]


@pytest.mark.parametrize("layer", [np.int64(1), torch.tensor(1), np.array(1)])
def test_layers_of_decompositions_by_numpy_and_torch_integers(cache, layer):
    for method in ("accumulated_resid", "decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
        assert getattr(cache, method)(layer).equal(getattr(cache, method)(1))
    stack = cache.decompose_resid(pos_slice=np.array([3, 1]))
    assert stack.equal(cache.decompose_resid()[:, :, [3, 1]])
    assert cache.decompose_resid(pos_slice=layer).equal(cache.decompose_resid()[:, :, 1])


@pytest.mark.parametrize("layer", [True, 1.0, "1", [1], slice(1), torch.tensor(True), np.float64(1)])
def test_layers_that_are_no_number(cache, layer):
    """True was layer 1 and 1.0 went as far as a TypeError."""
    with unchecked(), pytest.raises(CacheError, match=r"layer is .*, expected a whole number"):
        cache.decompose_resid(layer)


def test_flags_that_are_neither(cache):
    """Any text, "no" too, counted as True."""
    with unchecked(), pytest.raises(CacheError, match=r"^apply_ln is 'no', expected True or False$"):
        cache.decompose_resid(apply_ln="no")
    with (
        unchecked(),
        pytest.raises(CacheError, match=r"^apply_ln is 1, expected True or False; incl_mid is None, expected True or"),
    ):
        cache.accumulated_resid(apply_ln=1, mlp_input=True, incl_mid=None)


def test_choices_say_whether_they_are_single():
    assert choose(-1, 3, what="x", noun="things") == ([2], True)
    assert choose([-1], 3, what="x", noun="things") == ([2], False)
    assert choose(None, 2, what="x", noun="things") == ([0, 1], False)
    with pytest.raises(CacheError, match=r"x=slice\(3, None, None\) chooses none of the 3 things"):
        choose(slice(3, None), 3, what="x", noun="things")


def test_another_device_than_there_is():
    with pytest.raises(CacheError, match=r"device is 'no-such-device' \(.*\); expected a device that is here"):
        make_cache().to("no-such-device")
    with unchecked(), pytest.raises(CacheError, match=r"device is torch.float16 .*a dtype is given by name"):
        make_cache().to(torch.float16)
