"""Ablations written into weights: a circuit of whole nodes as a model of its own.

A head adds `z W_O[head]` to the stream, an MLP `post W_out + b_out`, a neuron `post[n] W_out[n]`. So a node whose
output is to be a constant `c` in every run needs no hook: its rows of `W_O` or `W_out` become 0, and `c` goes into
`b_O` or `b_out`. What comes out is an ordinary model, which saves, merges, generates and quantises as any other.

That holds for whole nodes and constants alone. An ablation of single edges leaves a node different things to say to
different readers, `"resample"` says another thing for each prompt, and a mean for each position another for each
position; no weight can hold these. A constant other than 0 needs a bias to go into, which many architectures lack.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hooklens.arguments import reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import check_additive, inputs_of, list_edges, list_writers, parse_writers

Constant = Literal["zero"] | Mapping[str, Tensor]

_NEURON = re.compile(r"(m(?:0|[1-9]\d*))\.n(0|[1-9]\d*)")


@reads()
def bake_circuit(model: HookedCausalLM, circuit: Circuit, *, ablation: Constant = "zero") -> HookedCausalLM:
    """A new model that computes what a circuit of whole nodes computes with everything else ablated.

    Args:
        model: the model; it stays as it is.
        circuit: the embeddings and any heads and MLPs, each with all its edges to what is in the circuit, such as
            `learn_circuit(..., level="node").circuit()` gives.
        ablation: what the others write, as for `bake_ablation`.

    Raises:
        InputError: a circuit of single edges; all that are missing are counted, and the first named. Or as for
            `bake_ablation`.
        SiteError: edges that the network has not, or as for `bake_ablation`.

    Example:
        >>> found = patching.learn_circuit(model, pairs, target_size=8, level="node", ablation="zero")
        >>> patching.bake_circuit(model, found.circuit()).save_pretrained("the-circuit")
    """
    if not isinstance(circuit, Circuit):
        raise InputError(f"bake_circuit: circuit is {show(circuit)}, expected a patching.Circuit")
    circuit.check(model.cfg)
    kept = {writer for writer, _ in circuit}
    group_size = model.cfg.n_heads // model.cfg.n_kv_heads
    read = {"logits"}
    for writer in list_writers(model.cfg):
        if str(writer) in kept:
            read.update(map(str, inputs_of(writer, group_size=group_size)))
    needed = [edge for edge in list_edges(model.cfg) if edge[0] in kept | {"embed"} and edge[1] in read]
    missing = [f"{writer} -> {reader}" for writer, reader in needed if (writer, reader) not in circuit]
    if missing:
        raise InputError(
            f"bake_circuit: the circuit lacks {len(missing)} of the {len(needed)} edges between its nodes, such as "
            f"{', '.join(missing[:5])}; weights can only leave out whole nodes. Give a circuit with all edges of each "
            "of its nodes (learn_circuit with level='node'), or run this one with evaluate_circuits"
        )
    ablated = [str(writer) for writer in list_writers(model.cfg) if str(writer) not in kept | {"embed"}]
    return bake_ablation(model, ablated, ablation=ablation)


@reads()
def bake_ablation(model: HookedCausalLM, nodes: Iterable[str], *, ablation: Constant = "zero") -> HookedCausalLM:
    """A new model in which heads, MLPs and neurons write a constant, whatever they read.

    Args:
        model: the model; it stays as it is.
        nodes: heads (`"a0.h3"`), MLPs (`"m1"`) and neurons (`"m1.n17"`).
        ablation: `"zero"`; or by hook name what they write, the same for all prompts and positions: heads at
            `blocks.{layer}.attn.hook_result`, MLPs at `blocks.{layer}.hook_mlp_out`, neurons at
            `blocks.{layer}.mlp.hook_post`, such as `mean_activations(..., each_position=False)` and
            `fit_optimal_ablation` give.

    Raises:
        InputError: no names; an ablation that changes with the prompt or the position; a constant other than 0 where
            the architecture has no bias; experts in place of an MLP; or a norm between heads and stream.
        SiteError: nodes that the network has not, or an ablation without values for them.
    """
    check_additive(model.cfg)
    _check_word(ablation)
    heads_and_mlps, neurons = _read_nodes(model, nodes)
    baked = model.dequantize()
    baked.train(model.training)
    with torch.no_grad():
        for name in heads_and_mlps:
            _bake_node(baked, name, ablation)
        for layer, places in neurons.items():
            _bake_neurons(baked, layer, places, ablation)
    return baked


def _check_word(ablation: object) -> None:
    if isinstance(ablation, Mapping) or (isinstance(ablation, str) and ablation == "zero"):
        return
    why = ""
    if isinstance(ablation, str) and ablation in ("resample", "mean"):
        why = (
            ": what it puts in goes with the prompts, and weights know none. Give the means as tensors, "
            "patching.mean_activations(model, prompts, ['result', 'mlp_out'], each_position=False)"
        )
    raise InputError(f"bake_ablation: ablation is {show(ablation)}, expected 'zero' or tensors by hook name{why}")


def _read_nodes(model: HookedCausalLM, nodes: object) -> tuple[list[str], dict[int, list[int]]]:
    """Heads and MLPs, and neurons by layer."""
    if isinstance(nodes, str) or not isinstance(nodes, Iterable):
        raise InputError(
            f"bake_ablation: nodes are {show(nodes)}, expected a list of names, as ['a0.h3', 'm1', 'm1.n17']"
        )
    listed = list(nodes)
    matches = {name: _NEURON.fullmatch(name) for name in listed if isinstance(name, str)}
    whole = parse_writers([name for name in listed if matches.get(name) is None], model.cfg)
    if any(writer.kind == "embed" for writer in whole):
        raise InputError("bake_ablation: the embeddings cannot be ablated; a model without them reads no prompt")
    neurons: dict[int, list[int]] = {}
    absent = []
    for name, match in matches.items():
        if match is None:
            continue
        [mlp] = parse_writers([match[1]], model.cfg)
        place = int(match[2])
        if place < _out_rows(model, mlp.layer).shape[0]:
            neurons.setdefault(mlp.layer, []).append(place)
        else:
            absent.append(name)
    if absent:
        raise SiteError(f"bake_ablation: no neurons {join_names(absent)}; the MLP has fewer than that")
    return list(map(str, whole)), neurons


def _out_rows(model: HookedCausalLM, layer: int) -> Tensor:
    """What each neuron of an MLP writes, a view of the weights.

    Raises:
        InputError: there is no such thing.
    """
    rows = getattr(model.block_list()[layer].mlp, "W_out", None)
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        raise InputError(
            f"bake_ablation: layer {layer} has experts in place of one MLP, which are not written into weights here; "
            "run the ablation with edits (model.run_with_hooks(input, edits=[...]))"
        )
    return rows


def _bake_node(model: HookedCausalLM, name: str, ablation: Constant) -> None:
    [writer] = parse_writers([name], model.cfg)
    block: Any = model.block_list()[writer.layer]
    if writer.kind == "head":
        constant = _constant_of(name, writer.hook_name, ablation, place=writer.head)
        block.attn.W_O[writer.head] = 0.0
        _add_to_bias(block.attn, "b_O", name, constant)
        return
    rows = _out_rows(model, writer.layer)
    constant = _constant_of(name, writer.hook_name, ablation)
    rows.zero_()
    if block.mlp.b_out is not None:
        block.mlp.b_out.zero_()
    # hook_mlp_out is what is added to the stream, behind the factor on branches.
    _add_to_bias(block.mlp, "b_out", name, None if constant is None else constant / model.cfg.residual_scale)


def _bake_neurons(model: HookedCausalLM, layer: int, places: list[int], ablation: Constant) -> None:
    block: Any = model.block_list()[layer]
    rows = _out_rows(model, layer)
    for place in places:
        name = f"m{layer}.n{place}"
        value = _constant_of(name, f"blocks.{layer}.mlp.hook_post", ablation, place=place)
        added = None if value is None else value.to(rows) * rows[place]
        rows[place] = 0.0
        _add_to_bias(block.mlp, "b_out", name, added)


def _constant_of(name: str, hook_name: str, ablation: Constant, *, place: int | None = None) -> Tensor | None:
    """What a node is ablated to, at every position of every prompt; None: nothing.

    Args:
        name: the node.
        hook_name: where its output passes.
        ablation: the ablation.
        place: which head or neuron of those that stand there; None: there is one.

    Raises:
        SiteError: no tensor for the hook point.
        InputError: one that changes with the prompt or the position.
    """
    if isinstance(ablation, str):
        return None
    if hook_name not in ablation:
        raise SiteError(f"bake_ablation: the ablation has no tensor for {hook_name!r}, where {name} writes")
    given = ablation[hook_name]
    # Heads have an axis for themselves before d_model; a neuron's value is one entry of the last.
    of_one = given if place is None else given.select(-1 if hook_name.endswith("hook_post") else -2, place)
    own = 0 if hook_name.endswith("hook_post") else 1
    rows = of_one.reshape(-1, *of_one.shape[of_one.ndim - own :])
    if bool((rows != rows[:1]).any()):
        raise InputError(
            f"bake_ablation: the tensor for {hook_name!r} {list(given.shape)} differs between prompts or positions, "
            f"and weights hold one constant for {name}; give means over all positions (each_position=False)"
        )
    return rows[0]


def _add_to_bias(part: Any, name: str, node: str, constant: Tensor | None) -> None:
    if constant is None or not bool(constant.any()):
        return
    bias = getattr(part, name)
    if bias is None:
        raise InputError(
            f"bake_ablation: {node} is ablated to a constant other than 0, and this architecture has no {name} to "
            "write it into; ablate to 'zero', or run the ablation with evaluate_circuits"
        )
    bias.add_(constant.to(bias))
