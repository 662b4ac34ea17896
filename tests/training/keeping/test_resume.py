"""A run that was interrupted and is started again ends as one that ran through, bit for bit."""

import importlib
import itertools
import json
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hooklens import edits
from hooklens.errors import CheckpointError, InputError
from hooklens.training import DivergedError, TrainConfig, TrainingInterruptedError, train
from tests.annotations import unchecked
from tests.forks import needs_fork, run_in_child, wait_for
from tests.training.networks import (
    D_VOCAB,
    classify,
    copy_state,
    equal_states,
    make_classifier,
    make_model,
    make_rows,
)

CONFIG = TrainConfig(
    steps=11, learning_rate=1e-2, schedule="cosine", warmup_steps=2, accumulate=2, seed=4, log_every=2, eval_every=4,
    checkpoint_every=3,
)  # fmt: skip


class StopError(Exception):
    """What a loss raises in the middle of a step."""


class Augmented(Dataset):
    """Examples that are drawn anew each time, from three libraries' generators."""

    def __len__(self):
        return 14

    def __getitem__(self, index):
        noise = torch.randn(4) + float(np.random.normal()) + random.random()
        return torch.full((4,), index / 14) + noise, index % 2


class Endless(IterableDataset):
    def __iter__(self):
        for index in itertools.count():
            yield torch.randn(4) * index, index % 2


class Reporting:
    """Batches that say where they stand, and cannot be read again."""

    def __init__(self):
        self.at = 0
        self.given = 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            self.given += 1
            yield torch.full((4, 4), float(self.at)), torch.arange(4) % 2
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def list_data():
    torch.manual_seed(8)
    return [(torch.randn(4, 4), torch.randint(0, 2, (4,))) for _ in range(5)]


DATA = {
    "list": list_data,
    "generator": lambda: (batch for _ in range(9) for batch in list_data()),
    "shuffled": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True, drop_last=True),
    "own generator": lambda: DataLoader(
        Augmented(), batch_size=4, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(2)
    ),
    "endless": lambda: DataLoader(Endless(), batch_size=4),
    "state": Reporting,
}


def run(data, folder, config=CONFIG, *, stop_at=None, model=None, error=StopError):
    """A run as a new process makes it: everything anew, and generators in any state."""
    torch.manual_seed(os.getpid())
    calls = itertools.count()

    def loss(model, batch):
        if model.training and next(calls) == stop_at:
            raise error
        return classify(model, batch)

    model = make_classifier() if model is None else model
    result = train(model, data, config, loss=loss, folder=folder, eval_data=list_data()[:2], progress=False)
    return copy_state(model), result


@pytest.fixture
def whole(request, tmp_path):
    states, result = run(DATA[request.param](), tmp_path / "whole")
    return request.param, states, (tmp_path / "whole" / "metrics.jsonl").read_bytes(), result.records


@pytest.mark.parametrize("whole", DATA, indirect=True)
def test_after_a_failure_at_any_batch(whole, tmp_path) -> None:
    name, states, metrics, records = whole
    for stop_at in (0, 3, 8, 13, 21):
        folder = tmp_path / f"stopped at {stop_at}"
        with pytest.raises(StopError):
            run(DATA[name](), folder, stop_at=stop_at)
        again, result = run(DATA[name](), folder)
        assert equal_states(again, states), stop_at
        assert (folder / "metrics.jsonl").read_bytes() == metrics, stop_at
        assert result.records == records


def test_after_a_failure_in_an_evaluation(tmp_path) -> None:
    """The step was made and its metrics were not written: they are, and the step is not made twice."""

    class Failing(list):
        fails = 0

        def __iter__(self):
            self.fails -= 1
            if self.fails == 0:
                raise StopError
            return super().__iter__()

    config = TrainConfig(steps=7, learning_rate=1e-2, seed=1, log_every=3, eval_every=2)
    rows, held_out = list(make_rows().split(4)), [make_rows(2, seed=6)]
    whole = make_model()
    train(whole, rows, config, folder=tmp_path / "whole", eval_data=held_out, progress=False)
    failing = Failing(held_out)
    failing.fails = 2
    with pytest.raises(StopError):
        train(make_model(), rows, config, folder=tmp_path / "run", eval_data=failing, progress=False)
    model, steps = make_model(), []
    train(model, rows, config, folder=tmp_path / "run", eval_data=held_out, progress=False,
          logger=lambda metrics, step: steps.append(step))  # fmt: skip
    assert equal_states(model.state_dict(), whole.state_dict())
    assert steps == [4, 6, 7]
    written = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    assert written[0] == written[1]


