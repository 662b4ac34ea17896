"""What a model says of its text: whether it begins with a BOS, and which tokenizer reads it."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hooklens
from hooklens import HookedCausalLM
from hooklens.analysis.sanity import corpus_loss
from hooklens.errors import InputError
from hooklens.evaluation import multiple_choice, score_continuations, score_file
from hooklens.patching import Pair
from hooklens.patching.pairs.prompts import read_prompts
from hooklens.pool.comparing.prompts import ComparedPrompts
from hooklens.weights import merging
from tests.annotations import unchecked
from tests.word_models import make_word_model

TEXT, SHORT = "Mary went to the store", "John went"
BOTH = [TEXT, SHORT]


def without_bos_of_its_own(tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer where it puts nothing in front of a text, as those of GPT-2 and GPT-NeoX."""
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = None
    plain.add_bos_token = False
    return plain


@pytest.fixture(params=["the tokenizer adds it", "the tokenizer does not"])
def model(request):
    made = make_word_model(d_model=16, n_ctx=32, init_std=0.4)
    if request.param == "the tokenizer does not":
        made.set_tokenizer(without_bos_of_its_own(made.tokenizer))
        assert made.to_tokens(TEXT).shape[1] == len(TEXT.split())
    else:
        assert made.to_tokens(TEXT).shape[1] == len(TEXT.split()) + 1
    return made


GENERATE = {"max_new_tokens": 3, "do_sample": False}
ITEM = {"question": TEXT, "choices": [" and", " with John"]}
# Every way in which text that begins a sequence becomes tokens and a caller can say `prepend_bos`.
ROUTES = {
    "to_tokens": lambda model, **say: model.to_tokens(BOTH, **say),
    "to_str_tokens": lambda model, **say: model.to_str_tokens(BOTH, **say),
    "get_token_position": lambda model, **say: model.get_token_position(" to", TEXT, **say),
    "call": lambda model, **say: model(BOTH, **say),
    "loss": lambda model, **say: model(TEXT, return_type="loss", **say),
    "run_with_cache": lambda model, **say: model.run_with_cache(TEXT, **say)[1]["resid_post", 0],
    "run_with_hooks": lambda model, **say: model.run_with_hooks(TEXT, **say),
    "prefill": lambda model, **say: model.prefill(TEXT, **say).last_logits,
    "input_to_embed": lambda model, **say: model.input_to_embed(BOTH, **say).stream,
    "generate": lambda model, **say: model.generate(BOTH, return_type="tokens", verbose=False, **GENERATE, **say),
    "generate_stream": lambda model, **say: [step.logprobs for step in model.generate_stream(TEXT, **GENERATE, **say)],
    "score_continuations": lambda model, **say: score_continuations(
        model, TEXT, [" and", " with John"], progress=False, **say
    ).logprob.tolist(),
    "multiple_choice": lambda model, **say: multiple_choice(model, [ITEM], progress=False, **say).to_json(),
    "multiple_choice behind a prefix": lambda model, **say: multiple_choice(
        model, [{**ITEM, "question": " and"}], prefix=TEXT, progress=False, **say
    ).to_json(),
    "corpus_loss": lambda model, **say: corpus_loss(model, BOTH, **say).loss,
}
# Those in which the tokenizer's rule was the only one.
UNSAID = {
    "patching's prompts": lambda model: read_prompts(model, BOTH, None),
    "a pair of texts": lambda model: Pair.from_text(model, TEXT, TEXT.replace("Mary", "John")).clean,
    "compared prompts": lambda model: list(
        ComparedPrompts.read("one", model, BOTH, pos=slice(None), attention_mask=None).rows
    ),
}


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list) and one and isinstance(one[0], torch.Tensor):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return one == other


@pytest.mark.parametrize("route", ROUTES)
def test_a_default_is_what_a_caller_who_says_nothing_says(model, route):
    run = ROUTES[route]
    unsaid, said = run(model), {rule: run(model, prepend_bos=rule) for rule in (True, False)}
    assert not equal(said[True], said[False])
    for default in (True, False):
        model.default_prepend_bos = default
        assert equal(run(model), said[default])
        # A caller's word counts more.
        assert equal(run(model, prepend_bos=not default), said[not default])
    model.default_prepend_bos = None
    assert equal(run(model), unsaid)


@pytest.mark.parametrize("route", UNSAID)
def test_the_default_holds_where_no_argument_says_it(model, route):
    for default in (True, False):
        model.default_prepend_bos = default
        found = UNSAID[route](model)
        rows = [found] if isinstance(found, torch.Tensor) else found
        texts = [TEXT] if len(rows) == 1 else BOTH
        for row, text in zip(rows, texts, strict=True):
            assert torch.equal(row.flatten(), model.to_tokens(text, prepend_bos=default)[0])


def test_every_public_function_that_takes_the_argument_is_a_route():
    """A new one would be forgotten by the default."""
    modules = [hooklens.HookedCausalLM, hooklens.evaluation, hooklens.analysis]
    takes = set()
    for module in modules:
        for name, value in vars(module).items() if inspect.ismodule(module) else inspect.getmembers(module):
            if not name.startswith("_") and callable(value) and not inspect.isclass(value):
                signature = inspect.signature(inspect.unwrap(value))
                if "prepend_bos" in signature.parameters:
                    takes.add(name)
    assert takes - {"forward", "bos_rule", "score_file"} <= set(ROUTES)


