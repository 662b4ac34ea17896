"""Anything at all as an argument of the model's methods: a right result, or an error of the library's own.

A torch or Python error from inside says nothing about the argument that was wrong.
"""

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.errors import HookLensError, HookNameError, InputError
from tests.annotations import unchecked
from tests.torch_version import FOUR_BITS
from tests.word_models import make_word_model

IDS = [[5, 7, 9]]


@pytest.fixture(scope="module")
def model() -> HookedCausalLM:
    return make_word_model(d_model=8, n_ctx=16, init_std=0.2)


@pytest.fixture(scope="module")
def mute(model) -> HookedCausalLM:
    """The same network without a tokenizer."""
    return HookedCausalLM.from_state_dict(model.state_dict(), model.cfg)


@pytest.fixture(scope="module")
def odd(model, tmp_path_factory):
    """Values of every kind; some are right for some arguments."""
    ids = torch.tensor(IDS)
    return [
        None, True, False, 0, 1, -1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), 1 + 2j,
        "", "x", "left", "loss", "cuda:99", "a\0b", b"x", [], [[]], [1], [0.5], [[1], [2, 3]], ["x"], [None], (1,), (),
        {}, {"a": 1}, {1}, slice(None), slice(0, 0), range(2), object(), int, lambda *given, **more: None,
        [("hook_z", 3)], [("z", lambda tensor, hook: None)], [edits.Zero("z")], edits.Zero("z"), ["z"], "resid_pre",
        np.int64(1), np.float32(0.5), np.bool_(True), np.array(1), np.array([1, 2]), np.array([[0.5]]), np.array(["a"]),
        torch.tensor(1), torch.tensor(True), torch.tensor([1, 2]), torch.tensor([1, 1, 1]), torch.zeros(0),
        torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 3, 8), torch.zeros(0, 3, 8),
        torch.zeros(1, 3, dtype=torch.complex64), ids.bool(), ids.to(torch.uint8), ids.to(torch.int16),
        ids.to(torch.int32), ids.to(torch.uint16), torch.full((1, 3), 10**9), torch.zeros(1, 3, 8, device="meta"),
        ids.to("meta"), ids.to_sparse(), torch.float64, torch.int64, *FOUR_BITS, torch.device("cpu"),
        torch.device("meta"), model.tokenizer, type(model.tokenizer), model.cfg, model.prefill(ids),
        model.run_with_cache(ids)[1], Path("no", "such"), tmp_path_factory.mktemp("odd"),
    ]  # fmt: skip


def stream(model, *given, **keywords):
    return list(model.generate_stream(*given, **{"max_new_tokens": 2, **keywords}))


def entered(method):
    """A method that gives a context manager, entered and left."""

    def call(model, *given, **keywords):
        with getattr(model, method)(*given, **keywords):
            model(torch.tensor(IDS))

    return call


def undone(method):
    """A method that attaches something, which is removed."""

    def call(model, *given, **keywords):
        handle = getattr(model, method)(*given, **keywords)
        try:
            model(torch.tensor(IDS))
        finally:
            handle.remove()

    return call


CALLING = [name for name in inspect.signature(HookedCausalLM.forward).parameters if name not in ("self", "input")]
LISTENING = ["fwd_hooks", "bwd_hooks", "edits"]
GENERATING = [
    name for name in inspect.signature(HookedCausalLM.generate_stream).parameters if name not in ("self", "input")
]
TOKENS = torch.tensor(IDS)

