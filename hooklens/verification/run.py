"""`verify`: all checks on one model, with a report."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from hooklens.adapters import download_checkpoint
from hooklens.bundled import bundled_path
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, UnsupportedModelError, join_names
from hooklens.optional import import_package
from hooklens.verification.comparing.edit_values import check_edit_values
from hooklens.verification.comparing.options import check_caches, check_chosen, check_loss
from hooklens.verification.comparing.recomputing import check_explicit_logits, check_ways
from hooklens.verification.comparing.single_edits import SingleEdits
from hooklens.verification.comparing.ways import can_be_cut, runs_in_pieces
from hooklens.verification.editing import check_editing
from hooklens.verification.explicit import Batch, ExplicitNetwork
from hooklens.verification.gradients import check_gradients
from hooklens.verification.probe import Probe, make_probe
from hooklens.verification.reference import LOGITS, cast_model, check_logits, reference_loader
from hooklens.verification.report import CheckResult, VerificationReport
from hooklens.verification.round_trip import check_round_trip
from hooklens.verification.watching import check_captures, check_firing, check_watching, check_writing_back

RUNS = "checks run to their end"

_BUNDLED = "bundled:"
# Below this many parameters a copy in float64 costs little: gradients can be held against differences, and the logits
# of each way of running against an explicit computation.
_SMALL_MODEL = 50_000_000
# Below this many the logits of each of some hundred edits can.
_TINY_MODEL = 5_000_000
# Seconds after which a run counts as long and shows its progress.
_LONG = 3.0

Stage = tuple[str, Callable[[], Iterable[CheckResult]]]


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
    of an edit.

    The network is computed a second time, by plain arithmetic from its definitions. Each shown tensor is held against
    what its sources make, and the logits against those of the whole computation: in one batch, with padding anywhere,
    in a long row, at positions up to `n_ctx`, in prefill and steps, on a frozen prefix. Edits of each head, and of
    the first, a middle and the last neuron, position and key, are held against the computation with the edit in it.
    Then what arguments choose: positions, layers, rows of a cache, the entries of an edit.

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
        InputError: hooks are attached to the model, it lies on several devices, or layers it does not have.
    """
    folder = None if isinstance(model, HookedCausalLM) else _find_folder(model)
    if isinstance(model, HookedCausalLM):
        loaded, subject = model, "model in memory"
        if len(model.devices) > 1:
            raise InputError(
                f"verify runs single blocks, and the model lies on several devices "
                f"({', '.join(map(str, model.devices))}); verify it on one, after model.to(device), or give the "
                "checkpoint and device="
            )
    else:
        loaded, subject = HookedCausalLM.from_pretrained(_find_folder(model), device=device), str(model)
    _check_dtypes(dtypes)
    probe = make_probe(loaded, layers=layers, n_tokens=n_tokens, seed=seed)
    compared = (_find_folder(reference) if reference is not None else folder) if logits else None
    notes = _describe_sample(probe)
    with torch.no_grad():
        results = check_firing(probe)
        sound = _leave_out_broken(probe, results, notes)
        notes += _describe_limits(sound)
        stages = [
            *([_logits_stage(probe, compared, dtypes)] if logits else ()),
            ("round trip", lambda: check_round_trip(loaded, folder)),
            *hook_point_stages(sound, gradients=gradients),
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
    return download_checkpoint(source)


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


def hook_point_stages(probe: Probe, *, gradients: bool = True) -> list[Stage]:
    """The checks that need nothing but the network, each made when it is asked for.

    An error of the network is a failure like any other, so that nothing is lost that was found before.

    Args:
        probe: the model and its input.
        gradients: those of gradients, too.
    """
    return [_report_errors(stage) for stage in _list_stages(probe, gradients=gradients)]


def _list_stages(probe: Probe, *, gradients: bool) -> Iterator[Stage]:
    size = probe.model.n_params_total

    @cache
    def wide() -> Probe:
        """The model in float64, if it is small; else as it is."""
        if probe.dtype == torch.float64 or size > _SMALL_MODEL:
            return probe
        return replace(probe, model=cast_model(probe.model, torch.float64))

    @cache
    def single_edits() -> SingleEdits:
        explicit = size <= _TINY_MODEL and not _find_unknown(probe)
        return SingleEdits(wide() if explicit else probe, explicit=explicit)

    yield "shown tensors", lambda: check_ways(probe)
    if size <= _SMALL_MODEL and not _find_unknown(probe):
        yield "explicit logits", lambda: check_explicit_logits(wide())
    for name in probe.names:
        yield f"single edits, {name}", lambda name=name: single_edits().check(name)  # type: ignore[misc]
    yield "pairs of edits", lambda: single_edits().check_pairs()
    yield "positions and layers", lambda: check_chosen(probe) if can_be_cut(probe) else ()
    yield "loss", lambda: check_loss(probe) if can_be_cut(probe) else ()
    yield "caches", lambda: check_caches(probe) if runs_in_pieces(probe) else ()
    yield "edits as values", lambda: check_edit_values(probe) if can_be_cut(probe) and probe.layers else ()
    yield "watching", lambda: [*check_watching(probe), *check_captures(probe)]
    for name in probe.names:
        yield name, lambda name=name: [*check_writing_back(probe, name), *check_editing(probe, name)]  # type: ignore[misc]
    if gradients:
        yield "gradients", lambda: check_gradients(wide())


def _report_errors(stage: Stage) -> Stage:
    """The stage, with an error that ends it as its last result."""
    name, run = stage

    def run_to_the_end() -> Iterator[CheckResult]:
        try:
            yield from run()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            yield CheckResult(check=RUNS, subject=name, measured=1.0, bound=0.0, message=message)

    return name, run_to_the_end


def _find_unknown(probe: Probe) -> dict[str, str]:
    """The parts that have no definition here, and why."""
    batch = Batch(tokens=probe.tokens, mask=torch.ones_like(probe.tokens, dtype=torch.bool))
    return ExplicitNetwork(probe.model, batch).why_unknown()


def _describe_limits(probe: Probe) -> list[str]:
    """What the checks leave out, and why."""
    unknown = _find_unknown(probe)
    notes = [
        f"not recomputed: {part} ({reason}); what its hook points show was not held against their sources, the rest of "
        "the network was"
        for part, reason in unknown.items()
    ]
    if unknown:
        notes.append("the logits were not held against an explicit computation, which needs a definition of every part")
    if not can_be_cut(probe):
        notes.append(
            f"rows of {probe.n_tokens} tokens: too short for checks of padding inside rows, caches and choices"
        )
    elif probe.layers and not runs_in_pieces(probe):
        reason = (
            "attention of one's own" if any(part.endswith(".attn") for part in unknown) else "frequencies by length"
        )
        notes.append(f"key-value caches were not checked: {reason}")
    if probe.model.n_params_total > _SMALL_MODEL and not unknown:
        notes.append("a large model: shown tensors were held against their sources, the logits not against the whole")
    return notes


def _show_progress(stages: Sequence[Stage], *, progress: bool) -> Iterator[Stage]:
    bar = import_package("tqdm.auto").tqdm(stages, desc="verify", delay=_LONG, disable=not progress, leave=False)
    for stage in bar:
        bar.set_postfix_str(stage[0], refresh=False)
        yield stage
