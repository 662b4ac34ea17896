"""Checkpoints over training as a sequence of models."""

import json
import shutil

import pytest
import torch
import transformers

from hooklens import HookedCausalLM, analysis, patching
from hooklens.errors import CheckpointError, InputError
from hooklens.training import CurveInterruptedError, TrainConfig, checkpoints, train
from tests.annotations import unchecked
from tests.training.networks import classify, copy_state, equal_states, make_classifier, make_model, make_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of four checkpoints, and the weights at each."""
    folder, states = tmp_path_factory.mktemp("run"), {}
    model = make_model()
    data = list(make_rows().split(4))
    for steps in (1, 2, 3, 12):
        train(model, data, TrainConfig(steps=steps, learning_rate=1e-2), folder=folder, progress=False)
        states[steps] = copy_state(model)
    return folder, states


def test_models_by_step_in_one_model(run) -> None:
    folder, states = run
    sequence = checkpoints(folder)
    assert sequence.steps == (0, 1, 2, 3, 12)
    assert len(sequence) == 5
    seen, models = [], set()
    for step, model in sequence:
        models.add(id(model))
        seen.append(step)
        if step == 0:
            assert equal_states(model.state_dict(), make_model().state_dict())
            model.add_hook("hook_embed", lambda tensor, hook: None)
        else:
            assert equal_states(model.state_dict(), states[step])
            assert model.list_hooks()
        assert not model.training
    assert seen == list(sequence.steps)
    assert len(models) == 1


def test_models_of_their_own(run) -> None:
    folder, states = run
    sequence = checkpoints(folder)
    first, second = sequence.load(1), sequence.load(2)
    assert equal_states(first.state_dict(), states[1])
    assert equal_states(second.state_dict(), states[2])
    with pytest.raises(InputError, match="no checkpoint of step 7; there are 0, 1, 2, 3, 12"):
        sequence.load(7)
    assert checkpoints(folder, dtype="float64").load(1).dtype == torch.float64


def test_a_curve_of_a_number_equals_each_model_alone(run) -> None:
    folder, _ = run
    rows = make_rows(seed=9)
    sequence = checkpoints(folder)
    table = sequence.curve(lambda model: model(rows, return_type="loss"), progress=False)
    assert list(table.columns) == ["step", "value"]
    assert list(table["step"]) == list(sequence.steps)
    with torch.no_grad():
        alone = [float(sequence.load(step)(rows, return_type="loss")) for step in sequence.steps]
    assert list(table["value"]) == alone


def test_curves_of_analysis_functions(run) -> None:
    """A head's score and a circuit's faithfulness over training."""
    folder, _ = run
    sequence = checkpoints(folder)
    scores = sequence.curve(lambda model: analysis.heads.head_scores(model, seed=0), progress=False)
    assert len(scores) == len(sequence) * 4
    last = analysis.heads.head_scores(sequence.load(12), seed=0)
    of_last = scores[scores["step"] == 12].drop(columns="step")
    assert of_last.equals(last)

    clean, corrupted = make_rows(4, seed=1), make_rows(4, seed=2)
    metric = patching.LogitDiff([3] * 4, [5] * 4)
    circuit = patching.edge_attribution(sequence.load(12), clean, corrupted, metric).circuit(6, connected=False)

    def faithfulness(model):
        result = patching.evaluate_circuits(model, clean, corrupted, [circuit], metric, progress=False)
        return {"kept": result.values[0], "full": result.full}

    table = sequence.curve(faithfulness, progress=False)
    assert list(table.columns) == ["step", "kept", "full"]
    with torch.no_grad():
        logits = sequence.load(12)(clean)[:, -1]
    assert table["full"].iloc[-1] == pytest.approx(float((logits[:, 3] - logits[:, 5]).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda model: "text", "expected a number, numbers by name"),
        (lambda model: {}, "expected a number"),
        (lambda model: {"step": 1}, "expected a number, numbers by name \\(not 'step'\\)"),
        (lambda model: torch.zeros(2), "a tensor \\[2\\]"),
    ],
)
def test_what_is_no_curve_is_refused(run, fn, words) -> None:
    with pytest.raises(InputError, match=words):
        checkpoints(run[0]).curve(fn, progress=False)


def test_a_curve_that_fails_keeps_what_was_measured(run) -> None:
    def fail(model):
        fail.calls += 1
        if fail.calls == 3:
            raise KeyboardInterrupt
        return fail.calls

    fail.calls = 0
    with pytest.raises(CurveInterruptedError, match="stopped after 2 of 5 checkpoints") as stopped:
        checkpoints(run[0]).curve(fail, progress=False)
    assert list(stopped.value.result["step"]) == [0, 1]


def test_a_run_of_another_module(tmp_path) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.randint(0, 2, (6,)))]
    model = make_classifier()
    train(model, data, TrainConfig(steps=3, checkpoint_every=1), loss=classify, folder=tmp_path, progress=False)
    with pytest.raises(InputError, match="a run of a module of somebody's own: give model="):
        checkpoints(tmp_path)
    sequence = checkpoints(tmp_path, model=make_classifier())
    assert equal_states(sequence.load(3).state_dict(), model.state_dict())
    first, last = sequence.load(0), sequence.load(3)
    assert not equal_states(first.state_dict(), last.state_dict())
    with pytest.raises(InputError, match="the weights do not fit into the model"):
        checkpoints(tmp_path, model=torch.nn.Linear(2, 2)).load(0)


def llama(folder, seed, **changes):
    torch.manual_seed(seed)
    fields = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes}))
    model.save_pretrained(folder)
    return HookedCausalLM.from_pretrained(folder)


def test_published_checkpoints_by_folder(tmp_path) -> None:
    """Weights go into one model; where the shapes differ there is another model."""
    models = {step: llama(tmp_path / str(step), step) for step in (0, 5)}
    models[9] = llama(tmp_path / "9", 9, hidden_size=32)
    sequence = checkpoints({step: tmp_path / str(step) for step in models})
    found = list(sequence)
    assert [step for step, _ in found] == [0, 5, 9]
    assert found[0][1] is found[1][1]
    assert found[2][1] is not found[1][1]
    rows = make_rows(seed=9)
    values = sequence.curve(lambda model: model(rows, return_type="loss"), progress=False)["value"]
    with torch.no_grad():
        assert list(values) == [float(model(rows, return_type="loss")) for model in models.values()]


def test_published_checkpoints_by_revision(tmp_path) -> None:
    """From the hub's cache, as earlier downloads left it."""
    models, repository = {}, tmp_path / "models--somebody--steps"
    for step in (0, 1000):
        commit = f"{step:040d}"
        models[step] = llama(repository / "snapshots" / commit, step)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / f"step{step}").write_text(commit)
    sequence = checkpoints("somebody/steps", revisions=["step1000", "step0"], cache_dir=tmp_path, local_files_only=True)
    assert sequence.steps == (0, 1000)
    for step, model in sequence:
        assert equal_states(model.state_dict(), models[step].state_dict())
    named = checkpoints(
        "somebody/steps", revisions={7: "step1000"}, cache_dir=tmp_path, local_files_only=True, dtype="float64"
    )
    assert named.load(7).dtype == torch.float64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source": "name/of", "revisions": ["main"]}, "the revision 'main' has no step in its name"),
        ({"source": "name/of", "revisions": ["step1", "again1"]}, "are of one step"),
        ({"source": "name/of", "revisions": []}, "there is no checkpoint"),
        ({"source": {}}, "there is no checkpoint"),
        ({"source": {"a": "b"}}, "a step is 'a', expected a whole number"),
        ({"source": {1: 5}}, "the source of step 1 is 5, expected a path"),
        ({"source": {1: "name/of"}, "revisions": ["step1"]}, "leave revisions out"),
        ({"source": "name/of", "revisions": "step1"}, "expected a list of names, or names by step"),
        ({"source": ".", "revisions": ["step1"]}, "is a folder, which has no revisions"),
        ({"source": 5}, "source is 5, expected a path"),
        ({"source": ".", "model": 5}, "model is 5"),
        ({"source": ".", "dtype": "int"}, "dtype is 'int'"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(given, words) -> None:
    with unchecked(), pytest.raises(InputError, match=words):
        checkpoints(**given)


def test_a_folder_without_a_run(tmp_path, run) -> None:
    with pytest.raises(CheckpointError, match="expected the folder of a run"):
        checkpoints(tmp_path)
    shutil.copy(run[0] / "run.json", tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        checkpoints(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["cfg"]["d_model"] == 16
