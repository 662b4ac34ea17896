"""Tests of hooklens.adapters.files.folder: whatever ends a save, the folder holds the old checkpoint or the new one."""

import hashlib
import json
import os
import random
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM
from hooklens.adapters import export
from hooklens.adapters.files import folder
from hooklens.adapters.files.folder import finish_replacement, replace_files
from hooklens.errors import CheckpointError
from tests.checkpoints import build_variant
from tests.forks import needs_fork, run_in_child, wait_for
from tests.tokens.tokenizers import ALL_SPECIAL, word_tokenizer

IDS = torch.arange(10).view(1, 10)


class Saves:
    """Two checkpoints of one config that are easily mixed up: plain weights, and processed ones in other files."""

    def __init__(self) -> None:
        plain = HookedCausalLM.from_hf(build_variant("llama-gqa"), word_tokenizer(**ALL_SPECIAL))
        plain.generation_config = {"eos_token_id": 1}
        processed = plain.process_weights(fold_ln=True)
        processed.generation_config = {"eos_token_id": [2, 3]}
        processed.tokenizer = None
        self.models = [plain, processed]
        self.logits = [model(IDS) for model in self.models]
        self.seen_in_transformers: set[str] = set()

    def save(self, which: int, place: Path) -> None:
        self.models[which].save_pretrained(place, max_shard_size="5GB" if which == 0 else "60KB")

    def find(self, place: Path) -> int:
        """Which of the two the folder holds, whole."""
        found = HookedCausalLM.from_pretrained(place)
        weights = found.state_dict()
        (which,) = [
            which
            for which, model in enumerate(self.models)
            if all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        ]
        assert found.transforms == self.models[which].transforms
        assert found.generation_config == self.models[which].generation_config
        return which

    def check_in_transformers(self, place: Path) -> None:
        """There, too, the folder is one of the two, or no checkpoint.

        A folder whose files have been read there is not read again: names in hidden folders are nothing to it.
        """
        digest = hashlib.sha256()
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        if digest.hexdigest() in self.seen_in_transformers:
            return
        self.seen_in_transformers.add(digest.hexdigest())
        if (place / "config.json").exists():
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(place)(IDS).logits
            assert any(torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) for expected in self.logits)


@pytest.fixture(scope="module")
def saves() -> Saves:
    torch.manual_seed(0)
    return Saves()


def is_killed(child: int) -> bool:
    code = wait_for(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if path.name.startswith(".")]


STEPS = [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (export, "save_file")]


def die_at(number: int) -> None:
    """Make the process kill itself before the step of that number, whatever kind it is of."""
    left = number

    def count(step):
        def counted(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **keywords)

        return counted

    for module, name in STEPS:
        setattr(module, name, count(getattr(module, name)))


@needs_fork
@pytest.mark.parametrize("second", [0, 1])
def test_kill_at_every_step(tmp_path, saves, second) -> None:
    """A save that was killed left weights of one model beside the record of another: processed ones loaded as plain."""
    found, number = [], 0
    saves.save(1 - second, tmp_path / "first")
    while True:
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", place)

        def work(number: int = number, place: Path = place) -> None:
            die_at(number)
            saves.save(second, place)

        if not is_killed(run_in_child(work)):
            break
        saves.check_in_transformers(place)
        found.append(saves.find(place))
        with replace_files(place, stale=[]):
            pass
        assert leftovers(place) == []
        number += 1
    # Before the one step the old checkpoint, after it the new one, and both occur.
    assert number > 20
    assert found == sorted(found, reverse=second == 0)
    assert set(found) == {0, 1}


