"""Weights of several steps of a training, put into a model one after another."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.adapters import open_checkpoint
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig
from hooklens.errors import InputError
from hooklens.model.parameters import fill_parameters
from hooklens.tokens import Tokenizer
from hooklens.training.keeping.folder import RunFolder


class RunWeights:
    """The weights of a run of `train`."""

    def __init__(
        self,
        folder: RunFolder,
        template: nn.Module | None,
        *,
        tokenizer: Tokenizer | None,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        described = folder.read_run()
        if described["cfg"] is None and template is None:
            raise InputError(
                f"{folder.path} is a run of a module of somebody's own: give model=, which its weights fit"
            )
        self._folder, self._template, self._tokenizer = folder, template, tokenizer
        self._dtype, self._device = dtype, device
        self._cfg = None if described["cfg"] is None else HookedConfig.from_dict(described["cfg"])
        self._transforms = tuple(described["transforms"])

    def fill(self, model: nn.Module | None, step: int) -> nn.Module:
        """The model of a step: the given one with other weights, or a new one."""
        weights = {name: self._place(one) for name, one in self._folder.load_weights(step).items()}
        if model is None and self._template is None:
            assert self._cfg is not None
            made = HookedCausalLM.from_state_dict(weights, self._cfg, self._tokenizer)
            made.transforms = self._transforms
            return made
        if model is None:
            model = copy.deepcopy(self._template)
            assert model is not None
            model = model.to(self._device).eval()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"{self._folder.path}: the weights do not fit into the model: {error}") from error
        return model

    def _place(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, self._dtype if weight.is_floating_point() else None)


class PublishedWeights:
    """The weights of checkpoints in Hugging Face format."""

    def __init__(
        self,
        places: Mapping[int, tuple[str | Path, str | None]],
        hub: Mapping[str, Any],
        *,
        tokenizer: Tokenizer | None,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self._places, self._hub = places, hub
        self._tokenizer, self._dtype, self._device = tokenizer, dtype, device

    def fill(self, model: nn.Module | None, step: int) -> nn.Module:
        """The model of a step: the given one with other weights where it can hold them, else a new one."""
        source, revision = self._places[step]
        checkpoint = None
        if isinstance(model, HookedCausalLM) and not str(source).startswith("bundled:"):
            checkpoint = open_checkpoint(source, revision=revision, **self._hub)
        if checkpoint is None or not isinstance(model, HookedCausalLM) or model.cfg != checkpoint.cfg:
            return HookedCausalLM.from_pretrained(
                source,
                revision=revision,
                tokenizer=self._tokenizer,
                dtype="auto" if self._dtype is None else self._dtype,
                device=self._device,
                **self._hub,
            )
        dtype = checkpoint.dtype if self._dtype is None else self._dtype
        with torch.inference_mode(mode=False):
            fill_parameters(model, checkpoint.tensors(), device=self._device, dtype=dtype, by_columns=True)
        model.transforms = checkpoint.transforms
        model.generation_config = dict(checkpoint.generation_config)
        return model
