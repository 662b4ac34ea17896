"""The bit-equal round trip: a checkpoint loaded and saved again holds the same tensors."""

import tempfile
from pathlib import Path

from hooklens.adapters import open_checkpoint
from hooklens.adapters.files.disk import DiskTensors
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import CheckpointError, UnsupportedModelError
from hooklens.model.parameters import ModelWeights
from hooklens.verification.probe import largest_difference, same_bits
from hooklens.verification.report import CheckResult

FILES = "round trip: tensors on disk"
WEIGHTS = "round trip: weights and config"

_DIFFERS = "is not bit-equal after saving: a weight rule's save is not the inverse of its load"


def check_round_trip(model: HookedCausalLM, folder: Path | None) -> list[CheckResult]:
    """Save the model and hold the new folder against the one it came from, and against the model.

    Args:
        model: as loaded.
        folder: the checkpoint it was loaded from; None for a model in memory.

    Raises:
        UnsupportedModelError: no checkpoint format can hold the model.
    """
    with tempfile.TemporaryDirectory(prefix="hooklens-verify-") as temporary:
        saved = Path(temporary) / "saved"
        model.save_pretrained(saved)
        results = [] if folder is None else _compare_files(DiskTensors(folder), DiskTensors(saved))
        return results + _compare_weights(model, saved)


def _compare_files(source: DiskTensors, written: DiskTensors) -> list[CheckResult]:
    """Each tensor under its name on disk.

    Names that hold no weight (buffers of old checkpoints, a tied unembedding stored twice) are not written
    again; that nothing else is missing is shown by loading the new folder.
    """
    # A file saved from the base model alone has its names without the base model's prefix.
    stored = {name.partition(".")[2]: name for name in written.names()} | {name: name for name in written.names()}
    results = []
    for name in source.names():
        if name not in stored:
            continue
        before, after = source.read(name), written.read(stored[name])
        equal = same_bits(before, after)
        measured = 0.0 if equal else largest_difference(before, after) if before.shape == after.shape else float("nan")
        results.append(_result(FILES, name, measured if equal or measured else float("nan"), _DIFFERS))
    unknown = sorted(set(written.names()) - {stored[name] for name in source.names() if name in stored})
    results += [_result(FILES, name, float("nan"), "is written, but not in the source") for name in unknown]
    return results


def _compare_weights(model: HookedCausalLM, saved: Path) -> list[CheckResult]:
    try:
        checkpoint = open_checkpoint(saved)
    except UnsupportedModelError:
        raise
    except CheckpointError as error:
        return [_result(WEIGHTS, "the saved folder", float("nan"), f"does not load: {error}")]
    weights, read = ModelWeights(model), dict(checkpoint.tensors())
    results = [
        _result(WEIGHTS, name, 0.0 if name in read and same_bits(read[name], weights[name]) else float("nan"), _DIFFERS)
        for name in weights
    ]
    same_config = checkpoint.cfg == model.cfg
    message = f"read back as {checkpoint.cfg}, saved {model.cfg}"
    return [*results, _result(WEIGHTS, "config.json", 0.0 if same_config else float("nan"), message)]


def _result(check: str, subject: str, measured: float, problem: str) -> CheckResult:
    return CheckResult(
        check=check, subject=subject, measured=measured, bound=0.0, message="" if measured == 0 else problem
    )