def test_score_file_reads_its_prefix_under_the_default(model, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"id": "1", "continuation": " and"}) + "\n")
    found = {}
    for rule in (True, False):
        score_file(model, items, tmp_path / f"{rule}", prefix=TEXT, prepend_bos=rule, progress=False)
        model.default_prepend_bos = rule
        score_file(model, items, tmp_path / f"{rule} unsaid", prefix=TEXT, progress=False)
        model.default_prepend_bos = None
        said, unsaid = ((tmp_path / name).read_text() for name in (f"{rule}", f"{rule} unsaid"))
        assert said == unsaid
        found[rule] = said
    assert found[True] != found[False]


def test_text_that_goes_on_from_tokens_has_no_bos(model):
    """A BOS asked of it is refused; a default is not."""
    whole = model(TEXT + " and", prepend_bos=True, logits_at=-1)
    model.default_prepend_bos = True
    kv = model.prefill(TEXT)
    # Keys of a prefix and of a suffix are attended to apart: rounded otherwise in float32, at logits below 10.
    assert torch.allclose(model(" and", past_kv_cache=kv, logits_at=-1), whole, atol=1e-4)
    text = model.generate(" and", past_kv_cache=kv, verbose=False, **GENERATE)
    assert TEXT + text == model.generate(TEXT + " and", verbose=False, **GENERATE)
    scores = score_continuations(model, kv_text := TEXT, [" and"], progress=False)
    assert scores.tokens[0] == model.to_tokens(kv_text + " and")[0, -1:].tolist()


def test_an_empty_prompt_begins_with_the_bos_under_every_default(model):
    plain = model.generate(return_type="tokens", verbose=False, **GENERATE)
    for default in (True, False):
        model.default_prepend_bos = default
        assert torch.equal(model.generate(return_type="tokens", verbose=False, **GENERATE), plain)


def test_ids_are_taken_as_they_are(model):
    ids = model.to_tokens(TEXT, prepend_bos=False)
    plain = model(ids)
    model.default_prepend_bos = True
    assert torch.equal(model(ids), plain)


def test_the_default_goes_with_the_model_and_into_no_file(model, tmp_path):
    model.default_prepend_bos = False
    made = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "process_weights": model.process_weights(fold_ln=True),
        "dequantize": model.dequantize(),
    }
    assert {name: one.default_prepend_bos for name, one in made.items()} == dict.fromkeys(made, False)
    assert torch.equal(made["process_weights"].to_tokens(TEXT), model.to_tokens(TEXT, prepend_bos=False))
    model.save_pretrained(tmp_path / "saved")
    assert HookedCausalLM.from_pretrained(tmp_path / "saved").default_prepend_bos is None


def test_merged_models_have_the_default_of_the_first():
    model = make_word_model(d_model=16, n_ctx=32, init_std=0.4)
    model.default_prepend_bos = False
    merged = merging.simple_average([model, copy.deepcopy(model)])
    assert merged.default_prepend_bos is False


def test_a_default_is_read_as_the_argument_is():
    model = HookedCausalLM(make_word_model(d_model=16, n_ctx=8, init_std=0.1).cfg)
    assert model.default_prepend_bos is None
    # A model without a tokenizer may set it.
    model.default_prepend_bos = True
    for wrong in ("yes", 2, [True], 0.5):
        with (
            unchecked(),
            pytest.raises(InputError, match=r"default_prepend_bos is .*, or None \(the tokenizer"),
        ):
            model.default_prepend_bos = wrong
    assert model.default_prepend_bos is True


def test_a_bos_that_a_tokenizer_lacks_is_refused_by_the_text():
    model = make_word_model(d_model=16, n_ctx=8, init_std=0.1)
    lacking = without_bos_of_its_own(model.tokenizer)
    lacking.bos_token = None
    model.set_tokenizer(lacking)
    model.default_prepend_bos = True
    with pytest.raises(InputError, match=r"this tokenizer has no BOS token; .*model.default_prepend_bos"):
        model(TEXT)
    model(torch.tensor([[5, 6]]))


def test_set_tokenizer_takes_what_the_class_takes():
    model = HookedCausalLM(make_word_model(d_model=16, n_ctx=32, init_std=0.1).cfg)
    with pytest.raises(InputError, match="no tokenizer"):
        model.to_tokens(TEXT)
    tokenizer = make_word_model(d_model=16, n_ctx=32, init_std=0.1).tokenizer
    side = tokenizer.padding_side
    assert model.set_tokenizer(tokenizer) is None
    assert model.tokenizer is tokenizer
    assert tokenizer.padding_side == side
    assert model.to_string(model.to_tokens(TEXT, prepend_bos=False)[0]) == TEXT
    for wrong in ("gpt2", PreTrainedTokenizerFast, 3):
        with (
            unchecked(),
            pytest.raises(InputError, match=r"tokenizer is .*expected a transformers tokenizer"),
        ):
            model.set_tokenizer(wrong)
    assert model.tokenizer is tokenizer
    model.set_tokenizer(None)
    assert model.tokenizer is None
