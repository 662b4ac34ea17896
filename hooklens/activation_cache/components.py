"""The parts that the residual stream is the sum of, at several grains.

The whole output of a layer, or of each head, or of each neuron:

    attn_out[l] = sum over heads of z W_O + b_O          mlp_out[l] = sum over neurons of post W_out + b_out

Biases belong to no head and no neuron; they are a component of their own. Where a norm stands at the exit
of a branch (`cfg.norm_after`), heads and neurons are read behind it, with its denominator held at the value
it had in the run: what a head really adds to the stream. The factor `cfg.residual_scale` is in all of them.

Up to rounding the parts of a decomposition sum to the stream at a place (or to what a norm or directions make of it).
That holds for the activations of one run; a run with edits at `hook_resid_pre`, `hook_resid_mid` or `hook_resid_post`
has streams that are not the sum of what was written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.arguments import Mode, choose
from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.readout import FrozenNorm, Readout, freeze_norm, like
from hooklens.activation_cache.stream import StreamPoint, require_weight, take_positions
from hooklens.axes import EMBEDDINGS
from hooklens.config import ShortformerPositions
from hooklens.errors import CacheError
from hooklens.hooks.choice import Choice, read_choice
from hooklens.precision import widen


class LabelledStack(NamedTuple):
    """Components along the first axis, with a label each.

    Attributes:
        values: what was read of each, `[component *batch pos d_model]`, or with directions `n` numbers in the
            place of `d_model`.
        labels: `"embed"`, `"3_attn_out"`, `"L3H5"`, `"L3N17"`, `"bias"`, ...
    """

    values: Float[Tensor, "component *batch_pos read"]
    labels: list[str]


@dataclass(frozen=True)
class Components:
    """Components of the stream that are read alike.

    Attributes:
        noun: what they are, for messages.
        names: the activations that have to be captured for them; none where there are no such components.
        read: reads them in a cache that holds these, a stack for each layer.
    """

    noun: str
    names: list[str]
    read: Callable[[CapturedActivations, Readout], Iterator[LabelledStack]]


class _Branch(NamedTuple):
    """How attention or an MLP writes to the stream.

    Attributes:
        module: where it stands in a block.
        exit_norm: the norm behind it, where there is one.
        weight, bias: the map into the stream.
        activation: what goes into that map.
    """

    module: str
    exit_norm: str
    weight: str
    bias: str
    activation: str

    def names(self, cache: CapturedActivations, layers: Sequence[int]) -> list[str]:
        """What has to be captured of some layers: what goes into the map, and the scales of exit norms."""
        behind = [layer for layer in layers if cache.cfg.block(layer).norm_after]
        return [
            *(f"blocks.{layer}.{self.module}.{self.activation}" for layer in layers),
            *(f"blocks.{layer}.{self.exit_norm}.hook_scale" for layer in behind),
        ]

    def freeze_exit(self, cache: CapturedActivations, layer: int, readout: Readout) -> FrozenNorm | None:
        """The norm behind the branch; None where there is none."""
        if not cache.cfg.block(layer).norm_after:
            return None
        purpose = "what is added to the stream behind a norm"
        return freeze_norm(cache, f"blocks.{layer}.{self.exit_norm}", pos_slice=readout.pos_slice, purpose=purpose)

    def written_bias(
        self, cache: CapturedActivations, layer: int, readout: Readout, stream: Float[Tensor, "*batch_pos d_model"]
    ) -> Float[Tensor, "... d_model"]:
        """What the bias adds to a stream; that of the norm behind the branch is part of it."""
        name = f"blocks.{layer}.{self.module}.{self.bias}"
        has_bias = name in cache.cfg.description.weights
        bias = like(require_weight(cache, name), stream) if has_bias else torch.zeros_like(widen(stream))
        norm = self.freeze_exit(cache, layer, readout)
        return bias if norm is None else norm.apply_to_whole(bias)


ATTN = _Branch("attn", "ln1_post", "W_O", "b_O", "hook_z")
MLP = _Branch("mlp", "ln2_post", "W_out", "b_out", "hook_post")


def of_streams(cache: CapturedActivations, places: list[StreamPoint]) -> Components:
    """The streams at some places, each whole, so that a norm applies with its bias: `"0_pre"`, `"0_mid"`."""

    def read(cache: CapturedActivations, readout: Readout) -> Iterator[LabelledStack]:
        for place in places:
            stream = take_positions(place.read(cache), -2, readout.pos_slice)
            whole = stream if readout.norm is None else readout.norm.apply_to_whole(stream)
            yield LabelledStack(whole[None], [place.label])

    return Components("streams", [place.name_in(cache) for place in places], read)


def of_points(names: Sequence[str], noun: str = "layer outputs") -> Components:
    """The components that have hook points of their own: embeddings and the outputs of layers.

    `blocks.3.hook_attn_out` is `"3_attn_out"`, `hook_embed` is `"embed"`.
    """

    def read(cache: CapturedActivations, readout: Readout) -> Iterator[LabelledStack]:
        for name in names:
            *path, point = name.removeprefix("blocks.").split(".")
            label = "_".join([*path, point.removeprefix("hook_")])
            yield LabelledStack(readout.read_vectors(cache[name])[None], [label])

    return Components(noun, list(names), read)


def of_embeddings(cache: CapturedActivations) -> Components:
    """The stream's first components."""
    in_heads = isinstance(cache.cfg.positions, ShortformerPositions)
    names = [name for name in EMBEDDINGS[: 1 if in_heads else None] if name in cache.cfg.description.points]
    return of_points(names, "embeddings")


