"""Decompositions of the residual stream, put together from its components.

Every function gives a stack whose parts sum to the stream at a place (or to what a norm or directions make
of it), up to rounding. That holds for the activations of one run; a run with edits at `hook_resid_pre`,
`hook_resid_mid` or `hook_resid_post` has streams that are not the sum of what was written.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from hooklens.activation_cache.arguments import check_flags
from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.components import (
    LabelledStack,
    embedding_names,
    head_names,
    join_stacks,
    neuron_names,
    output_names,
    read_biases,
    read_heads,
    read_neurons,
    read_points,
)
from hooklens.activation_cache.readout import Readout, check_projection, freeze_norm
from hooklens.activation_cache.stream import StreamPoint, locate, require, take_positions
from hooklens.errors import CacheError
from hooklens.hooks.choice import Choice, read_choice

Mode = Literal["all", "mlp", "attn"]


def make_readout(
    cache: CapturedActivations,
    point: StreamPoint,
    *,
    purpose: str,
    names: Iterable[str],
    apply_ln: bool = False,
    pos_slice: Choice = None,
    project_output_onto: Tensor | None = None,
) -> Readout:
    """How to read components that end at a place; with `apply_ln` through the norm that reads the stream there.

    Args:
        cache: what they are read from.
        point: the place.
        purpose: who reads them, for messages.
        names: the activations that will be read; all that are missing are told here, with the norm's scale.
        apply_ln: see `ActivationCache`, as for the rest.
        pos_slice: positions.
        project_output_onto: directions.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError: the directions have a wrong shape, or the cache has no weights.
    """
    check_flags(apply_ln=apply_ln)
    read_through = point.norm if apply_ln else None
    scale = [] if read_through is None else [f"{read_through}.hook_scale"]
    require(cache, dict.fromkeys([*names, *scale]), purpose=purpose)
    norm = None if read_through is None else freeze_norm(cache, read_through, pos_slice=pos_slice, purpose=purpose)
    directions = check_projection(project_output_onto, cache.cfg.d_model)
    return Readout(pos_slice=pos_slice, norm=norm, directions=directions)


def places_up_to(point: StreamPoint, *, incl_mid: bool) -> list[StreamPoint]:
    """Every layer's entrance up to a place; `incl_mid`: the places between attention and MLP, too.

    Raises:
        CacheError: `incl_mid` where no block has such a place.
    """
    check_flags(incl_mid=incl_mid)
    if incl_mid and not any(block.has_mid for block in point.cfg.blocks):
        why = "the blocks are parallel" if point.cfg.wiring == "parallel" else "no block has attention and an MLP"
        raise CacheError(f"accumulated_resid: incl_mid: {why}, so the stream has no such places")
    places = []
    for layer in range(point.layer + 1):
        places.append(locate(point.cfg, layer))
        if incl_mid and layer < point.layer and point.cfg.block(layer).has_mid:
            places.append(locate(point.cfg, layer, mlp_input=True))
    return [*places, point] if point.has_mid else places


def accumulate_stream(cache: CapturedActivations, places: list[StreamPoint], readout: Readout) -> LabelledStack:
    """The stream at some places; see `ActivationCache.accumulated_resid`. A norm applies with its bias."""
    streams = [take_positions(place.read(cache), -2, readout.pos_slice) for place in places]
    if readout.norm is not None:
        streams = [readout.norm.apply_to_whole(stream) for stream in streams]
    return LabelledStack(torch.stack(streams), [_label_place(place) for place in places])


def _label_place(point: StreamPoint) -> str:
    if point.layer == point.cfg.n_layers:
        return "final_post"
    return f"{point.layer}_{'mid' if point.has_mid else 'pre'}"


def names_by_layer(
    cache: CapturedActivations, point: StreamPoint, *, mode: Mode = "all", incl_embeds: bool = True
) -> list[str]:
    """Embeddings and layer outputs below a place, which `read_points` stacks; see `ActivationCache.decompose_resid`.

    Raises:
        CacheError: an unknown mode, or nothing is left to stack.
    """
    check_flags(incl_embeds=incl_embeds)
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise CacheError(f"decompose_resid: mode is {mode!r}; expected 'all', 'mlp' or 'attn'")
    names = [*(embedding_names(cache) if incl_embeds else []), *output_names(point, mode)]
    if not names:
        raise _nothing_below("layer outputs", point)
    return names


def names_by_head(cache: CapturedActivations, point: StreamPoint, *, incl_remainder: bool) -> list[str]:
    """What `decompose_by_head` reads."""
    check_flags(incl_remainder=incl_remainder)
    return [*head_names(cache, point.attention_layers), *([point.name_in(cache)] if incl_remainder else [])]


def names_by_neuron(cache: CapturedActivations, point: StreamPoint, *, incl_remainder: bool) -> list[str]:
    """What `decompose_by_neuron` reads."""
    check_flags(incl_remainder=incl_remainder)
    return [*neuron_names(cache, point.mlp_layers), *([point.name_in(cache)] if incl_remainder else [])]


def names_of_all(cache: CapturedActivations, point: StreamPoint, *, expand_neurons: bool) -> list[str]:
    """What `decompose_fully` reads."""
    check_flags(expand_neurons=expand_neurons)
    outputs = [f"blocks.{layer}.hook_mlp_out" for layer in point.mlp_layers]
    mlps = neuron_names(cache, point.mlp_layers) if expand_neurons else outputs
    return [*head_names(cache, point.attention_layers), *mlps, *embedding_names(cache), point.name_in(cache)]


def decompose_by_head(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, incl_remainder: bool
) -> LabelledStack:
    """Heads below a place, and what of the stream they leave; see `ActivationCache.stack_head_results`."""
    heads = read_heads(cache, point.attention_layers, readout) if point.attention_layers else None
    return _complete(heads, "heads", cache, point, readout, incl_remainder=incl_remainder)


def decompose_by_neuron(
    cache: CapturedActivations,
    point: StreamPoint,
    readout: Readout,
    *,
    neuron_slice: Choice,
    incl_remainder: bool,
) -> LabelledStack:
    """Neurons below a place, and what of the stream they leave; see `ActivationCache.stack_neuron_results`."""
    read_choice(neuron_slice, what="neuron_slice", refuse_tuple=True, error=CacheError)
    neurons = read_neurons(cache, point.mlp_layers, readout, neuron_slice) if point.mlp_layers else None
    return _complete(neurons, "neurons", cache, point, readout, incl_remainder=incl_remainder)


def decompose_fully(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, expand_neurons: bool
) -> LabelledStack:
    """Heads, neurons or MLPs, embeddings, biases; see `ActivationCache.get_full_resid_decomposition`."""
    stacks = []
    if point.attention_layers:
        stacks.append(read_heads(cache, point.attention_layers, readout))
    if point.mlp_layers and expand_neurons:
        stacks.append(read_neurons(cache, point.mlp_layers, readout))
    elif point.mlp_layers:
        stacks.append(read_points(cache, [f"blocks.{layer}.hook_mlp_out" for layer in point.mlp_layers], readout))
    stacks.append(read_points(cache, embedding_names(cache), readout))
    biases = read_biases(cache, point, readout, with_mlps=expand_neurons)
    return join_stacks([*stacks, LabelledStack(biases[None], ["bias"])])


def add_remainder(
    stack: LabelledStack, cache: CapturedActivations, point: StreamPoint, readout: Readout
) -> LabelledStack:
    """The stack, and what else is in the stream at a place."""
    remainder = readout.read_vectors(point.read(cache)) - stack.values.sum(0)
    return join_stacks([stack, LabelledStack(remainder[None], ["remainder"])])


def _complete(
    stack: LabelledStack | None,
    what: str,
    cache: CapturedActivations,
    point: StreamPoint,
    readout: Readout,
    *,
    incl_remainder: bool,
) -> LabelledStack:
    """The parts, None where there are none below the place, with the remainder if it is asked for."""
    if not incl_remainder:
        if stack is None:
            raise _nothing_below(what, point)
        return stack
    if stack is not None:
        return add_remainder(stack, cache, point, readout)
    return LabelledStack(readout.read_vectors(point.read(cache))[None], ["remainder"])


def _nothing_below(what: str, point: StreamPoint) -> CacheError:
    reason = f"the stream there is the embedding; give a layer from 1 to {point.cfg.n_layers}"
    if point.layer:
        reason = "no layer there has any"
    return CacheError(f"there are no {what} below layer {point.layer}: {reason}")