@needs_fork
@pytest.mark.parametrize("n_moments", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_at_moments_of_chance(tmp_path, saves, n_moments) -> None:
    saves.save(0, tmp_path)
    generator, found = random.Random(0), set()

    def work() -> None:
        while True:
            saves.save(1, tmp_path)
            saves.save(0, tmp_path)

    for _ in range(n_moments):
        child = run_in_child(work)
        time.sleep(generator.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert is_killed(child)
        saves.check_in_transformers(tmp_path)
        found.add(saves.find(tmp_path))
    saves.save(0, tmp_path)
    assert saves.find(tmp_path) == 0
    assert leftovers(tmp_path) == []


@needs_fork
def test_savers_and_readers_at_one_time(tmp_path, saves) -> None:
    """Everybody finishes what is pending, in any order.

    A save failed where another process had taken away the file that it asked for its mode, or had finished the save
    that stood in its way.
    """
    saves.save(0, tmp_path)

    def work() -> None:
        for which in (1, 0, 1, 0):
            saves.save(which, tmp_path)

    children = [run_in_child(work), run_in_child(work)]
    for _ in range(20):
        finish_replacement(tmp_path)
    assert [is_killed(child) for child in children] == [False, False]
    assert saves.find(tmp_path) == 0
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_before_the_step_changes_nothing(tmp_path, saves, monkeypatch, error) -> None:
    saves.save(0, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(folder, "_commit", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        saves.save(1, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_after_the_step_is_made_good_by_the_next_who_opens(tmp_path, saves, monkeypatch) -> None:
    saves.save(0, tmp_path)

    def fail(*names):
        raise OSError("power lost")

    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "replace", fail)
        with pytest.raises(CheckpointError, match=r"interrupted .* finishing it failed \(power lost\)\. Open it where"):
            saves.save(1, tmp_path)
        with pytest.raises(CheckpointError, match="finishing it failed"):
            HookedCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert saves.find(tmp_path) == 1
    assert leftovers(tmp_path) == []


def test_what_is_stale_is_known_when_files_are_moved(tmp_path, saves, monkeypatch) -> None:
    """Another save that comes between writing and the step leaves none of its files, which would be loaded."""
    commit = folder._commit

    def save_another_first(draft, place):
        monkeypatch.setattr(folder, "_commit", commit)
        saves.save(0, place)
        commit(draft, place)

    monkeypatch.setattr(folder, "_commit", save_another_first)
    saves.save(1, tmp_path)
    assert saves.find(tmp_path) == 1
    assert not (tmp_path / "model.safetensors").exists()


def test_stale_files_go_and_others_stay(tmp_path) -> None:
    for name in ("old.a", "both.a", "other.b"):
        (tmp_path / name).write_text("old")
    (tmp_path / "folder.a").mkdir()
    (tmp_path / "both.a").chmod(0o640)
    with replace_files(tmp_path, stale=["*.a"]) as new:
        (new / "both.a").write_text("new")
        (new / "inside").mkdir()
        (new / "inside" / "deep").write_text("new")
        (new / "inside" / "deep").chmod(0o600)
        assert (tmp_path / "old.a").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"both.a", "other.b", "folder.a", "inside"}
    assert (tmp_path / "inside" / "deep").read_text() == (tmp_path / "both.a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "both.a").stat().st_mode) == 0o640
    # As any new file: the writer's own mode, here of nobody but the owner, does not stay.
    (tmp_path / "plain").touch()
    assert (tmp_path / "inside" / "deep").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_all_is_on_the_disk_before_the_step(tmp_path, monkeypatch) -> None:
    order = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda place: (order.append(stat.S_IFMT(os.fstat(place).st_mode)), fsync(place)))
    monkeypatch.setattr(os, "rename", lambda *names: (order.append("rename"), rename(*names)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    with replace_files(tmp_path, stale=[]) as new:
        (new / "config.json").write_text("{}")
        (new / "weights").write_text("w")
    file, place = stat.S_IFREG, stat.S_IFDIR
    # Two files and the plan, the draft's two folders; the step; the folder, then the weights, then the config.
    expected = [file] * 3 + [place] * 2 + ["rename", place, "replace", place, "replace", place, "rename"]
    assert order == expected


@pytest.mark.parametrize(
    "plan",
    [
        "",
        "[]",
        "{}",
        '{"new": 3, "stale": []}',
        '{"new": [], "stale": "*"}',
        '{"new": [], "stale": [3]}',
        '{"new": [], "stale": ["../outside"]}',
        '{"new": [], "stale": ["**"]}',
    ],
)
def test_a_damaged_plan_deletes_nothing(tmp_path, plan) -> None:
    (tmp_path / "outside").write_text("precious")
    pending = tmp_path / "model" / ".hooklens-save"
    (pending / "files").mkdir(parents=True)
    (pending / "files" / "config.json").write_text("{}")
    (pending / "plan.json").write_text(plan)
    with pytest.raises(CheckpointError, match=r"plan\.json: "):
        HookedCausalLM.from_pretrained(tmp_path / "model")
    assert (tmp_path / "outside").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path, saves, monkeypatch) -> None:
    def refuse(*arguments, **keywords):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(folder, "make_draft", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written to \(read-only file system\)"):
        saves.save(0, tmp_path)


def test_the_tokenizer_is_replaced_whole_or_stays(tmp_path, saves) -> None:
    """A file of the old tokenizer that the new one does not write would be read with the new one's."""
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": 999}))
    saves.save(1, tmp_path)
    assert (tmp_path / "added_tokens.json").exists()
    saves.save(0, tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    assert (tmp_path / "tokenizer.json").exists()
    # The second model has no tokenizer of its own: the folder's stays.
    saves.save(1, tmp_path)
    assert HookedCausalLM.from_pretrained(tmp_path).tokenizer is not None