def of_outputs(point: StreamPoint, mode: Mode = "all") -> Components:
    """The outputs of the layers below a place, in the order of the computation.

    Raises:
        CacheError: an unknown mode.
    """
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise CacheError(f"decompose_resid: mode is {mode!r}; expected 'all', 'mlp' or 'attn'")
    attns = [] if mode == "mlp" else [(layer, "attn") for layer in point.attention_layers]
    mlps = [] if mode == "attn" else [(layer, "mlp") for layer in point.mlp_layers]
    return of_points([f"blocks.{layer}.hook_{branch}_out" for layer, branch in sorted(attns + mlps)])


def of_heads(cache: CapturedActivations, layers: Sequence[int]) -> Components:
    """What each head of some layers adds to the stream: `hook_result` where that was captured, else of `hook_z`."""

    def read(cache: CapturedActivations, readout: Readout) -> Iterator[LabelledStack]:
        for layer in layers:
            attn = f"blocks.{layer}.attn"
            exit_norm = ATTN.freeze_exit(cache, layer, readout)
            if f"{attn}.hook_result" in cache:
                result = take_positions(_added(cache, f"{attn}.hook_result"), -3, readout.pos_slice).movedim(-2, 0)
                values = readout.read_taken(result if exit_norm is None else exit_norm.apply(result))
            else:
                z = take_positions(_added(cache, f"{attn}.hook_z"), -3, readout.pos_slice)
                values = readout.read_products(z, require_weight(cache, f"{attn}.W_O"), exit_norm)
            yield LabelledStack(values, [f"L{layer}H{head}" for head in range(cache.cfg.n_heads)])

    results = [name.replace("hook_z", "hook_result") for name in ATTN.names(cache, layers)]
    names = [
        result if result in cache else name for result, name in zip(results, ATTN.names(cache, layers), strict=True)
    ]
    return Components("heads", names, read)


