"""Merging hooked models: weights in memory in, a new model out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooklens.adapters import merging as folders
from hooklens.causal_lm.loading import build_from_tensors
from hooklens.causal_lm.model import HookedCausalLM
from hooklens.causal_lm.settings import hand_on_settings
from hooklens.errors import InputError, join_names
from hooklens.model.parts.quantised import describe_maps, quantised_maps
from hooklens.weights.merging.kinds import MergedTensors, Outline, Target, collect, open_operand
from hooklens.weights.offloaded import refuse_offloaded


class HookedModel:
    """A hooked model, whose parameters are merged.

    Args:
        model: which.
        label: what to call it in messages.

    Raises:
        InputError: its weights have been processed, are quantised, offloaded, hold no values, or are not alone.
    """

    noun = "hooked models"

    def __init__(self, model: HookedCausalLM, label: str) -> None:
        decoder = model.as_decoder()
        if model.transforms:
            raise InputError(
                f"{label}: its weights have been processed ({', '.join(model.transforms)}), each model's in its own "
                "way, so that merging them means nothing; merge the models first"
            )
        if maps := quantised_maps(decoder):
            raise InputError(f"{label}: {describe_maps(maps)}; merge model.dequantize(), of each")
        refuse_offloaded(
            decoder,
            f"{label}: the merged model would have all weights in memory",
            InputError,
            otherwise="merge folders, which are merged tensor by tensor, and load what comes out with device_map",
        )
        self._model = model
        self._parameters = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
        declared = {weight.parameter for weight in model.cfg.description.weights.values()}
        if more := [name for name in self._parameters if name not in declared]:
            raise InputError(
                f"{label}: has parameters beside the network's own ({join_names(more, limit=5)}); merge adapters into "
                "its weights, or take off what was put around them, first"
            )
        if empty := [name for name, parameter in self._parameters.items() if parameter.is_meta]:
            raise InputError(f"{label}: {join_names(empty, limit=5)} hold no values (device 'meta'); load the weights")

    def outlines(self) -> Mapping[str, Outline]:
        """The parameters as they are stored; a tied unembedding is none of its own."""
        return {name: Outline(one.dtype, tuple(one.shape), one.device) for name, one in self._parameters.items()}

    def same(self) -> Mapping[str, str]:
        """None: each parameter stands under one name."""
        return {}

    def read(self, name: str, span: slice) -> Tensor:
        """Some entries of a parameter."""
        return self._parameters[name].reshape(-1)[span]

    def differences(self, other: "HookedModel") -> list[str]:
        """Fields of the configuration."""
        return folders.differing_fields(self._model.cfg, other._model.cfg)

    def check_target(self, target: Target) -> None:
        """Refuse a folder.

        Raises:
            InputError: one was given.
        """
        if target.out is not None:
            raise InputError(
                f"out={str(target.out)!r} goes with folders, and models were given: what comes back is a model, with "
                "save_pretrained"
            )

    def build(self, merged: MergedTensors, target: Target) -> HookedCausalLM:
        """A model of the same class on the same devices, with the tokenizer and settings of this one."""
        decoder = self._model.as_decoder()
        made = build_from_tensors(
            type(self._model),
            self._model.cfg,
            ((name, collect(outline, pieces)) for name, outline, pieces in merged),
            tokenizer=self._model.tokenizer,
            device=decoder.device if decoder.placement is None else decoder.placement,
        )
        hand_on_settings(self._model, made)
        return made

    def transformers_state(self) -> dict[str, Tensor]:
        """The state dict of the transformers model with the same logits."""
        self._transformers: Any = self._model.to_hf()
        state: dict[str, Tensor] = self._transformers.state_dict()
        return state

    def build_transformers(self, state: dict[str, Tensor], target: Target) -> HookedCausalLM:
        """A model of the same class that took over the weights."""
        decoder, copied = self._model.as_decoder(), {name: tensor.clone() for name, tensor in state.items()}
        # Its parameters may share their memory with this model's.
        self._transformers.load_state_dict(copied, assign=True)
        self._transformers.tie_weights()
        made = type(self._model).from_hf(self._transformers, self._model.tokenizer)
        hand_on_settings(self._model, made)
        return made.to(decoder.device)


open_operand.register(HookedCausalLM, HookedModel)
