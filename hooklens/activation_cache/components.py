"""The parts that the residual stream is the sum of, at several grains.

The whole output of a layer, or of each head, or of each neuron:

    attn_out[l] = sum over heads of z W_O + b_O          mlp_out[l] = sum over neurons of post W_out + b_out

Biases belong to no head and no neuron; they are a component of their own. Where a norm stands at the exit
of a branch (`cfg.norm_after`), heads and neurons are read behind it, with its denominator held at the value
it had in the run: what a head really adds to the stream.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.arguments import choose
from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.readout import FrozenNorm, Readout, freeze_norm, like
from hooklens.activation_cache.stream import StreamPoint, require, require_weight, take_positions
from hooklens.hooks.choice import Choice
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


def join_stacks(stacks: Iterable[LabelledStack]) -> LabelledStack:
    """One stack of several."""
    parts = list(stacks)
    return LabelledStack(torch.cat([part.values for part in parts]), [label for part in parts for label in part.labels])


def embedding_names(cache: CapturedActivations) -> list[str]:
    """The hook points of the stream's first components."""
    return [name for name in ("hook_embed", "hook_pos_embed") if name in cache.cfg.description.points]


def output_names(point: StreamPoint, mode: str) -> list[str]:
    """The hook points of the outputs below a place, in the order of the computation."""
    attns = [] if mode == "mlp" else [(layer, "attn") for layer in point.attention_layers]
    mlps = [] if mode == "attn" else [(layer, "mlp") for layer in point.mlp_layers]
    return [f"blocks.{layer}.hook_{branch}_out" for layer, branch in sorted(attns + mlps)]


def read_points(cache: CapturedActivations, names: list[str], readout: Readout) -> LabelledStack:
    """The components that have hook points of their own: embeddings and the outputs of layers.

    Raises:
        MissingActivationError: lists those that were not captured.
    """
    require(cache, names, purpose="a decomposition of the residual stream")
    return LabelledStack(torch.stack([readout.read_vectors(cache[name]) for name in names]), _labels_of(names))


def _labels_of(names: Iterable[str]) -> list[str]:
    """`blocks.3.hook_attn_out` is `3_attn_out`, `hook_embed` is `embed`."""
    parts = (name.removeprefix("blocks.").split(".") for name in names)
    return ["_".join([*path, point.removeprefix("hook_")]) for *path, point in parts]


def head_names(cache: CapturedActivations, layers: Sequence[int]) -> list[str]:
    """What `read_heads` needs to be captured: `hook_z` where `hook_result` is not, and the scales of exit norms."""
    attns = [f"blocks.{layer}.attn" for layer in layers]
    values = [f"{attn}.hook_z" for attn in attns if f"{attn}.hook_result" not in cache]
    return [*values, *_exit_scale_names(cache, layers, "ln1_post")]


def neuron_names(cache: CapturedActivations, layers: Sequence[int]) -> list[str]:
    """What `read_neurons` needs to be captured: `hook_post`, and the scales of exit norms."""
    return [*(f"blocks.{layer}.mlp.hook_post" for layer in layers), *_exit_scale_names(cache, layers, "ln2_post")]


def _exit_scale_names(cache: CapturedActivations, layers: Sequence[int], norm: str) -> list[str]:
    return [f"blocks.{layer}.{norm}.hook_scale" for layer in layers if cache.cfg.block(layer).norm_after]


def read_heads(cache: CapturedActivations, layers: Sequence[int], readout: Readout) -> LabelledStack:
    """What each head of some layers adds to the stream.

    Raises:
        MissingActivationError: lists what was not captured.
    """
    per_layer = list(_read_heads_by_layer(cache, layers, readout))
    labels = [f"L{layer}H{head}" for layer in layers for head in range(cache.cfg.n_heads)]
    return LabelledStack(torch.cat(per_layer), labels)