# For each method: how it is called, what it needs, and the arguments to put odd values in.
METHODS = {
    "forward": (lambda model, **given: model(**given), {"input": TOKENS}, ["input", *CALLING]),
    "loss": (lambda model, **given: model(return_type="loss", **given), {"input": TOKENS}, ["input", "loss_per_token"]),
    "from a layer": (lambda model, **given: model(start_at_layer=1, **given), {"input": torch.zeros(1, 3, 8)},
                     ["input", "attention_mask", "positions", "past_kv_cache", "stop_at_layer"]),
    "run_with_cache": (None, {"input": TOKENS}, ["input", "names_filter", "device", "dtype", "remove_batch_dim",
                                                 "incl_bwd", "pos_slice", *LISTENING, *CALLING]),
    "run_with_hooks": (None, {"input": TOKENS}, ["input", *LISTENING, *CALLING]),
    "prefill": (None, {"prefix": TOKENS}, ["prefix", *CALLING]),
    "generate": (None, {"input": TOKENS, "max_new_tokens": 2, "verbose": False},
                 ["input", *GENERATING, "streamer", "names_filter", "return_type", "verbose"]),
    "generate_stream": (stream, {"input": TOKENS}, ["input", *GENERATING]),
    "add_hook": (undone("add_hook"), {"name": "z", "fn": lambda tensor, hook: None},
                 ["name", "fn", "dir", "prepend", "is_permanent"]),
    "add_edit": (undone("add_edit"), {"edit": edits.Zero("z")}, ["edit", "is_permanent"]),
    "hooks": (entered("hooks"), {}, LISTENING),
    "capture": (entered("capture"), {}, ["names_filter", "device", "dtype", "pos_slice", "incl_bwd"]),
    "reset_hooks": (None, {}, ["dir", "including_permanent", "clear_contexts"]),
    "list_hooks": (None, {}, ["names_filter"]),
    "process_weights": (None, {}, ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases",
                                   "refactor_factored_attn_matrices"]),
    "input_to_embed": (None, {"input": TOKENS},
                       ["input", "prepend_bos", "padding_side", "attention_mask", "positions", "past_kv_cache"]),
    "set_tokenizer": (lambda model, **given: copy.copy(model).set_tokenizer(**given), {"tokenizer": None},
                      ["tokenizer"]),
    "to_tokens": (None, {"text": "the"}, ["text", "prepend_bos", "padding_side", "truncate", "return_attention_mask"]),
    "to_string": (None, {}, ["tokens"]),
    "to_str_tokens": (None, {"input": "the"}, ["input", "prepend_bos"]),
    "to_single_token": (None, {}, ["text"]),
    "to_single_str_token": (None, {}, ["token"]),
    "get_token_position": (None, {"token": 7, "input": TOKENS}, ["token", "input", "mode", "prepend_bos"]),
    "tokens_to_residual_directions": (None, {}, ["tokens"]),
    "accumulated_bias": (None, {"layer": 1}, ["layer", "mlp_input", "include_mlp_biases"]),
    "all_composition_scores": (None, {}, ["mode"]),
    "initialize": (lambda model, **given: make_word_model(d_model=8, n_ctx=4, init_std=0.1).initialize(**given), {},
                   ["seed", "scheme"]),
    "from_pretrained": (None, {"source": "bundled:tiny-llama", "local_files_only": True},
                        ["source", "revision", "dtype", "device", "layers", "tokenizer", "cache_dir",
                         "local_files_only"]),
    "from_hf": (None, {}, ["hf_model"]),
    "from_state_dict": (lambda model, **given: model.from_state_dict(**{"state": model.state_dict(), "cfg": model.cfg,
                                                                        **given}), {}, ["state", "cfg", "tokenizer"]),
    "from_xlstm": (None, {"params": {}, "config": {"vocab_size": 9, "embedding_dim": 4, "num_blocks": 1}},
                   ["params", "config", "n_ctx", "dtype", "device", "tokenizer"]),
    "model": (lambda model, **given: type(model)(**{"cfg": model.cfg, **given}), {}, ["cfg", "tokenizer"]),
}  # fmt: skip

CALLED = {"names_filter", "name", "fn"}
"""What an odd value that can be called is called by: its own errors are the caller's."""

SLOW = {"from_pretrained", "process_weights", "from_state_dict", "model", "initialize"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_tokenizer", [True, False], ids=["text", "no text"])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, _, taken) in METHODS.items() for argument in taken]
)
def test_anything_is_taken_or_refused_by_the_library(model, mute, odd, name, argument, has_tokenizer):
    if not has_tokenizer and name in SLOW:
        return
    call, needed, _ = METHODS[name]
    subject = model if has_tokenizer else mute
    call = getattr(subject, name) if call is None else lambda **given: METHODS[name][0](subject, **given)
    raw, refused = [], 0
    for value in odd:
        if argument in CALLED and value is model.tokenizer:
            continue
        try:
            with unchecked():
                call(**{**needed, argument: value})
        except HookLensError:
            refused += 1
        except Exception as error:
            raw.append((value, error))
    assert not raw, "\n".join(f"{value!r:.60}: {type(error).__name__}: {error!s:.200}" for value, error in raw)
    assert refused > len(odd) // 3


