"""What is verified: a model with its checkpoint, its input, and the checks that apply to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hooklens.adapters import download_checkpoint
from hooklens.bundled import bundled_path
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.verification.comparing.ways import can_be_cut, runs_in_pieces
from hooklens.verification.probe import Probe, make_probe
from hooklens.verification.reference import LOGITS, check_logits, reference_loader
from hooklens.verification.report import CheckResult
from hooklens.verification.round_trip import check_round_trip
from hooklens.verification.stages import SMALL_MODEL, Stage, find_unknown, stage_groups
from hooklens.verification.watching import check_firing
from hooklens.weights.offloaded import refuse_offloaded

FIRING = "firing"
ROUND_TRIP = "round trip"

_BUNDLED = "bundled:"


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A model under verification.

    Attributes:
        name: what a report calls it.
        folder: the checkpoint that it was loaded from; None: it was in memory.
        probe: the model and its input.
    """

    name: str
    folder: Path | None
    probe: Probe

    @classmethod
    def open(
        cls,
        model: HookedCausalLM | str | Path,
        *,
        layers: Sequence[int] | None = None,
        n_tokens: int = 20,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> "Subject":
        """Load a checkpoint, or take a model from memory.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            InputError: hooks are attached to the model, it lies on several devices or is offloaded, or layers it does
                not have.
        """
        folder = None if isinstance(model, HookedCausalLM) else find_folder(model)
        if isinstance(model, HookedCausalLM):
            loaded, name = model, "model in memory"
            if len(model.devices) > 1:
                raise InputError(
                    f"verify runs single blocks, and the model lies on several devices "
                    f"({', '.join(map(str, model.devices))}); verify it on one, after model.to(device), or give the "
                    "checkpoint and device="
                )
            refuse_offloaded(
                model,
                "verify changes copies of the weights, in float64, too, and holds these in memory",
                InputError,
                otherwise='verify it after model.dispatch({"": device}), or with layers=',
            )
        else:
            loaded, name = HookedCausalLM.from_pretrained(find_folder(model), device=device), str(model)
        probe = make_probe(loaded, layers=layers, n_tokens=n_tokens, seed=seed)
        dtype = str(loaded.dtype).removeprefix("torch.")
        size = f"{dtype}, {loaded.cfg.n_layers} layers, {len(loaded.hook_points())} hook points"
        return cls(name=f"{name} ({size})", folder=folder, probe=probe)

    def check_firing(self) -> tuple[list[CheckResult], "Subject", list[str]]:
        """The results of the first checks, the subject for all others, and notes.

        On a point that fails the first ones the others would mean nothing, so it is left out of them.
        """
        results = check_firing(self.probe)
        broken = frozenset(result.subject for result in results if not result.passed)
        if not broken:
            return results, self, []
        note = f"these fire wrongly or with other axes, and were left out of all other checks: {join_names(broken)}"
        return results, replace(self, probe=replace(self.probe, left_out=broken)), [note]

    def outer_stages(
        self, reference: str | Path | None, dtypes: Sequence[torch.dtype], *, logits: bool
    ) -> dict[str, list[Stage]]:
        """The checks that need a checkpoint or another model, by group, on the model as it was loaded."""
        probe = self.probe
        compared = find_folder(reference) if reference is not None else self.folder

        def check_against_reference() -> list[CheckResult]:
            source = probe.model if compared is None else compared
            return check_logits(probe, reference_loader(source, probe.model.device), dtypes)

        return {
            LOGITS: [(LOGITS, check_against_reference)] if logits else [],
            ROUND_TRIP: [(ROUND_TRIP, lambda: check_round_trip(probe.model, self.folder))],
        }

    def inner_stages(self, *, gradients: bool = True) -> dict[str, list[Stage]]:
        """The checks that need nothing but the network, by group."""
        return stage_groups(self.probe, gradients=gradients)

    def describe_sample(self) -> list[str]:
        """Which layers are checked, where that is not all of them."""
        n_layers = self.probe.model.cfg.n_layers
        if len(self.probe.layers) == n_layers:
            return []
        checked = ", ".join(map(str, self.probe.layers))
        return [
            f"hook points were checked in layers {checked} of {n_layers}; layers=range({n_layers}) checks every layer"
        ]


def find_folder(source: str | Path) -> Path:
    """The folder of a checkpoint."""
    if isinstance(source, str) and source.startswith(_BUNDLED):
        return bundled_path(source.removeprefix(_BUNDLED))
    return download_checkpoint(source)


def describe_limits(probe: Probe) -> list[str]:
    """What the checks leave out, and why."""
    unknown = find_unknown(probe)
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
    if probe.model.n_params_total > SMALL_MODEL and not unknown:
        notes.append("a large model: shown tensors were held against their sources, the logits not against the whole")
    return notes