def test_with_workers(tmp_path) -> None:
    make = lambda: DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1)  # noqa: E731
    states, _ = run(make(), tmp_path / "whole")
    with pytest.raises(StopError):
        run(make(), tmp_path / "stopped", stop_at=9)
    again, _ = run(make(), tmp_path / "stopped")
    assert equal_states(again, states)


def test_without_a_seed_the_generators_are_those_of_the_checkpoint(tmp_path) -> None:
    config = CONFIG.replace(seed=None)
    data = DATA["shuffled"]
    states, _ = run(data(), tmp_path / "whole", config)
    with pytest.raises(StopError):
        run(data(), tmp_path / "stopped", config, stop_at=10)
    random.seed(99)
    np.random.seed(98)
    again, _ = run(data(), tmp_path / "stopped", config)
    assert equal_states(again, states)


def test_a_language_model_with_steps_left_unmade(tmp_path) -> None:
    """Weights that lose nothing between the last checkpoint and a failure: no step is made twice."""
    loader = lambda: DataLoader(make_rows(), batch_size=4, shuffle=True)  # noqa: E731
    config = TrainConfig(steps=9, learning_rate=1e-2, seed=1, checkpoint_every=100)
    whole = make_model()
    train(whole, loader(), config, folder=tmp_path / "whole", progress=False)

    model, steps = make_model(), itertools.count()

    def fail(tensor, hook):
        if next(steps) == 5:
            raise StopError

    model.add_hook("blocks.1.hook_resid_post", fail)
    with pytest.raises(StopError):
        train(model, loader(), config, folder=tmp_path / "run", progress=False)
    model, calls = make_model(), []
    model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: calls.append(1))
    train(model, loader(), config, folder=tmp_path / "run", progress=False)
    assert equal_states(model.state_dict(), whole.state_dict())
    assert len(calls) == 9 - 5


def train_in_child(folder, kill_at=None, count_in=None):
    """Train in a process of its own, which dies at a call of any function, Python's or C's; give its exit code.

    Args:
        folder: of the run.
        kill_at: the number of the call; None: the process ends by itself.
        count_in: a file for the number of all calls; None: nobody asks.
    """
    config = TrainConfig(steps=5, learning_rate=1e-2, seed=4, log_every=1, checkpoint_every=2, keep_checkpoints=2)

    def work():
        torch.manual_seed(os.getpid())
        model, loader = make_model(d_model=8), DataLoader(make_rows(), batch_size=4, shuffle=True)
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        # Counting takes as long as the training.
        if kill_at is not None or count_in is not None:
            sys.setprofile(count)
        train(model, loader, config, folder=folder, progress=False)
        sys.setprofile(None)
        if count_in is not None:
            count_in.write_text(str(calls))

    with unchecked():
        return wait_for(run_in_child(work))


def contents(folder):
    """What the files of a run hold: not the order of a header, nor which of a pickle's tensors are one object."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    def read(path):
        loads = {".pt": torch.load, ".safetensors": load_file}
        return repr(plain(loads[path.suffix](path))).encode() if path.suffix in loads else path.read_bytes()

    return {path.relative_to(folder).as_posix(): read(path) for path in folder.rglob("*") if path.is_file()}


@needs_fork
def test_killed_at_any_moment(tmp_path) -> None:
    """All files are those of a run that was never killed: weights, optimiser, generators, place in data, metrics."""
    # What training imports when it is used is imported here, so that what is counted is the training.
    for name in ("torch._dynamo", "tqdm.auto", "transformers.optimization"):
        importlib.import_module(name)
    assert train_in_child(tmp_path / "whole", count_in=tmp_path / "calls") == 0
    calls, expected = int((tmp_path / "calls").read_text()), contents(tmp_path / "whole")
    assert len(expected) == 7
    n, unequal = 6, []
    for i in range(n):
        assert train_in_child(tmp_path / str(i), kill_at=(2 * i + 1) * calls // (2 * n)) == -signal.SIGKILL
        assert train_in_child(tmp_path / str(i)) == 0
        if contents(tmp_path / str(i)) != expected:
            unequal.append(i)
    assert unequal == []
    # Killed again and again.
    runs = 0
    while train_in_child(tmp_path / "often", kill_at=(7 + runs) * calls // 10) and runs < 9:
        runs += 1
    assert 1 <= runs < 9
    assert contents(tmp_path / "often") == expected


@pytest.fixture
def plain_interrupts():
    """Ctrl-C as a script or a notebook has it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(n, at):
    """A hook that presses Ctrl-C n times in one step."""
    steps = itertools.count()

    def press(tensor, hook):
        if next(steps) == at:
            for _ in range(n):
                os.kill(os.getpid(), signal.SIGINT)

    return press


