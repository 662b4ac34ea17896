"""What a direction was made from, kept with it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.evaluation.fingerprint import hash_values, model_fingerprint
from hooklens.patching.results.file import TEXT, WHOLE_NUMBER, Expected
from hooklens.steering.activations import Prompts
from hooklens.steering.errors import SteeringError
from hooklens.weights.processing import check_transforms_match

STEERS = "steer:"
"""Begins the names of processing steps that steer by weights; they leave the stream's coordinates as they are."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a direction was made from.

    Attributes:
        method: how it was made.
        model: a hash of configuration, weight processing, and every entry of the weights.
        transforms: the weight-processing steps that the model had been through.
        dtype: of the activations, `"float32"`.
        positions: the tokens that counted, in words.
        prompts: a hash of all prompts' tokens, and of which ones counted.
        counts: how many prompts (of concepts: tokens) each class had.
        seed: of what was drawn; None: nothing was.
    """

    method: str
    model: str
    transforms: tuple[str, ...]
    dtype: str
    positions: str
    prompts: str
    counts: tuple[int, ...]
    seed: int | None = None

    def facts(self) -> dict[str, str]:
        """What displays tell of it."""
        return {
            "made from": f"{' and '.join(f'{count:,}' for count in self.counts)} of each class; {self.positions}",
            "model": f"{self.model[:12]}, {self.dtype}" + "".join(f", {step}" for step in self.transforms),
        }

    @classmethod
    def of(
        cls,
        model: HookedCausalLM,
        prompts: Iterable[Prompts],
        *,
        method: str,
        positions: str,
        counts: tuple[int, ...],
        seed: int | None = None,
    ) -> "Provenance":
        """The record of a run of a model on prompts."""
        return cls(
            method=method,
            model=model_fingerprint(model),
            transforms=tuple(model.transforms),
            dtype=str(model.dtype).removeprefix("torch."),
            positions=positions,
            prompts=hash_values([one.fingerprint for one in prompts]),
            counts=counts,
            seed=seed,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return {**asdict(self), "transforms": list(self.transforms), "counts": list(self.counts)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Provenance":
        """What `to_json` gave."""
        return cls(**dict(found, transforms=tuple(found["transforms"]), counts=tuple(found["counts"])))


def _is_record(found: Any) -> bool:
    texts = ("method", "model", "dtype", "positions", "prompts")
    return (
        isinstance(found, dict)
        and found.keys() == Provenance.__dataclass_fields__.keys()
        and all(TEXT.holds(found[name]) for name in texts)
        and isinstance(getattr(torch, found["dtype"], None), torch.dtype)
        and isinstance(found["transforms"], list)
        and all(map(TEXT.holds, found["transforms"]))
        and isinstance(found["counts"], list)
        and all(map(WHOLE_NUMBER.holds, found["counts"]))
        and (found["seed"] is None or WHOLE_NUMBER.holds(found["seed"]))
    )


PROVENANCE = Expected("a record of where directions come from", _is_record)


def check_fits(model: HookedCausalLM, provenance: Provenance, sizes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model in which directions would mean something else.

    Another model of the same shape, such as a fine-tune or one that steers by its weights, is allowed.

    Args:
        model: where they are to be used.
        provenance: of the directions.
        sizes: of each hook point, the shape of what is added to one token there.

    Raises:
        TransformError: its weights were processed otherwise.
        SteeringError: it lacks a hook point, or has another width there.
    """
    records = (
        [step for step in record if not step.startswith(STEERS)] for record in (provenance.transforms, model.transforms)
    )
    check_transforms_match(*records)
    points, problems = model.cfg.description.points, []
    for name, shape in sizes.items():
        if name not in points:
            problems.append(f"{name!r}, which the model does not have")
            continue
        found = tuple(model.cfg.size(axis) for axis in points[name].axes if axis not in ("batch", "pos"))
        if found != shape:
            problems.append(f"{name!r}, where a token has {list(found)} entries and the direction {list(shape)}")
    if problems:
        raise SteeringError(f"directions do not fit the model: there is one at {'; one at '.join(problems[:5])}")