# Odd values inside of lists: how to wrap one for an argument.
WRAPPED = {
    "forward": {"input": lambda one: [one], "logits_at": lambda one: [one], "attention_mask": lambda one: [[one] * 3]},
    "run_with_cache": {
        "names_filter": lambda one: [one],
        "pos_slice": lambda one: [one, 2],
        "fwd_hooks": lambda one: [(one, lambda tensor, hook: None)],
        "bwd_hooks": lambda one: [("z", one)],
        "edits": lambda one: [edits.Zero("z"), one],
    },
    "run_with_hooks": {"input": lambda one: [[one, 3]], "fwd_hooks": lambda one: [("z", one)]},
    "generate": {
        "input": lambda one: [one, one],
        "eos_token_id": lambda one: [one],
        "stop_strings": lambda one: ["the", one],
        "names_filter": lambda one: (one, 0),
    },
    "to_string": {"tokens": lambda one: [one]},
    "to_tokens": {"text": lambda one: ["the", one]},
    "tokens_to_residual_directions": {"tokens": lambda one: [one]},
    "from_pretrained": {"layers": lambda one: [one]},
    "from_state_dict": {"state": lambda one: {"embed.W_E": one}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), [(name, one) for name, wrapped in WRAPPED.items() for one in wrapped])
def test_anything_in_a_list_is_taken_or_refused_by_the_library(model, odd, name, argument):
    call, needed, _ = METHODS[name]
    call = getattr(model, name) if call is None else lambda **given: METHODS[name][0](model, **given)
    raw = []
    for value in odd:
        # A hook that is a tokenizer has errors of its own.
        if value is model.tokenizer:
            continue
        try:
            with unchecked():
                call(**{**needed, argument: WRAPPED[name][argument](value)})
        except HookLensError:
            continue
        except Exception as error:
            raw.append((value, error))
    assert not raw, "\n".join(f"{value!r:.60}: {type(error).__name__}: {error!s:.200}" for value, error in raw)


