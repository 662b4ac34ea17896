"""`verify`: all checks on one model, with a report."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hooklens.arguments import reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, UnsupportedModelError
from hooklens.progress import progress_bar
from hooklens.verification.reference import LOGITS
from hooklens.verification.report import VerificationReport
from hooklens.verification.subject import Subject, describe_limits


@reads()
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
        InputError: hooks are attached to the model, it lies on several devices or is offloaded, or layers it does not
            have.
    """
    subject = Subject.open(model, layers=layers, n_tokens=n_tokens, device=device, seed=seed)
    _check_dtypes(dtypes)
    with torch.no_grad():
        outer = subject.outer_stages(reference, dtypes, logits=logits)
        results, sound, left_out = subject.check_firing()
        notes = [*subject.describe_sample(), *left_out, *describe_limits(sound.probe)]
        groups = {**outer, **sound.inner_stages(gradients=gradients)}
        stages = [stage for group in groups.values() for stage in group]
        with progress_bar("verify", stages, unit="stage", progress=progress) as bar:
            for name, run in bar:
                bar.set_postfix_str(name, refresh=False)
                try:
                    results += run()
                except UnsupportedModelError as error:
                    notes.append(f"{name}: left out, no transformers architecture holds this network ({error})")
    if reference is None and subject.folder is None and any(result.check == LOGITS for result in results):
        notes.append(f"{LOGITS}: the model is in memory, so the reference is its own export, model.to_hf()")
    return VerificationReport(subject.name, results, notes)


def _check_dtypes(dtypes: Sequence[torch.dtype]) -> None:
    wrong = [dtype for dtype in dtypes if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point)]
    if wrong:
        raise InputError(f"verify: dtypes holds {wrong}; expected floating dtypes such as torch.float32")
