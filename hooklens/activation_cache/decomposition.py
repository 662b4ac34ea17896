"""Decompositions of the residual stream, put together from its components.

Every function gives a stack whose parts sum to the stream at a place (or to what a norm or directions make
of it), up to rounding. That holds for the activations of one run; a run with edits at `hook_resid_pre`,
`hook_resid_mid` or `hook_resid_post` has streams that are not the sum of what was written.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.components import (
    LabelledStack,
    embedding_names,
    join_stacks,
    output_names,
    read_biases,
    read_heads,
    read_neurons,
    read_points,
)
from hooklens.activation_cache.readout import Readout, check_projection, freeze_norm
from hooklens.activation_cache.stream import PosSlice, StreamPoint, locate, require
from hooklens.errors import CacheError

Mode = Literal["all", "mlp", "attn"]
NeuronSlice = int | slice | Iterable[int] | None


def make_readout(
    cache: CapturedActivations,
    point: StreamPoint,
    *,
    apply_ln: bool = False,
    pos_slice: PosSlice = None,
    project_output_onto: Tensor | None = None,
) -> Readout:
    """How to read components that end at a place; with `apply_ln` through the norm that reads the stream there.

    Raises:
        CacheError: the directions have a wrong shape, or the norm's scale or weights are not at hand.
    """
    norm = None
    if apply_ln and point.norm is not None:
        norm = freeze_norm(cache, point.norm, pos_slice=pos_slice, purpose="apply_ln")
    directions = check_projection(project_output_onto, cache.cfg.d_model)
    return Readout(pos_slice=pos_slice, norm=norm, directions=directions)


def accumulate_stream(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, incl_mid: bool
) -> LabelledStack:
    """The stream at every layer's entrance up to a place; see `ActivationCache.accumulated_resid`."""
    places = []
    for layer in range(point.layer + 1):
        places.append(locate(cache.cfg, layer))
        if incl_mid and layer < point.layer:
            places.append(locate(cache.cfg, layer, mlp_input=True))
    if point.has_mid:
        places.append(point)
    if incl_mid and cache.cfg.wiring == "parallel":
        raise CacheError("accumulated_resid: incl_mid: the blocks are parallel, so the stream has no such places")
    chosen = [next((name for name in place.names if name in cache), place.names[0]) for place in places]
    require(cache, chosen, purpose="accumulated_resid")
    return LabelledStack(
        torch.stack([readout.read_vectors(cache[name]) for name in chosen]), [_label_place(place) for place in places]
    )


def _label_place(point: StreamPoint) -> str:
    if point.layer == point.cfg.n_layers:
        return "final_post"
    return f"{point.layer}_{'mid' if point.has_mid else 'pre'}"


def decompose_by_layer(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, mode: Mode, incl_embeds: bool
) -> LabelledStack:
    """Embeddings and layer outputs below a place; see `ActivationCache.decompose_resid`.

    Raises:
        CacheError: an unknown mode, or nothing is left to stack.
    """
    if mode not in get_args(Mode):
        raise CacheError(f"decompose_resid: mode is {mode!r}; expected 'all', 'mlp' or 'attn'")
    names = [*(embedding_names(cache) if incl_embeds else []), *output_names(point, mode)]
    if not names:
        raise _nothing_below("layer outputs", point)
    return read_points(cache, names, readout)


def decompose_by_head(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, incl_remainder: bool
) -> LabelledStack:
    """Heads below a place, and what of the stream they leave; see `ActivationCache.stack_head_results`."""
    if not point.attention_layers:
        return _only_remainder("heads", cache, point, readout, incl_remainder=incl_remainder)
    heads = read_heads(cache, point.attention_layers, readout)
    return _with_remainder(heads, cache, point, readout) if incl_remainder else heads


def decompose_by_neuron(
    cache: CapturedActivations,
    point: StreamPoint,
    readout: Readout,
    *,
    neuron_slice: NeuronSlice,
    incl_remainder: bool,
) -> LabelledStack:
    """Neurons below a place, and what of the stream they leave; see `ActivationCache.stack_neuron_results`."""
    if not point.mlp_layers:
        return _only_remainder("neurons", cache, point, readout, incl_remainder=incl_remainder)
    chosen = _choose_neurons(neuron_slice, cache.cfg.d_mlp)
    neurons = read_neurons(cache, point.mlp_layers, readout, chosen)
    return _with_remainder(neurons, cache, point, readout) if incl_remainder else neurons


def decompose_fully(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, expand_neurons: bool
) -> LabelledStack:
    """Heads, neurons or MLPs, embeddings, biases; see `ActivationCache.get_full_resid_decomposition`."""
    stacks = []
    if point.attention_layers:
        stacks.append(read_heads(cache, point.attention_layers, readout))
    if point.mlp_layers:
        outputs = [f"blocks.{layer}.hook_mlp_out" for layer in point.mlp_layers]
        if expand_neurons:
            stacks.append(read_neurons(cache, point.mlp_layers, readout))
        else:
            stacks.append(read_points(cache, outputs, readout))
    stacks.append(read_points(cache, embedding_names(cache), readout))
    biases = read_biases(cache, point, readout, with_mlps=expand_neurons)
    return join_stacks([*stacks, LabelledStack(biases[None], ["bias"])])


def _choose_neurons(neuron_slice: NeuronSlice, d_mlp: int) -> list[int] | None:
    if neuron_slice is None:
        return None
    if isinstance(neuron_slice, slice):
        wanted = list(range(d_mlp)[neuron_slice])
    else:
        wanted = [neuron_slice] if isinstance(neuron_slice, int) else [int(neuron) for neuron in neuron_slice]
    outside = [neuron for neuron in wanted if not -d_mlp <= neuron < d_mlp]
    if outside or not wanted:
        found = f"neurons {outside} are out of range" if outside else "no neuron is chosen"
        raise CacheError(f"neuron_slice={neuron_slice!r}: {found}; an MLP has neurons 0 to {d_mlp - 1}")
    return [neuron % d_mlp for neuron in wanted]


def _with_remainder(
    stack: LabelledStack, cache: CapturedActivations, point: StreamPoint, readout: Readout
) -> LabelledStack:
    remainder = _read_stream(cache, point, readout) - stack.values.sum(0)
    return join_stacks([stack, LabelledStack(remainder[None], ["remainder"])])


def _only_remainder(
    what: str, cache: CapturedActivations, point: StreamPoint, readout: Readout, *, incl_remainder: bool
) -> LabelledStack:
    if not incl_remainder:
        raise _nothing_below(what, point)
    return LabelledStack(_read_stream(cache, point, readout)[None], ["remainder"])


def _read_stream(cache: CapturedActivations, point: StreamPoint, readout: Readout) -> Float[Tensor, "*batch_pos read"]:
    require(cache, () if any(name in cache for name in point.names) else point.names[:1], purpose="the remainder")
    return readout.read_vectors(point.read(cache))


def _nothing_below(what: str, point: StreamPoint) -> CacheError:
    return CacheError(
        f"there are no {what} below layer {point.layer}: the stream there is the embedding; give a layer from 1 to "
        f"{point.cfg.n_layers}"
    )
