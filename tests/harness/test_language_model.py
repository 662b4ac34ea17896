"""HookLens models in lm-evaluation-harness, against its own Hugging Face backend on the same checkpoint.

Needs the extra `harness`. Tasks are those of the folder `tasks`, and nothing is downloaded.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import hooklens as hl
from hooklens.bundled import bundled_path
from hooklens.errors import HookLensError, InputError
from hooklens.harness import HookLensLM
from hooklens.steering import SteeringError, SteeringVectors

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-evaluation-harness: pip install 'hooklens[harness]'", allow_module_level=True)

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hooklens.harness import command

TASKS = Path(__file__).parent / "tasks"
NAMES = ("hooklens_choice", "hooklens_rolling", "hooklens_answer")
MODELS = ("tiny-llama", "tiny-falcon", "tiny-gpt-neox")
LONG = "When Mary and John went to the store , John gave a drink to Mary . " * 20
STORY = "When Mary and John went to the store , John gave a drink to"
PAIRS = [
    (STORY, " Mary"),
    (STORY, " John . Then Mary went to the park"),
    (STORY + " ", "Mary"),
    ("", "Mary went to the store"),
    ("", "<|endoftext|> Mary went"),
    (LONG, " Mary and John went"),
    (LONG + "Mary", " and John went to the store"),
    ("The capital of France is", " Paris"),
    ("<|endoftext|>When Mary", " and John"),
]
# Sums of a few hundred log-probabilities of float32, which the other backend adds up in float32, too.
ROLLING = 1e-6
# One log-probability, of two implementations in float32.
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def make_other(name: str = "tiny-llama", **options) -> HFLM:
    return HFLM(pretrained=str(bundled_path(name)), device="cpu", dtype="float32", **{"batch_size": 2, **options})


def ask(model, kind: str, *asked) -> list:
    requests = [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in asked]
    return getattr(model, kind)(requests)


def assert_same_answers(ours: HookLensLM, other: HFLM, pairs=PAIRS) -> None:
    scores, expected = ask(ours, "loglikelihood", *pairs), ask(other, "loglikelihood", *pairs)
    assert [one[0] for one in scores] == pytest.approx([one[0] for one in expected], abs=CLOSE)
    assert [one[1] for one in scores] == [one[1] for one in expected]


def evaluate(model, **options):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=list(NAMES), task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


@pytest.mark.parametrize("name", MODELS)
def test_tasks_have_the_results_of_the_other_backend(name):
    """Multiple choice with examples before the question, perplexity of texts, and answers that are generated."""
    ours, expected = evaluate(HookLensLM(f"bundled:{name}")), evaluate(make_other(name))
    for task in NAMES:
        scores = {key: value for key, value in ours["results"][task].items() if isinstance(value, float)}
        others = {key: value for key, value in expected["results"][task].items() if isinstance(value, float)}
        assert scores == pytest.approx(others, rel=1e-5)
        for one, other in zip(ours["samples"][task], expected["samples"][task], strict=True):
            if task == "hooklens_answer":
                assert one["resps"] == other["resps"]
                continue
            for (found,), (wanted,) in zip(one["resps"], other["resps"], strict=True):
                read = (lambda answer: answer) if isinstance(found, float) else (lambda answer: answer[0])
                assert read(found) == pytest.approx(read(wanted), abs=CLOSE)
    assert 0 < ours["results"]["hooklens_choice"]["acc,none"] < 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", ["auto", 2])
def test_pairs_have_the_scores_of_the_other_backend(name, batch_size):
    """Empty contexts, contexts that are cut, spaces at the border, and continuations of several tokens."""
    assert_same_answers(HookLensLM(f"bundled:{name}", batch_size=batch_size), make_other(name))


@pytest.mark.parametrize("options", [{"max_length": 12}, {"prefix_token_id": 5}])
def test_options_act_as_in_the_other_backend(options):
    # It gives a second BOS token to a text that spells out its own, where another token is the prefix.
    short = [(context, text) for context, text in PAIRS if len(text.split()) <= 6 and "<" not in context]
    assert_same_answers(HookLensLM("bundled:tiny-llama", **options), make_other(**options), short)


@pytest.mark.parametrize("name", MODELS)
def test_texts_longer_than_the_context_roll(name):
    texts = [(LONG * 2 + "The capital of France is Paris",), ("Mary went",), ("",), (LONG,)]
    ours, other = HookLensLM(f"bundled:{name}"), make_other(name)
    assert ask(ours, "loglikelihood_rolling", *texts) == pytest.approx(
        ask(other, "loglikelihood_rolling", *texts), rel=ROLLING
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_answers_are_those_of_the_other_backend(name, batch_size):
    asked = [
        (STORY, {"until": [" ."], "max_gen_toks": 20}),
        ("Mary", {"until": [" ."], "max_gen_toks": 20}),
        ("The capital of France is", {"until": "Rome", "max_gen_toks": 30, "do_sample": False, "temperature": 0.0}),
        ("The capital", {"until": [], "max_new_tokens": 40, "num_beams": 1}),
        (LONG, {"until": ["\n"], "max_gen_toks": 30}),
        (LONG + "Then", {"until": ["\n"], "max_gen_toks": 30}),
        ("<|endoftext|>Lucy", {"max_gen_toks": 5}),
    ]
    ours, other = HookLensLM(f"bundled:{name}", batch_size=batch_size), make_other(name, batch_size=1)
    answers = ask(ours, "generate_until", *asked)
    assert answers == ask(other, "generate_until", *asked)
    assert any(answers)


def test_sampling_follows_its_keywords():
    ours = HookLensLM("bundled:tiny-llama")
    asked = ("Mary", {"max_gen_toks": 12, "do_sample": True, "temperature": 3.0, "top_k": 0})
    torch.manual_seed(0)
    drawn = {*ask(ours, "generate_until", *[asked] * 8)}
    assert len(drawn) > 1
    one = ("Mary", {"max_gen_toks": 12, "do_sample": True, "temperature": 3.0, "top_k": 1})
    greedy = ("Mary", {"max_gen_toks": 12})
    assert len({*ask(ours, "generate_until", *[one] * 4, greedy)}) == 1


def test_an_edited_model_is_evaluated():
    """The other backend evaluates a model whose second MLP writes nothing."""
    folder = bundled_path("tiny-llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight.zero_()
    other = HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2)
    ours = HookLensLM("bundled:tiny-llama", edits=[hl.edits.Zero("blocks.1.hook_mlp_out")])
    assert_same_answers(ours, other)
    asked = [(context, {"max_gen_toks": 10, "until": [" ."]}) for context, _ in PAIRS if context]
    assert ask(ours, "generate_until", *asked) == ask(other, "generate_until", *asked)
    texts = [(LONG * 2,)]
    assert ask(ours, "loglikelihood_rolling", *texts) == pytest.approx(
        ask(other, "loglikelihood_rolling", *texts), rel=ROLLING
    )
    assert ask(ours, "loglikelihood", PAIRS[0]) != ask(HookLensLM("bundled:tiny-llama"), "loglikelihood", PAIRS[0])
    assert "Zero" in str(ours.get_model_info()["edits"])


def test_edits_that_need_whole_sequences_see_what_runs():
    """A function that changes nothing; contexts that are cut fill the model's context to its last token."""
    seen = set()

    def look(tensor):
        seen.add(tensor.shape[1])

    edited = HookLensLM("bundled:tiny-llama", edits=[hl.edits.Custom("blocks.1.hook_resid_post", look)])
    plain = HookLensLM("bundled:tiny-llama")
    scores, expected = (ask(one, "loglikelihood", *PAIRS) for one in (edited, plain))
    assert [one[0] for one in scores] == pytest.approx([one[0] for one in expected], abs=CLOSE)
    assert max(seen) == 256