def _read_heads_by_layer(cache: CapturedActivations, layers: Sequence[int], readout: Readout) -> Iterator[Tensor]:
    require(cache, head_names(cache, layers), purpose="what each head adds to the stream")
    for layer in layers:
        attn = f"blocks.{layer}.attn"
        exit_norm = _exit_norm(cache, layer, "ln1_post", readout)
        if f"{attn}.hook_result" in cache:
            result = take_positions(cache[f"{attn}.hook_result"], -3, readout.pos_slice).movedim(-2, 0)
            yield readout.read_taken(result if exit_norm is None else exit_norm.apply(result))
            continue
        z = take_positions(cache[f"{attn}.hook_z"], -3, readout.pos_slice)
        yield readout.read_products(z, require_weight(cache, f"{attn}.W_O"), exit_norm)


def read_neurons(
    cache: CapturedActivations, layers: Sequence[int], readout: Readout, neurons: Choice = None
) -> LabelledStack:
    """What each neuron of some layers adds to the stream.

    Args:
        cache: a cache with `hook_post` of these layers.
        layers: the layers.
        readout: with directions, nothing of size d_mlp x positions x d_model is made.
        neurons: the same ones in each layer; None: all.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError: a layer has no such neurons.
    """
    require(cache, neuron_names(cache, layers), purpose="what each neuron adds to the stream")
    parts: list[Tensor] = []
    labels: list[str] = []
    for layer in layers:
        post = cache[f"blocks.{layer}.mlp.hook_post"]
        W_out = require_weight(cache, f"blocks.{layer}.mlp.W_out")
        chosen, _ = choose(neurons, len(W_out), what="neuron_slice", noun="neurons of an MLP")
        if neurons is not None:
            post, W_out = post[..., chosen], W_out[chosen]
        post = take_positions(post, -2, readout.pos_slice)
        exit_norm = _exit_norm(cache, layer, "ln2_post", readout)
        parts.append(readout.read_products(post[..., None], W_out[:, None, :], exit_norm))
        labels.extend(f"L{layer}N{neuron}" for neuron in chosen)
    return LabelledStack(torch.cat(parts), labels)


def read_biases(
    cache: CapturedActivations, point: StreamPoint, readout: Readout, *, with_mlps: bool
) -> Float[Tensor, "*batch_pos read"]:
    """The sum of the biases written to the stream below a place, those of norms at a branch's exit included.

    Args:
        cache: a cache with weights.
        point: biases of the layers below it count.
        readout: how to read the sum.
        with_mlps: count `b_out`, not only `b_O`.
    """
    stream = take_positions(point.read(cache), -2, readout.pos_slice)
    total = torch.zeros_like(widen(stream))
    for layer in point.attention_layers:
        norm = _exit_norm(cache, layer, "ln1_post", readout)
        total = total + _written_bias(cache, f"blocks.{layer}.attn.b_O", norm, stream)
    for layer in point.mlp_layers if with_mlps else ():
        norm = _exit_norm(cache, layer, "ln2_post", readout)
        total = total + _written_bias(cache, f"blocks.{layer}.mlp.b_out", norm, stream)
    return readout.read_taken(total)


def _written_bias(cache: CapturedActivations, name: str, norm: FrozenNorm | None, stream: Tensor) -> Tensor:
    has_bias = name in cache.cfg.description.weights
    bias = like(require_weight(cache, name), stream) if has_bias else torch.zeros_like(widen(stream))
    if norm is None:
        return bias
    through = norm.apply(bias)
    return through if norm.bias is None else through + norm.bias


def _exit_norm(cache: CapturedActivations, layer: int, norm: str, readout: Readout) -> FrozenNorm | None:
    if not cache.cfg.block(layer).norm_after:
        return None
    purpose = "what is added to the stream behind a norm"
    return freeze_norm(cache, f"blocks.{layer}.{norm}", pos_slice=readout.pos_slice, purpose=purpose)