@pytest.mark.filterwarnings("ignore")
def test_folders_to_save_into(model, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument in ("folder", "dtype", "max_shard_size"):
        for value in odd:
            with unchecked():
                try:
                    model.save_pretrained(**{"folder": tmp_path / "saved", argument: value})
                except HookLensError:
                    continue


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_ids_of_any_integer_dtype(model, dtype):
    """Ids of 8, 16 or 32 bits were a torch error with return_type="loss"."""
    ids = torch.tensor([[5, 7, 9], [3, 2, 4]])
    given = ids.to(dtype)
    for keywords in ({}, {"return_type": "loss"}, {"return_type": "loss", "loss_per_token": True}):
        assert torch.equal(model(given, **keywords), model(ids, **keywords))
    assert torch.equal(model.run_with_cache(given)[1]["z", 1], model.run_with_cache(ids)[1]["z", 1])
    options = {"max_new_tokens": 2, "do_sample": False, "verbose": False}
    assert torch.equal(model.generate(given, **options), model.generate(ids, **options))
    cache = model.prefill(given)
    assert torch.equal(model(given, past_kv_cache=cache), model(ids, past_kv_cache=model.prefill(ids)))
    positions = torch.tensor([2, 3, 4])
    assert torch.equal(model(ids, positions=positions.to(dtype)), model(ids, positions=positions))
    assert torch.equal(model.tokens_to_residual_directions(given), model.tokens_to_residual_directions(ids))


@pytest.mark.parametrize(
    "given",
    [
        np.array(IDS),
        np.array(IDS, dtype=np.uint8),
        IDS,
        [np.array(IDS[0])],
        [[np.int64(one) for one in IDS[0]]],
        [[torch.tensor(one) for one in IDS[0]]],
        [torch.tensor(IDS[0])],
    ],
    ids=str,
)
def test_ids_in_any_form(model, given):
    assert torch.equal(model(given), model(TOKENS))
    assert model(given, return_type="loss") == model(TOKENS, return_type="loss")


def test_numpys_numbers_and_switches_are_pythons(model):
    with unchecked():
        assert torch.equal(
            model(TOKENS, return_type="loss", loss_per_token=np.bool_(True)),
            model(TOKENS, return_type="loss", loss_per_token=True),
        )
        stream = model(TOKENS, stop_at_layer=np.int64(1))
        assert torch.equal(stream, model(TOKENS, stop_at_layer=1))
        assert torch.equal(model(stream, start_at_layer=np.int64(1)), model(stream, start_at_layer=1))
        drawn = [
            model.generate(TOKENS, max_new_tokens=count, temperature=warmth, seed=count, verbose=False)
            for count, warmth in ((3, 2.0), (np.int64(3), np.float32(2)))
        ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["float64", "torch.float64", torch.float64])
def test_a_dtype_by_name(model, name):
    loaded = HookedCausalLM.from_pretrained("bundled:tiny-llama", dtype=name)
    assert loaded.dtype == torch.float64
    with unchecked():
        _, cache = model.run_with_cache(TOKENS, names_filter="z", dtype=name)
    assert cache["z", 0].dtype == torch.float64


@pytest.mark.parametrize("count", [10**9, 2**31 - 1, 2**31, 10**30])
def test_more_rows_than_any_machine_holds(model, count):
    """They were begun, and ended the process."""
    with pytest.raises(InputError, match=r"num_return_sequences(=| is )\d+.*(bytes at one time|below 2\*\*31)"):
        model.generate(TOKENS, num_return_sequences=count, verbose=False)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda model: model(TOKENS, return_type="los"), "return_type is 'los', expected 'logits', 'loss', 'both' or"),
        (lambda model: model(TOKENS, loss_per_token="no"), "loss_per_token is 'no', expected True or False"),
        (
            lambda model: model(TOKENS, positions=3, prepend_bos="no"),
            r"positions is 3, expected a tensor \[pos\] or \[batch pos\] .* or None; prepend_bos is 'no', expected",
        ),
        (lambda model: model(TOKENS, past_kv_cache=[]), r"past_kv_cache is \[\], expected a HookedKeyValueCache"),
        (lambda model: model.run_with_cache(TOKENS, device="nope"), "device is 'nope', which cannot be used: "),
        (lambda model: model.run_with_cache(TOKENS, dtype=int), "dtype is the class int, expected a floating dtype"),
        (
            lambda model: model.run_with_hooks(TOKENS, fwd_hooks=[("z", print), ("z", 3)]),
            r"fwd_hooks: entry 1 is \('z', 3\), expected pairs \(name or filter, function\)",
        ),
        (lambda model: model.run_with_hooks(TOKENS, fwd_hooks=iter([])), "fwd_hooks is a list_iterator, expec"),
        (lambda model: model.hooks(edits=edits.Zero("z")), r"edits is a Zero, expected .*, \[edit\] for a single"),
        (lambda model: model.hooks(edits=["z", 3]), "edits: entry 0 is 'z', entry 1 is 3, expected values from hook"),
        (lambda model: model.add_hook("z", print, dir="back"), "dir is 'back', expected 'fwd' or 'bwd'"),
        (lambda model: model.reset_hooks(dir="back"), "dir is 'back', expected 'fwd', 'bwd' or 'both'"),
        (lambda model: model.generate(TOKENS, streamer=print), "streamer is a builtin_function_or_method, expected"),
        (lambda model: model.save_pretrained(""), "folder is '', expected a path, as text or a pathlib.Path"),
        (lambda model: model.process_weights(fold_ln="no"), "fold_ln is 'no', expected True or False"),
        (lambda model: type(model)(3), "cfg is 3, expected a HookedConfig"),
        (lambda model: type(model)(model.cfg, "gpt"), "tokenizer is 'gpt', expected a transformers tokenizer"),
        (lambda model: model.from_state_dict({"a": 1}, model.cfg), "state holds 'a': 1, expected tensors by name"),
        (lambda model: model(TOKENS.to("meta")), "token ids lie on the device 'meta', where tensors have no values"),
    ],
)  # fmt: skip
def test_what_the_refusals_say(model, call, text):
    with unchecked(), pytest.raises(InputError, match=text):
        call(model)


def test_filters_that_choose_nothing_by_mistake(model):
    for given, text in [
        (3, r"hook points are chosen by 3; expected a name, a glob"),
        ((1,), r"\(1,\) is no hook point; expected \(name, layer\)"),
        (lambda name: torch.zeros(2), r"the predicate answered a tensor \[2\] of torch.float32 for 'hook_tokens'"),
    ]:
        with unchecked(), pytest.raises(HookNameError, match=text):
            model.run_with_cache(TOKENS, names_filter=given)


@pytest.mark.parametrize("name", ["forward", "run_with_cache", "run_with_hooks", "prefill", "generate", "capture"])
def test_a_keyword_that_is_not_there_is_a_type_error_that_names_the_nearest(model, name):
    call, needed, arguments = METHODS[name]
    call = getattr(model, name) if call is None else lambda **given: METHODS[name][0](model, **given)
    with pytest.raises(TypeError, match=rf"unexpected keyword.*Did you mean '{arguments[-1]}"):
        getattr(model, name)(**needed, **{arguments[-1] + "_": None})