def write_vectors(folder: Path, model: hl.HookedCausalLM) -> tuple[Path, SteeringVectors]:
    vectors = hl.steering.fit(
        model,
        ["Mary gave a drink to", "Lucy gave a ring to"],
        ["John gave a drink to", "Paul gave a ring to"],
        at=["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"],
    )
    vectors.save(folder / "vectors.safetensors")
    return folder / "vectors.safetensors", vectors


def test_a_steered_model_is_evaluated(tmp_path):
    """The other backend evaluates a model with a hook of torch that adds the vector."""
    path, vectors = write_vectors(tmp_path, hl.HookedCausalLM.from_pretrained("bundled:tiny-llama"))
    added = 2.5 * vectors["blocks.1.hook_resid_post"].direction
    folder = bundled_path("tiny-llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.model.layers[1].register_forward_hook(lambda module, given, output: output + added)
    other = HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2)
    ours = HookLensLM("bundled:tiny-llama", steering=path, steer_at="blocks.1.hook_resid_post", strength=2.5)
    assert_same_answers(ours, other)
    asked = [(STORY, {"max_gen_toks": 10, "until": [" ."]})]
    assert ask(ours, "generate_until", *asked) == ask(other, "generate_until", *asked)
    both = HookLensLM("bundled:tiny-llama", steering=path)
    assert both.edits == tuple(vectors.edits(strength=1.0))


