"""What a lens was fitted on: a network, the processing of its weights, and these weights by a sample of their entries.

A lens that is applied to another model gives numbers that look like any others. A hash of all weights would take longer
than the reading itself, and would tell a model from its copy in half precision. So entries of every weight are kept, at
places that its shape alone decides, and compared in the coarser of the two precisions: the same checkpoint in bfloat16
is the same model, a fine-tune is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import CheckpointError, InputError, TransformError
from hooklens.hooks.values import TensorValue
from hooklens.weights.processing import check_transforms_match

_PER_WEIGHT = 24
"""Entries of each weight."""


@dataclass(frozen=True, kw_only=True)
class Origin(TensorValue):
    """The model that something was fitted on.

    Attributes:
        fingerprint: of its configuration, see `HookedConfig.fingerprint`.
        transforms: the steps that its weights were processed by.
        dtype: of its weights.
        sample: entries of all of its weights.
    """

    fingerprint: str
    transforms: tuple[str, ...]
    dtype: torch.dtype
    sample: Float[Tensor, " entry"]

    @classmethod
    def of(cls, model: HookedCausalLM) -> "Origin":
        """That of a model as it is now, the adapters that act on it included."""
        return cls(
            fingerprint=model.cfg.fingerprint,
            transforms=tuple(map(str, model.transforms)),
            dtype=model.dtype,
            sample=_sample(model.named_weights()),
        )

    def check(self, model: HookedCausalLM, *, what: str, remedy: str) -> None:
        """Refuse another model.

        Args:
            model: the model.
            what: what was fitted, for messages.
            remedy: what to do where weights differ, for messages.

        Raises:
            TransformError: its weights were processed otherwise.
            InputError: its configuration or its weights are others.
        """
        try:
            check_transforms_match(self.transforms, model.transforms)
        except TransformError as error:
            raise TransformError(
                f"{what} (first) and the model (second) do not belong together: {error}; fit it on this model, or give "
                "the model that it was fitted on"
            ) from error
        if self.fingerprint != model.cfg.fingerprint:
            raise InputError(
                f"{what} was fitted on a model with another configuration (fingerprint {self.fingerprint}, this "
                f"model's is {model.cfg.fingerprint}); fit it on this model"
            )
        n_differing, n = self._count_differing(model)
        if n_differing:
            raise InputError(
                f"{what} was fitted on other weights: of {n} entries compared, {n_differing} differ; fit it on this "
                f"model, or {remedy}"
            )

    def _count_differing(self, model: HookedCausalLM) -> tuple[int, int]:
        """How many entries differ in the coarser of two precisions, and how many there are."""
        coarser = max(self.dtype, model.dtype, key=lambda one: torch.finfo(one).eps)
        found = _sample(model.named_weights()).to(coarser).double()
        kept = self.sample.to(coarser).double()
        # Rounding to one half precision and then to the other can end beside where rounding to the other does.
        halves = {self.dtype, model.dtype} == {torch.float16, torch.bfloat16}
        far = (found - kept).abs() > (torch.finfo(coarser).eps * kept.abs() if halves else 0)
        return int(far.sum()), len(found)

    def describe(self) -> dict[str, Any]:
        """All but the sample, as JSON has it."""
        return {
            "fingerprint": self.fingerprint,
            "transforms": list(self.transforms),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def restore(cls, described: Mapping[str, Any], sample: Tensor, *, path: object) -> "Origin":
        """What `describe` gave, with the sample.

        Raises:
            CheckpointError: it is damaged.
        """
        dtype = getattr(torch, str(described.get("dtype")), None)
        transforms = described.get("transforms")
        fingerprint = described.get("fingerprint")
        if (
            not isinstance(dtype, torch.dtype)
            or not isinstance(transforms, list)
            or not isinstance(fingerprint, str)
            or sample.ndim != 1
        ):
            raise CheckpointError(f"{path} is damaged: what it says of the model it was fitted on is {dict(described)}")
        return cls(fingerprint=fingerprint, transforms=tuple(map(str, transforms)), dtype=dtype, sample=sample)


@torch.no_grad()
def _sample(weights: Mapping[str, Tensor]) -> Float[Tensor, " entry"]:
    """Entries of all weights, in the order of their names."""
    return torch.cat([_take(weights[name]).double().cpu() for name in sorted(weights)])


def _take(weight: Tensor) -> Tensor:
    """Entries spread over a weight; a view of strange strides is not copied for it."""
    n = weight.numel()
    if not n:
        return weight.reshape(-1)
    # A step that shares no factor with sizes that are powers of two, so that the places fall into all rows and columns.
    places = (torch.arange(min(_PER_WEIGHT, n)) * 2654435761) % n
    return weight[torch.unravel_index(places.to(weight.device), weight.shape)] if weight.ndim else weight.reshape(1)
