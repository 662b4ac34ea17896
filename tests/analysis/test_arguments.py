"""Anything at all as an argument of the package's functions: a right result, or an error of the library's own.

`logit_lens(model, "text")`, and numpy numbers, arrays and lists as tokens, positions and counts, ended in errors of
torch, pandas or Python, or were cast.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hooklens import analysis
from hooklens.analysis import attribution, circuits, copying, heads, lens, sanity, sources, targets
from hooklens.errors import HookLensError, InputError
from tests.annotations import unchecked
from tests.word_models import make_word_model

TOKENS = torch.tensor([[5, 7, 9, 5, 7], [9, 5, 9, 5, 3]])


@pytest.fixture(scope="module")
def model():
    return make_word_model(d_model=8, n_ctx=16, init_std=0.2)


@pytest.fixture(scope="module")
def cache(model):
    return model.run_with_cache(TOKENS)[1]


@pytest.fixture(scope="module")
def odd(model, cache):
    """Values of every kind; some are right for some arguments."""
    return [
        None, True, False, 0, 1, -1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), 1 + 2j,
        "", "x", "text", " red", "induction", "mul", "in", b"x", [], [[]], [1], [0.5], [1, 2], ["x"], [None], (1,), (),
        {}, {"a": 1}, {1}, slice(None), slice(0, 0), slice(-2, None), range(2), object(), int, lambda *given: None,
        np.int64(1), np.float32(0.5), np.bool_(True), np.array(1), np.array([1, 2]), np.array([[0.5]]), np.array(["a"]),
        np.array([1, 2], dtype=np.uint16), torch.tensor(1), torch.tensor(True), torch.tensor([1, 2]), torch.zeros(0),
        torch.zeros(0, dtype=torch.int64), torch.zeros(5, 5), torch.ones(5, 5).bool().tril(), torch.zeros(2, 5, 8),
        torch.full((5, 5), float("nan")), TOKENS, TOKENS.to("meta"), TOKENS.to_sparse(), TOKENS.to(torch.uint16),
        torch.zeros(1, 3, dtype=torch.complex64), torch.float64, torch.device("cpu"), model.tokenizer, model.cfg, model,
        cache, cache.apply_slice_to_batch_dim(0), Path("no"),
        [SimpleNamespace(prompt="a", answer="b", wrong=3)], iter([]),
    ]  # fmt: skip


FUNCTIONS = {
    analysis.connect_cache: {},
    analysis.report: {"prompt": [5, 7, 9]},
    attribution.attribute_to_components: {"tokens": 3},
    attribution.attribute_to_heads: {"tokens": 3},
    attribution.attribute_to_neurons: {"tokens": 3},
    sources.attribute_to_sources: {"tokens": 3},
    lens.logit_lens: {"k": 2},
    lens.read_streams: {},
    lens.lens_losses: {"data": TOKENS, "progress": False},
    lens.TunedLens.fit: {"data": TOKENS, "steps": 1, "progress": False},
    lens.JacobianLens.fit: {"data": TOKENS, "skip_first": 0, "progress": False},
    circuits.read_ov_directions: {"layer": 0, "head": 0, "n_directions": 1, "k": 1},
    circuits.read_mlp_directions: {"layer": 0, "n_directions": 1, "k": 1},
    circuits.top_ov_pairs: {"layer": 0, "head": 0, "k": 1},
    circuits.top_qk_pairs: {"layer": 0, "head": 0, "k": 1},
    circuits.neuron_tokens: {"layer": 0, "neurons": 0, "k": 1},
    copying.copying_scores: {},
    targets.previous_token_target: {"tokens": TOKENS},
    targets.duplicate_token_target: {"tokens": TOKENS},
    targets.induction_target: {"tokens": TOKENS},
    heads.repeated_random_tokens: {"n_rows": 1, "period": 3},
    heads.score_heads: {"input": TOKENS, "target": torch.ones(5, 5).bool().tril()},
    heads.detect_heads: {"input": TOKENS, "target": "previous_token"},
    heads.head_scores: {"input": TOKENS},
    sanity.corpus_loss: {"texts": ["Mary left ."]},
    sanity.induction_loss: {"n_rows": 1, "period": 3},
    sanity.indirect_object_task: {"n_prompts": 1},
}
ARGUMENTS = [
    (function, name)
    for function in FUNCTIONS
    for name in inspect.signature(function).parameters
    # A number of steps is right however large.
    if name != "steps"
]


def test_every_public_function_is_tried():
    modules = (attribution, circuits, copying, heads, lens, sanity, sources, targets)
    public = {
        one
        for module in modules
        for name, one in vars(module).items()
        if inspect.isfunction(one)
        and f"{one.__module__}.".startswith(f"{module.__name__}.")
        and not name.startswith("_")
    }
    # A step that the attributions have in common.
    public -= {attribution.prepare_attribution}
    assert public == set(FUNCTIONS) - {
        analysis.connect_cache,
        analysis.report,
        lens.TunedLens.fit,
        lens.JacobianLens.fit,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "argument"), ARGUMENTS, ids=lambda part: getattr(part, "__name__", part))
def test_anything_is_taken_or_refused_by_the_library(model, cache, odd, function, argument):
    parameters = inspect.signature(function).parameters
    needed = {"model": model, "cache": cache}
    needed = {name: value for name, value in needed.items() if name in parameters} | FUNCTIONS[function]
    raw, refused = [], 0
    for value in odd:
        try:
            with unchecked():
                found = function(**{**needed, argument: value})
                if inspect.isgenerator(found):
                    list(found)
        except HookLensError:
            refused += 1
        except Exception as error:
            raw.append((value, error))
    assert not raw, "\n".join(f"{value!r:.60}: {type(error).__name__}: {error!s:.200}" for value, error in raw)
    assert refused > len(odd) // 3


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_first_argument_that_is_alone_is_read(function):
    """Readers looked at nothing but what follows the first argument, which is a method's own object."""
    with unchecked(), pytest.raises((InputError, TypeError), match=r"is 3, expected|missing"):
        function(3)


