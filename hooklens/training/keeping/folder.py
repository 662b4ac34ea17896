"""The folder of a training run: what the run is, its checkpoints, and its metrics.

    run.json                        the configuration, and the weights' names, shapes and dtypes
    metrics.jsonl                   an entry on each line
    checkpoints/step-00000100/      model.safetensors: the weights; training.pt: all else that the next step depends on

A checkpoint takes its place in one step when all of it is on the disk, so that a process that is killed at any moment
leaves whole checkpoints only.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import CheckpointError, InputError
from hooklens.files import (
    force_folder_to_disk,
    force_to_disk,
    make_draft,
    read_safetensors,
    replace_file,
    write_safetensors,
)
from hooklens.training.config import TrainConfig

FORMAT = "hooklens-training-1"
_STEP = re.compile(r"step-(\d{8,})")
_MODEL, _TRAINING = "model.safetensors", "training.pt"


class RunFolder:
    """A training run on disk.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "run.lock")

    @property
    def metrics_path(self) -> Path:
        """The file of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def _run_path(self) -> Path:
        return self.path / "run.json"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, config: TrainConfig, model: nn.Module) -> None:
        """Make the folder of a new run, or see that this is the run which the folder holds; nobody else writes to it.

        Raises:
            CheckpointError: it holds another run, or something else.
            InputError: another process writes to it, or it cannot be made.
        """
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process trains in {self.path}; wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"cannot use {self.path} for a training run: {error.strerror or error}") from error
        try:
            self._clear_drafts()
            if self._run_path.exists() or self.steps():
                self._check_run(config, model)
            with replace_file(self._run_path) as draft:
                described = {"format": FORMAT, "config": config.to_dict(), **describe_model(model)}
                draft.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release()

    def read_run(self) -> dict[str, Any]:
        """What the folder says about its run.

        Raises:
            CheckpointError: it holds none.
        """
        try:
            described = json.loads(self._run_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._run_path}: cannot be read ({error}); expected the folder of a run"
            ) from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            found = described.get("format") if isinstance(described, dict) else described
            raise CheckpointError(f"{self._run_path}: format {found!r}, expected {FORMAT!r}")
        return described

    def _check_run(self, config: TrainConfig, model: nn.Module) -> None:
        described = self.read_run()
        problems = config.list_changes(TrainConfig.from_dict(described["config"]))
        ours, theirs = describe_model(model), described
        if ours["cfg"] != theirs["cfg"]:
            problems.append("the model has another configuration")
        weights, other = ours["weights"], theirs["weights"]
        changed = sorted(name for name in weights.keys() | other.keys() if weights.get(name) != other.get(name))
        problems += [f"weight {name!r} is {weights.get(name)}, was {other.get(name)}" for name in changed[:5]]
        if len(changed) > 5:
            problems.append(f"so are {len(changed) - 5} more weights")
        if problems:
            raise CheckpointError(
                f"{self.path} holds another run: {'; '.join(problems)}. Choose another folder, or go on with what the "
                "run began with"
            )

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in ascending order."""
        if not self._checkpoints.is_dir():
            return []
        found = [_STEP.fullmatch(path.name) for path in self._checkpoints.iterdir()]
        return sorted(int(match.group(1)) for match in found if match)

    def _place(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:08d}"

    def save(self, step: int, model: nn.Module, training: Mapping[str, Any], *, keep: int | None) -> None:
        """Write a checkpoint, and remove what is older than the latest `keep`.

        Raises:
            CheckpointError: the disk refuses.
        """
        target = self._place(step)
        if target.exists():
            return
        try:
            draft = make_draft(target)
            try:
                write_safetensors(draft / _MODEL, model.state_dict(), {"step": str(step)})
                torch.save(dict(training), draft / _TRAINING)
                force_to_disk(draft / _TRAINING)
                force_folder_to_disk(draft)
                os.replace(draft, target)
                force_folder_to_disk(target.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{target}: the checkpoint of step {step} cannot be written: {error}") from error
        if keep is not None:
            self._remove(self.steps()[:-keep])

    def _remove(self, steps: list[int]) -> None:
        if not steps:
            return
        # Out of the way in one step: a checkpoint is there or not.
        out = make_draft(self._checkpoints / "outdated")
        for step in steps:
            os.replace(self._place(step), out / str(step))
        shutil.rmtree(out, ignore_errors=True)

    def _clear_drafts(self) -> None:
        """Remove what killed processes left; while the lock is held nobody else writes here."""
        for path in (self.path, self._checkpoints):
            for draft in path.glob(".hooklens-*.draft"):
                shutil.rmtree(draft, ignore_errors=True)

    def load_weights(self, step: int) -> dict[str, Tensor]:
        """The weights of a checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = self._place(step) / _MODEL
        try:
            return read_safetensors(path)[0]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    def load_training(self, step: int) -> dict[str, Any]:
        """All else that the next step depends on.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = self._place(step) / _TRAINING
        try:
            # Tensors and plain values only: whatever else a file may hold is not run.
            training = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not isinstance(training, dict) or training.get("format") != FORMAT:
            raise CheckpointError(f"{path}: holds no training state of format {FORMAT!r}")
        return training


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a run's weights are: names, shapes and dtypes, and the configuration where there is one."""
    weights = {name: [str(one.dtype), *one.shape] for name, one in model.state_dict().items()}
    if not isinstance(model, HookedCausalLM):
        return {"cfg": None, "transforms": [], "weights": weights}
    return {"cfg": json.loads(model.cfg.to_json()), "transforms": list(model.transforms), "weights": weights}