def test_the_command_line_evaluates_a_steered_model(tmp_path, monkeypatch, capsys):
    path, _ = write_vectors(tmp_path, hl.HookedCausalLM.from_pretrained("bundled:tiny-llama"))
    # Its own tasks are ten thousand files, which are read before it looks at those that are asked for.
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    steered = f"pretrained=bundled:tiny-llama,steering={path},steer_at=blocks.1.hook_resid_post,strength=2.5"
    for given in (steered, "pretrained=bundled:tiny-llama"):
        options = ["--tasks", "hooklens_choice,hooklens_rolling", "--include_path", str(TASKS), "--batch_size", "auto"]
        options += ["--output_path", str(tmp_path / "out"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "hooklens", "--model_args", given, *options])
        command.main()
        assert "hooklens_rolling" in capsys.readouterr().out
    first, second = sorted((tmp_path / "out").rglob("*.json"))
    found = [json.loads(one.read_text(encoding="utf-8")) for one in (first, second)]
    assert {one["config"]["steering"] for one in found} == {str(path), ""}
    perplexities = [one["results"]["hooklens_rolling"]["word_perplexity,none"] for one in found]
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3)


def test_the_command_line_tells_errors(monkeypatch, capsys):
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    options = ["--model_args", "pretrained=bundled:tiny-llama,strength=2", "--tasks", "hooklens_choice"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "hooklens", *options, "--include_path", str(TASKS)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "hooklens: strength, how and steer_at say how to steer" in capsys.readouterr().err


def test_the_harness_knows_the_class_by_name():
    assert get_model("hooklens") is HookLensLM
    HookLensLM.register()


def test_examples_before_questions_run_once():
    """The tokens that run are those of the shared beginning, and what each request has of its own."""
    ours = HookLensLM("bundled:tiny-llama")
    beginning = "The capital of France is Paris . " * 10
    questions = ["The capital of Italy is", "The capital of Kenya is", "Mary went to the"]
    pairs = [(beginning + question, text) for question in questions for text in (" Rome", " Nairobi", " store")]
    n_run = []
    with ours.hooked.hooks(fwd_hooks=[("hook_embed", lambda tensor: n_run.append(tensor.shape[0] * tensor.shape[1]))]):
        ask(ours, "loglikelihood", *pairs)
    n_beginning = len(ours.tok_encode(beginning))
    assert sum(n_run) < n_beginning + 5 * len(questions)


def test_chat_templates_are_those_of_the_tokenizer():
    template = (
        "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ turn.role }}: {{ turn.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ours, other = HookLensLM("bundled:tiny-llama"), make_other()
    turns = [{"role": "system", "content": "Be brief ."}, {"role": "user", "content": "Mary went"}]
    for one in (ours, other):
        one.tokenizer.chat_template = template
    assert ours.chat_template(True) == other.chat_template(True) == template
    assert ours.tokenizer_name == other.tokenizer_name
    with pytest.warns(UserWarning, match="no system"):
        assert ours.apply_chat_template(turns) == other.apply_chat_template(turns) == "user: Mary went\nassistant:"
    ended = [*turns[1:], {"role": "assistant", "content": "to"}]
    assert ours.apply_chat_template(ended, add_generation_prompt=False) == other.apply_chat_template(
        ended, add_generation_prompt=False
    )


def test_results_are_given_to_the_harness_as_they_come():
    """Its file of results, from which a run that was interrupted goes on, has what was scored."""
    ours = HookLensLM("bundled:tiny-llama")
    kept = []
    ours.cache_hook.add_partial = lambda kind, name, answer: kept.append((kind, name, answer))
    scores = ask(ours, "loglikelihood", *PAIRS)
    assert sorted(kept) == sorted(("loglikelihood", pair, score) for pair, score in zip(PAIRS, scores, strict=True))
    kept.clear()
    ask(ours, "loglikelihood_rolling", (LONG,))
    ask(ours, "generate_until", (STORY, {"max_gen_toks": 2}))
    assert [one[0] for one in kept] == ["loglikelihood_rolling", "generate_until"]


def test_an_interrupted_answer_is_none():
    ours = HookLensLM("bundled:tiny-llama")

    def interrupt(tensor):
        raise KeyboardInterrupt

    with (
        ours.hooked.hooks(fwd_hooks=[("blocks.1.hook_resid_post", interrupt)]),
        pytest.warns(UserWarning, match="interrupted"),
        pytest.raises(KeyboardInterrupt),
    ):
        ask(ours, "generate_until", (STORY, {"max_gen_toks": 2}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 2.0}, "there are no vectors; give steering=FILE"),
        ({"batch_size": "many"}, "batch_size is 'many', expected 'auto' or a whole number >= 1"),
        ({"batch_size": 0}, "batch_size is 0, expected 'auto'"),
        ({"max_batch_size": 8}, "max_batch_size is 8: 'auto' asks the memory"),
        ({"max_length": 1000}, "max_length is 1000, expected at most 256, n_ctx"),
        ({"prefix_token_id": 249}, "prefix_token_id is 249, expected at most 248"),
        ({"edits": [hl.edits.Zero("blocks.0.hook_mlp_out", rows=0)]}, "name rows"),
        ({"edits": hl.edits.Zero("blocks.0.hook_mlp_out")}, r"\[edit\] for a single one"),
        ({"edits": [hl.edits.Zero("blocks.9.hook_mlp_out")]}, "blocks.9.hook_mlp_out"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(HookLensError, match=message):
        HookLensLM("bundled:tiny-llama", **options)


def test_a_model_that_was_given_is_not_loaded():
    model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
    assert HookLensLM(model).hooked is model
    assert HookLensLM(model, batch_size="auto:4").batch_size == "auto"
    assert HookLensLM(model, batch_size="3").batch_size == 3
    with pytest.raises(InputError, match="revision: these say how to load a model, and one was given"):
        HookLensLM(model, revision="main")
    with pytest.raises(InputError, match="device: these say"):
        HookLensLM(model, device="cpu")
    with pytest.raises(TypeError, match="nothing"):
        HookLensLM("bundled:tiny-llama", nothing=1)
    model.set_tokenizer(None)
    with pytest.raises(InputError, match="the model has no tokenizer"):
        HookLensLM(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_the_device_of_the_command_line_is_a_wish():
    """It gives `cuda:0` where nobody names a device, and the other backend then runs on what there is."""
    assert HookLensLM("bundled:tiny-llama", device="cuda:0").hooked.device.type == "cpu"
    with pytest.raises(InputError, match="cannot be used"):
        HookLensLM("bundled:tiny-llama", device="cuda:1")


def test_vectors_of_another_model_are_refused(tmp_path):
    _, vectors = write_vectors(tmp_path, hl.HookedCausalLM.from_pretrained("bundled:tiny-llama"))
    narrow = dataclasses.replace(vectors["blocks.1.hook_resid_post"], direction=torch.ones(4))
    narrow.save(tmp_path / "other.safetensors")
    with pytest.raises(SteeringError, match=r"blocks\.1\.hook_resid_post"):
        HookLensLM("bundled:tiny-llama", steering=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("loglikelihood", [("Mary", " went"), ("Mary", "")], "request 1 '': a context of 2 and a continuation of 0"),
        ("loglikelihood", [("", LONG)], "request 0 .*longer than the 256 that run at once"),
        ("generate_until", [("Mary", {"num_beams": 3})], "num_beams=3 cannot be generated with"),
        ("generate_until", [("Mary", {"length_penalty": 3})], "length_penalty=3 cannot be generated with"),
        ("generate_until", [("Mary", {"until": 3})], "until is 3, expected a text or a list"),
        (
            "generate_until",
            [("Mary", {"max_gen_toks": 300})],
            "max_gen_toks is 300, and a context and its answer have room",
        ),
        ("generate_until", [("Mary", {"temperature": -1})], "temperature is -1, expected a number >= 0"),
    ],
)
def test_requests_that_cannot_be_answered_are_named_before_any_runs(kind, asked, message):
    ours = HookLensLM("bundled:tiny-llama")
    ran = []
    with (
        ours.hooked.hooks(fwd_hooks=[("hook_embed", lambda tensor: ran.append(1))]),
        pytest.raises(InputError, match=message),
    ):
        ask(ours, kind, *asked)
    assert not ran