def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path, plain_interrupts) -> None:
    config = TrainConfig(steps=8, seed=1, learning_rate=1e-2)
    data = list(make_rows().split(4))
    whole = make_model()
    train(whole, data, config, progress=False)
    model = make_model()
    model.add_hook("blocks.0.hook_mlp_out", interrupting(1, at=3))
    with pytest.raises(
        TrainingInterruptedError, match="interrupted after 4 of 8 steps; the same call goes on from"
    ) as e:
        train(model, data, config, folder=tmp_path, progress=False)
    assert e.value.result.step == 4
    assert e.value.result.model is model
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model = make_model()
    train(model, data, config, folder=tmp_path, progress=False)
    assert equal_states(model.state_dict(), whole.state_dict())


def test_ctrl_c_twice_stops_at_once_and_loses_nothing(tmp_path, plain_interrupts) -> None:
    config = TrainConfig(steps=8, seed=1, learning_rate=1e-2)
    data = list(make_rows().split(4))
    whole = make_model()
    train(whole, data, config, progress=False)
    model = make_model()
    model.add_hook("blocks.0.hook_mlp_out", interrupting(2, at=3))
    with pytest.raises(TrainingInterruptedError, match=r"interrupted after 3 of 8 steps; .* checkpoint of step 3"):
        train(model, data, config, folder=tmp_path, progress=False)
    model = make_model()
    train(model, data, config, folder=tmp_path, progress=False)
    assert equal_states(model.state_dict(), whole.state_dict())


def test_ctrl_c_without_a_folder(plain_interrupts) -> None:
    model = make_model()
    model.add_hook("blocks.0.hook_mlp_out", interrupting(1, at=3))
    with pytest.raises(TrainingInterruptedError, match=r"with folder=\.\.\. the same call would go on"):
        train(model, list(make_rows().split(4)), TrainConfig(steps=8), progress=False)


def test_a_finished_run_is_loaded(tmp_path) -> None:
    states, first = run(list_data(), tmp_path)
    again, result = run(list_data(), tmp_path, stop_at=0)
    assert equal_states(again, states)
    assert result.records == first.records


def test_a_constant_schedule_can_go_on_for_longer(tmp_path) -> None:
    config = TrainConfig(steps=4, seed=1)
    data = list(make_rows().split(4))
    model, whole = make_model(), make_model()
    train(model, data, config, folder=tmp_path, progress=False)
    train(model, data, config.replace(steps=7, checkpoint_every=1), folder=tmp_path, progress=False)
    train(whole, data, config.replace(steps=7), progress=False)
    assert equal_states(model.state_dict(), whole.state_dict())
    with pytest.raises(CheckpointError, match="holds a run of 7 steps; steps=5 is behind it"):
        train(model, data, config.replace(steps=5), folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": CONFIG.replace(learning_rate=0.5)}, "learning_rate is 0.5, was 0.01"),
        ({"config": CONFIG.replace(steps=12)}, "steps is 12, was 11"),
        ({"model": torch.nn.Linear(4, 2)}, "weight '0.bias' is None, was"),
        ({"data": list_data()[::-1]}, "the data gives other batches than in the run so far"),
        ({"data": list_data()[:2]}, "the data has 2 batches, that of the run so far had 5"),
        ({"data": Reporting()}, "the data of this run says where it stands"),
    ],
)
def test_another_run_is_refused(change, words, tmp_path) -> None:
    with pytest.raises(StopError):
        run(list_data(), tmp_path, stop_at=9)
    given = {"data": list_data(), "config": CONFIG, **change}
    with pytest.raises(CheckpointError, match=words):
        run(given.pop("data"), tmp_path, **given)
    run(list_data(), tmp_path)


def test_another_iterator_is_refused(tmp_path) -> None:
    """It was used up to here by the run that failed, so its next batch is not the one that a run has to go on with."""
    data = DATA["generator"]()
    with pytest.raises(StopError):
        run(data, tmp_path, stop_at=11)
    with pytest.raises(CheckpointError, match="It is an iterator: give one that begins at the beginning"):
        run(data, tmp_path)


def test_another_loader_is_refused(tmp_path) -> None:
    with pytest.raises(StopError):
        run(DATA["shuffled"](), tmp_path, stop_at=9)
    with pytest.raises(CheckpointError, match="the data has 1 generators of random numbers, that of the run so far 0"):
        run(DATA["own generator"](), tmp_path)


