"""`verify`: all checks on one model, with a report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hooklens.adapters.hub import find_folder
from hooklens.bundled import bundled_path
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, UnsupportedModelError, join_names
from hooklens.optional import import_package
from hooklens.verification.editing import check_editing
from hooklens.verification.gradients import check_gradients
from hooklens.verification.probe import Probe, make_probe
from hooklens.verification.reference import LOGITS, cast_model, check_logits, reference_loader
from hooklens.verification.report import CheckResult, VerificationReport
from hooklens.verification.round_trip import check_round_trip
from hooklens.verification.sums import check_padding, check_sums
from hooklens.verification.watching import check_captures, check_firing, check_watching, check_writing_back

_BUNDLED = "bundled:"
# Below this many parameters a copy in float64 costs little, and gradients can be held against differences.
_SMALL_MODEL = 50_000_000
# Seconds after which a run counts as long and shows its progress.
_LONG = 3.0

Stage = tuple[str, Callable[[], list[CheckResult]]]


def verify(
    model: HookedCausalLM | str | Path,
    *,
    reference: str | Path | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    logits: bool = True,
    gradients: bool = True,
    layers: Sequence[int] | None = None,
    n_tokens: int = 20,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> VerificationReport:
    """Check a model against its reference and against HookLens' promises.

    Logits against transformers, bit-equal round trip, and for every hook point: it fires once with the declared
    axes, watching it leaves the logits bit-identical, writing back its value changes nothing, an edit reaches
    all that is downstream and nothing else, edits in place and returned agree, its gradient is the derivative
    of an edit. Then padding on both sides against single rows, and the sums of the residual stream.

    Args:
        model: a checkpoint (hub name, local folder, `"bundled:tiny-llama"`), or a model in memory.
        reference: the checkpoint whose transformers model to compare logits with; None: the checkpoint itself,
            for a model in memory `model.to_hf()`.
        dtypes: in which to compare logits; each takes a copy of the model, and the reference in float64 a larger
            one.
        logits: compare logits with transformers at all.
        gradients: check gradients.
        layers: blocks whose hook points are checked; None: all, of a model with more than four the first, the
            middle and the last.
        n_tokens: length of the longest row of the random input.
        device: where to load a checkpoint; a model in memory is verified where it is.
        seed: of the input and all directions.
        progress: show a progress bar when it takes long.

    Returns:
        A report: `report.passed`, `report.failures`, `print(report)`. What could not be checked is in
        `report.notes`.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        InputError: hooks are attached to the model, or layers it does not have.
    """
    folder = None if isinstance(model, HookedCausalLM) else _find_folder(model)
    if isinstance(model, HookedCausalLM):
        loaded, subject = model, "model in memory"
    else:
        loaded, subject = HookedCausalLM.from_pretrained(_find_folder(model), device=device), str(model)
    _check_dtypes(dtypes)
    probe = make_probe(loaded, layers=layers, n_tokens=n_tokens, seed=seed)
    compared = (_find_folder(reference) if reference is not None else folder) if logits else None
    notes = _describe_sample(probe)
    with torch.no_grad():
        results = check_firing(probe)
        sound = _leave_out_broken(probe, results, notes)
        stages = [
            *([_logits_stage(probe, compared, dtypes)] if logits else ()),
            ("round trip", lambda: check_round_trip(loaded, folder)),
            *_hook_point_stages(sound),
            *([_gradient_stage(sound)] if gradients else ()),
        ]
        for name, run in _show_progress(stages, progress=progress):
            try:
                results += run()
            except UnsupportedModelError as error:
                notes.append(f"{name}: left out, no transformers architecture holds this network ({error})")
    if compared is None and any(result.check == LOGITS for result in results):
        notes.append(f"{LOGITS}: the model is in memory, so the reference is its own export, model.to_hf()")
    dtype = str(loaded.dtype).removeprefix("torch.")
    size = f"{dtype}, {loaded.cfg.n_layers} layers, {len(loaded.hook_points())} hook points"
    return VerificationReport(f"{subject} ({size})", results, notes)


def _find_folder(source: str | Path) -> Path:
    if isinstance(source, str) and source.startswith(_BUNDLED):
        return bundled_path(source.removeprefix(_BUNDLED))
    return find_folder(source)


def _check_dtypes(dtypes: Sequence[torch.dtype]) -> None:
    wrong = [dtype for dtype in dtypes if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point)]
    if wrong:
        raise InputError(f"verify: dtypes holds {wrong}; expected floating dtypes such as torch.float32")


def _describe_sample(probe: Probe) -> list[str]:
    n_layers = probe.model.cfg.n_layers
    if len(probe.layers) == n_layers:
        return []
    checked = ", ".join(map(str, probe.layers))
    return [f"hook points were checked in layers {checked} of {n_layers}; layers=range({n_layers}) checks every layer"]


def _leave_out_broken(probe: Probe, fired: Sequence[CheckResult], notes: list[str]) -> Probe:
    """The probe for all further checks: on a point that fails the first ones they would mean nothing."""
    broken = frozenset(result.subject for result in fired if not result.passed)
    if not broken:
        return probe
    notes.append(f"these fire wrongly or with other axes, and were left out of all other checks: {join_names(broken)}")
    return replace(probe, left_out=broken)


def _logits_stage(probe: Probe, reference: Path | None, dtypes: Sequence[torch.dtype]) -> Stage:
    def run() -> list[CheckResult]:
        source = probe.model if reference is None else reference
        return check_logits(probe, reference_loader(source, probe.model.device), dtypes)

    return LOGITS, run


def _hook_point_stages(probe: Probe) -> Iterator[Stage]:
    yield "watching", lambda: [*check_watching(probe), *check_captures(probe)]
    for name in probe.names:
        yield name, lambda name=name: [*check_writing_back(probe, name), *check_editing(probe, name)]  # type: ignore[misc]
    yield "padding", lambda: check_padding(probe)
    yield "sums", lambda: check_sums(probe)


def _gradient_stage(probe: Probe) -> Stage:
    """Gradients of a small model are checked on a copy in float64."""

    def run() -> list[CheckResult]:
        if probe.dtype == torch.float64 or probe.model.n_params_total > _SMALL_MODEL:
            return check_gradients(probe)
        wide = cast_model(probe.model, torch.float64)
        return check_gradients(replace(probe, model=wide))

    return "gradients", run


def _show_progress(stages: Sequence[Stage], *, progress: bool) -> Iterator[Stage]:
    bar = import_package("tqdm.auto").tqdm(stages, desc="verify", delay=_LONG, disable=not progress, leave=False)
    for stage in bar:
        bar.set_postfix_str(stage[0], refresh=False)
        yield stage