def test_numbers_in_any_form(model, cache):
    expected = attribution.attribute_to_heads(model, cache, torch.tensor([3, 8]), torch.tensor([1, 2]), pos=1)
    for answers, wrong in (
        ([3, 8], (1, 2)),
        (np.array([3, 8]), np.array([1, 2], dtype=np.uint16)),
        ([np.int64(3), torch.tensor(8)], torch.tensor([1, 2], dtype=torch.uint8)),
        ([model.to_single_str_token(3), 8], [1, model.to_single_str_token(2)]),
    ):
        with unchecked():
            found = attribution.attribute_to_heads(model, cache, answers, wrong, pos=np.int64(1))
        assert found.equals(expected)
    expected = lens.logit_lens(model, cache, pos_slice=[1, -1], k=2, target=3)
    with unchecked():
        for positions in (np.array([1, -1]), torch.tensor([1, -1]), (1, -1), [np.int64(1), torch.tensor(-1)]):
            assert lens.logit_lens(model, cache, pos_slice=positions, k=np.int64(2), target=np.int64(3)).equals(
                expected
            )
    neurons = attribution.attribute_to_neurons(model, cache, 3, k=2)
    with unchecked():
        assert attribution.attribute_to_neurons(model, cache, np.int64(3), k=np.int64(2)).equals(neurons)


def test_what_the_refusals_say(model, cache):
    for call, text in (
        (
            lambda: lens.logit_lens(model, 3.5),
            "cache is a float; expected text, .*; or give an ActivationCache: _, cache = model.run_with_cache",
        ),
        (
            lambda: lens.logit_lens(cache, model),
            "model is an ActivationCache, expected a .*; cache is a HookedCausalLM",
        ),
        (lambda: lens.logit_lens(model, cache, k="5"), "k is '5', expected a whole number >= 1"),
        (lambda: attribution.attribute_to_heads(model, cache, 0.5), "tokens is 0.5, expected token ids from 0 to"),
        (lambda: attribution.attribute_to_heads(model, cache, [0.5]), r"tokens holds \[0.5\]; expected token ids"),
        (lambda: attribution.attribute_to_heads(model, cache, 3, pos=[1]), r"pos is \[1\], expected a whole number"),
        (lambda: sanity.corpus_loss(model, [3]), r"texts is \[3\], expected a list of texts"),
        (
            lambda: sanity.indirect_object_task(model, [3]),
            r"items: entries \[0\] are no prompts; expected objects with",
        ),
        (lambda: heads.detect_heads(model, TOKENS, 3), "target is 3, expected 'previous_token', .*, or a tensor"),
    ):
        with unchecked(), pytest.raises(InputError, match=text):
            call()