def test_another_network_is_refused(tmp_path) -> None:
    """The weights have the same shapes, and mean something else."""
    data, config = list(make_rows().split(4)), TrainConfig(steps=1)
    train(make_model(act_fn="relu"), data, config, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="the model has another configuration"):
        train(make_model(act_fn="silu"), data, config, folder=tmp_path, progress=False)


def test_data_with_randomness_of_its_own_is_refused(tmp_path) -> None:
    """It would go on with other batches, unnoticed."""

    class OwnOrder:
        def __init__(self):
            self.draw = np.random.default_rng(0)

        def __iter__(self):
            return iter([list_data()[i] for i in self.draw.permutation(5)])

    with pytest.raises(StopError):
        run(OwnOrder(), tmp_path, stop_at=9)
    with pytest.raises(CheckpointError, match="from the global generators of torch, numpy and Python"):
        run(OwnOrder(), tmp_path)


def test_data_that_says_where_it_stands_is_not_read_again(tmp_path) -> None:
    with pytest.raises(StopError):
        run(Reporting(), tmp_path, stop_at=14)
    data = Reporting()
    run(data, tmp_path)
    # From the checkpoint of step 6 on, of two batches a step.
    assert data.given == 2 * (CONFIG.steps - 6)


def test_an_iterator_that_ends_keeps_what_was_trained(tmp_path) -> None:
    with pytest.raises(InputError, match="the data ended after 5 batches, and training needs more"):
        run(iter(list_data()), tmp_path)
    again, _ = run(DATA["generator"](), tmp_path)
    whole, _ = run(DATA["generator"](), tmp_path / "whole")
    assert equal_states(again, whole)


def test_one_process_at_a_time(tmp_path) -> None:
    model = make_model()
    inner = lambda tensor, hook: train(make_model(), [make_rows()], TrainConfig(steps=1), folder=tmp_path,  # noqa: E731
                                       progress=False)  # fmt: skip
    model.add_hook("blocks.0.hook_mlp_out", inner)
    with pytest.raises(InputError, match="another process trains in"):
        train(model, [make_rows()], TrainConfig(steps=1), folder=tmp_path, progress=False)


def test_a_run_that_diverges_keeps_the_checkpoints_from_before(tmp_path) -> None:
    model, steps = make_model(), itertools.count()
    model.add_hook("hook_embed", lambda tensor, hook: tensor * float("nan") if next(steps) > 3 else None)
    config = TrainConfig(steps=9, checkpoint_every=2, keep_checkpoints=1, log_every=9)
    with pytest.raises(DivergedError, match="in steps 1 to 6; the checkpoint of step 4 is from before"):
        train(model, [make_rows()], config, folder=tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_scaled_losses_go_on(tmp_path) -> None:
    config = TrainConfig(steps=6, autocast="float16", seed=2, learning_rate=1e-2, checkpoint_every=2)
    data = list(make_rows().split(4))
    whole, model = make_model(), make_model()
    train(whole, data, config, progress=False, folder=tmp_path / "whole")
    steps = itertools.count()

    def fail(tensor, hook):
        if next(steps) == 3:
            raise StopError

    model.add_hook("hook_embed", fail)
    with pytest.raises(StopError):
        train(model, data, config, progress=False, folder=tmp_path / "run")
    model = make_model()
    train(model, data, config, progress=False, folder=tmp_path / "run")
    assert equal_states(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt"])
def test_a_damaged_checkpoint_is_told(file, tmp_path) -> None:
    run(list_data(), tmp_path)
    path = tmp_path / "checkpoints" / "step-00000011" / file
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=f"{file}: cannot be read"):
        run(list_data(), tmp_path)


def test_a_folder_that_is_no_run(tmp_path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(CheckpointError, match="format 'another', expected 'hooklens-training-1'"):
        run(list_data(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use .* for a training run"):
        run(list_data(), tmp_path / "file")


def test_edits_are_no_part_of_a_run(tmp_path) -> None:
    """What hangs on the model is the caller's to attach again; the run goes on with what is there."""
    data, config = list(make_rows().split(4)), TrainConfig(steps=2, checkpoint_every=1)
    model = make_model(d_vocab=D_VOCAB)
    with model.hooks(edits=[edits.Zero("blocks.0.hook_mlp_out")]):
        train(model, data, config, folder=tmp_path, progress=False)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-0000000{step}" for step in range(3)
    ]