def of_neurons(cache: CapturedActivations, layers: Sequence[int], neurons: Choice = None) -> Components:
    """What each neuron of some layers adds to the stream.

    Args:
        cache: the run.
        layers: the layers.
        neurons: the same ones in each layer; None: all.

    Raises:
        CacheError: the choice is of another kind; on reading, a layer has no such neurons.
    """
    read_choice(neurons, what="neuron_slice", refuse_tuple=True, error=CacheError)

    def read(cache: CapturedActivations, readout: Readout) -> Iterator[LabelledStack]:
        for layer in layers:
            post = _added(cache, f"blocks.{layer}.mlp.hook_post")
            W_out = require_weight(cache, f"blocks.{layer}.mlp.W_out")
            chosen, _ = choose(neurons, len(W_out), what="neuron_slice", noun="neurons of an MLP")
            if neurons is not None:
                post, W_out = post[..., chosen], W_out[chosen]
            post = take_positions(post, -2, readout.pos_slice)
            exit_norm = MLP.freeze_exit(cache, layer, readout)
            values = readout.read_products(post[..., None], W_out[:, None, :], exit_norm)
            yield LabelledStack(values, [f"L{layer}N{neuron}" for neuron in chosen])

    return Components("neurons", MLP.names(cache, layers), read)


def of_biases(cache: CapturedActivations, point: StreamPoint, *, with_mlps: bool) -> Components:
    """The sum of the biases written to the stream below a place, those of norms at a branch's exit included.

    Args:
        cache: the run.
        point: biases of the layers below it count.
        with_mlps: count `b_out`, not only `b_O`.
    """
    written = [(ATTN, layer) for layer in point.attention_layers]
    written += [(MLP, layer) for layer in point.mlp_layers if with_mlps]

    def read(cache: CapturedActivations, readout: Readout) -> Iterator[LabelledStack]:
        stream = take_positions(point.read(cache), -2, readout.pos_slice)
        total = torch.zeros_like(widen(stream))
        for branch, layer in written:
            total = total + branch.written_bias(cache, layer, readout, stream)
        scale = cache.cfg.residual_scale
        yield LabelledStack(readout.read_taken(total if scale == 1 else total * scale)[None], ["bias"])

    return Components("biases", [point.name_in(cache)], read)


def _added(cache: CapturedActivations, name: str) -> Tensor:
    """What a branch is made of, with the factor that it is added to the stream with."""
    scale = cache.cfg.residual_scale
    return cache[name] if scale == 1 else cache[name] * scale


def of_all(cache: CapturedActivations, point: StreamPoint, *, expand_neurons: bool) -> list[Components]:
    """Heads, neurons or MLPs, embeddings and biases, which sum to the stream at a place."""
    mlps = of_neurons(cache, point.mlp_layers) if expand_neurons else of_outputs(point, "mlp")
    biases = of_biases(cache, point, with_mlps=expand_neurons)
    return [of_heads(cache, point.attention_layers), mlps, of_embeddings(cache), biases]


def check_any(components: Sequence[Components], point: StreamPoint) -> None:
    """Refuse a place below which there are no components of these kinds.

    Raises:
        CacheError: there are none.
    """
    if any(one.names for one in components):
        return
    reason = f"the stream there is the embedding; give a layer from 1 to {point.cfg.n_layers}"
    if point.layer:
        reason = "no layer there has any"
    raise CacheError(f"there are no {components[-1].noun} below layer {point.layer}: {reason}")


def read_components(
    cache: CapturedActivations,
    components: Iterable[Components],
    readout: Readout,
    *,
    remainder_at: StreamPoint | None = None,
) -> LabelledStack:
    """One stack of several kinds of components.

    Args:
        cache: a cache that holds what they are read from.
        components: the kinds.
        readout: with directions, nothing of size components x positions x d_model is made.
        remainder_at: with what else is in the stream at this place, `"remainder"`.
    """
    stacks = [stack for one in components if one.names for stack in one.read(cache, readout)]
    return join_stacks(
        stacks if remainder_at is None else [*stacks, read_remainder(cache, remainder_at, readout, stacks)]
    )


def read_remainder(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, stacks: Iterable[LabelledStack]
) -> LabelledStack:
    """What is in the stream at a place beside the components of some stacks."""
    remainder = readout.read_vectors(point.read(cache)) - sum(stack.values.sum(0) for stack in stacks)
    return LabelledStack(remainder[None], ["remainder"])


def join_stacks(stacks: Iterable[LabelledStack]) -> LabelledStack:
    """One stack of several."""
    values, labels = zip(*stacks, strict=True)
    return LabelledStack(torch.cat(values), [label for some in labels for label in some])
