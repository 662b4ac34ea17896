"""`ActivationCache`: what a run captured, and what can be read off it."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.components import LabelledStack, read_points
from hooklens.activation_cache.decomposition import (
    Mode,
    NeuronSlice,
    accumulate_stream,
    decompose_by_head,
    decompose_by_neuron,
    decompose_fully,
    make_readout,
    names_by_head,
    names_by_layer,
    names_by_neuron,
    names_of_all,
    places_up_to,
)
from hooklens.activation_cache.logits import TokenIds, align_directions, find_directions
from hooklens.activation_cache.memory import take
from hooklens.activation_cache.readout import Readout, freeze_norm
from hooklens.activation_cache.rows import RowSlice, select_rows
from hooklens.activation_cache.stream import locate, require, require_weight
from hooklens.errors import CacheError
from hooklens.hooks.pos_slice import PosSlice
from hooklens.precision import widen

Stack = Float[Tensor, "component *batch_pos read"]
NormedStack = Float[Tensor, "component *taken d_model"]
Attributions = Float[Tensor, "component *taken"]
StackAndLabels = Stack | tuple[Stack, list[str]]


class ActivationCache(CapturedActivations):
    """Activations by hook name, and the residual stream taken apart.

    Reading: full names and shorthands both work: `cache["blocks.3.attn.hook_pattern"]`,
    `cache["pattern", 3]`, `cache["scale", 3, "ln1"]`, `cache["k3"]`, `cache["resid_pre", -1]`. The gradient
    of an activation is under its name with `_grad` after it. See `CapturedActivations` for the attributes.

    Taking apart: the methods below stack components along a first axis, with the arguments and labels of
    TransformerLens 2.x. Where they are the same for all of them:

    - `layer`: components that lie below this layer; the stack decomposes the stream entering it. None and -1
      are the end of the stream.
    - `mlp_input`: the stream entering the layer's MLP, not its attention. In a parallel block both read the
      same stream, through different norms.
    - `apply_ln`: read components through the norm that reads the stream there, its denominator held at the
      value it had in the run. Unlike TransformerLens this applies the norm's weight, too, so it is right for
      a model whose norms are not folded; the norm's bias belongs to no component.
    - `pos_slice`: positions (int, slice or list), counted over the captured ones; an int drops the axis.
    - `project_output_onto`: directions `[d_model]` or `[d_model, n]`; read products with them, `n` numbers (for
      one direction a single one, without an axis) in the place of a vector. Components are never built then.
    - `return_labels`: give `(stack, labels)`.

    Sums and products are taken in float32 for half-precision activations. Weights come from the cache's own
    record of the model, the very tensors: a cache read from a file has none, see `with_weights`.
    """

    def accumulated_resid(
        self,
        layer: int | None = None,
        *,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> StackAndLabels:
        """The stream as it was at the entrance of every layer up to `layer`, `"0_pre"` to `"final_post"`.

        Args:
            layer: the last one; see the class.
            incl_mid: also between attention and MLP, `"0_mid"`; sequential blocks only.
            apply_ln: see the class; all streams are read through the norm at `layer`.
            pos_slice: see the class.
            mlp_input: end with the stream entering the MLP of `layer`.
            return_labels: see the class.

        Raises:
            MissingActivationError: lists what was not captured.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        places = places_up_to(point, incl_mid=incl_mid)
        names = [place.name_in(self) for place in places]
        readout = make_readout(
            self, point, purpose="accumulated_resid", names=names, apply_ln=apply_ln, pos_slice=pos_slice
        )
        return _answer(accumulate_stream(self, places, readout), return_labels=return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        *,
        mlp_input: bool = False,
        mode: Mode = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> StackAndLabels:
        """Embeddings and the outputs of layers, `"embed"`, `"pos_embed"`, `"0_attn_out"`, `"0_mlp_out"`, ...

        They sum to the stream entering `layer`.

        Args:
            layer: see the class.
            mlp_input: see the class.
            mode: `"attn"` or `"mlp"`: outputs of that kind only.
            apply_ln: see the class.
            pos_slice: see the class.
            incl_embeds: with the embeddings.
            return_labels: see the class.

        Raises:
            MissingActivationError: lists what was not captured.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        names = names_by_layer(self, point, mode=mode, incl_embeds=incl_embeds)
        readout = make_readout(
            self, point, purpose="decompose_resid", names=names, apply_ln=apply_ln, pos_slice=pos_slice
        )
        return _answer(read_points(self, names, readout), return_labels=return_labels)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of every layer below `layer`: `cache.stack_activation("pattern")`.

        Args:
            activation_name: a shorthand, `"pattern"`, `"resid_pre"`, `"scale"`.
            layer: layers below it; None and -1 are all.
            sublayer_type: the module, where the word alone is ambiguous: `"ln1"`.

        Raises:
            MissingActivationError: one of them was not captured.
            CacheError: there are no layers.
        """
        point = locate(self.cfg, layer)
        if not point.layer:
            raise CacheError("stack_activation: there is no layer below layer 0; give 1 or more, or None for all")
        return torch.stack([self[activation_name, below, sublayer_type] for below in range(point.layer)])

    def compute_head_results(self) -> "ActivationCache":
        """A new cache that also holds each layer's `hook_result`, `z W_O` for each head, in its dtype.

        Only needed for `cache["result", 3]`: the methods here compute what they need. With b_O the heads sum
        to the output of attention, before a norm at its exit. It holds n_heads times the memory of the stream.

        Raises:
            MissingActivationError: lists the `hook_z` that were not captured.
        """
        names = [f"blocks.{layer}.attn" for layer in range(self.cfg.n_layers)]
        todo = [attn for attn in names if f"{attn}.hook_result" not in self]
        require(self, [f"{attn}.hook_z" for attn in todo], purpose="compute_head_results")
        results = {}
        for attn in todo:
            z = self[f"{attn}.hook_z"]
            parts = Readout().read_products(z, require_weight(self, f"{attn}.W_O"), None)
            results[f"{attn}.hook_result"] = parts.movedim(0, -2).to(z.dtype)
        return self._derive({**self, **results})

    def stack_head_results(
        self,
        layer: int | None = -1,
        *,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """What each head below `layer` adds to the stream, `"L0H0"`, `"L0H1"`, ...

        Args:
            layer: see the class.
            return_labels: see the class.
            incl_remainder: with what else is in the stream, `"remainder"`.
            pos_slice: see the class.
            apply_ln: see the class.
            project_output_onto: see the class.

        Raises:
            MissingActivationError: lists what was not captured.
            CacheError: there are no heads below `layer`.
        """
        point = locate(self.cfg, layer)
        names = names_by_head(self, point, incl_remainder=incl_remainder)
        readout = make_readout(
            self, point, purpose="stack_head_results", names=names,
            apply_ln=apply_ln, pos_slice=pos_slice, project_output_onto=project_output_onto,
        )  # fmt: skip
        stack = decompose_by_head(self, point, readout, incl_remainder=incl_remainder)
        return _answer(stack, return_labels=return_labels, directions=project_output_onto)

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        *,
        pos_slice: PosSlice = None,
        neuron_slice: NeuronSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """What each neuron below `layer` adds to the stream, `"L0N0"`, `"L0N1"`, ...

        That is layers x d_mlp vectors at every position; ask for positions, neurons or a projection.

        Args:
            layer: see the class.
            pos_slice: see the class.
            neuron_slice: the neurons (int, slice or list), the same in every layer.
            return_labels: see the class.
            incl_remainder: with what else is in the stream, `"remainder"`.
            apply_ln: see the class.
            project_output_onto: see the class.

        Raises:
            MissingActivationError: lists what was not captured.
            CacheError: there are no neurons below `layer`, or none are chosen.
        """
        point = locate(self.cfg, layer)
        names = names_by_neuron(self, point, incl_remainder=incl_remainder)
        readout = make_readout(
            self, point, purpose="stack_neuron_results", names=names,
            apply_ln=apply_ln, pos_slice=pos_slice, project_output_onto=project_output_onto,
        )  # fmt: skip
        stack = decompose_by_neuron(self, point, readout, neuron_slice=neuron_slice, incl_remainder=incl_remainder)
        return _answer(stack, return_labels=return_labels, directions=project_output_onto)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        *,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """Each head, each neuron (or MLP), the embeddings and `"bias"`; they sum to the stream entering `layer`.

        Args:
            layer: see the class.
            mlp_input: see the class.
            expand_neurons: neurons one by one; otherwise the MLPs' outputs, biases included.
            apply_ln: see the class.
            pos_slice: see the class.
            return_labels: see the class.
            project_output_onto: see the class.

        Raises:
            MissingActivationError: lists the activations that were not captured.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        names = names_of_all(self, point, expand_neurons=expand_neurons)
        readout = make_readout(
            self, point, purpose="get_full_resid_decomposition", names=names,
            apply_ln=apply_ln, pos_slice=pos_slice, project_output_onto=project_output_onto,
        )  # fmt: skip
        stack = decompose_fully(self, point, readout, expand_neurons=expand_neurons)
        return _answer(stack, return_labels=return_labels, directions=project_output_onto)

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        *,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: RowSlice | None = None,
        has_batch_dim: bool = True,
    ) -> NormedStack:
        """Components read through the norm at `layer`: centred (LayerNorm only), over the scale, times its weight.

        With the norm's bias added, the components of a full decomposition sum to the norm's output.

        Args:
            residual_stack: components `[component *batch pos d_model]`, or without `pos` for an int `pos_slice`.
            layer: see the class.
            mlp_input: see the class.
            pos_slice: the positions that the stack has been cut to.
            batch_slice: rows to take, of the stack and of the scale.
            has_batch_dim: whether the stack has rows; without them `batch_slice` is the one it is of.

        Raises:
            MissingActivationError: the norm's `hook_scale` was not captured.
            CacheError: the shapes do not fit.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        if batch_slice is not None and has_batch_dim:
            rows = select_rows(batch_slice, residual_stack.shape[1])
            taken = take(residual_stack, 1, rows)
            residual_stack = taken[:, 0] if isinstance(batch_slice, int) else taken
        if point.norm is None:
            return residual_stack
        norm = freeze_norm(
            self._rows_of_norm(point.norm, batch_slice), point.norm, pos_slice=pos_slice, purpose="apply_ln_to_stack"
        )
        expected = norm.scale.shape[:-1]
        if residual_stack.shape[1:-1] != expected and not _broadcasts(residual_stack.shape[1:-1], expected):
            raise CacheError(
                f"the stack has shape {list(residual_stack.shape)}, the norm's scale batch and pos axes "
                f"{list(expected)}; expected [component, *{list(expected)}, d_model]: give the pos_slice and "
                "batch_slice that the stack was cut by"
            )
        return norm.apply(residual_stack)

    def _rows_of_norm(self, norm: str, batch_slice: RowSlice | None) -> "ActivationCache":
        """A cache of some rows that holds only the scale of a norm."""
        scale = f"{norm}.hook_scale"
        if batch_slice is None or scale not in self:
            return self
        return self._derive({scale: self[scale]}).apply_slice_to_batch_dim(batch_slice)

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: TokenIds | str,
        incorrect_tokens: TokenIds | str | None = None,
        *,
        pos_slice: PosSlice = None,
        batch_slice: RowSlice | None = None,
        has_batch_dim: bool = True,
    ) -> Attributions:
        """How much each component adds to the logit of `tokens`, or to its difference to `incorrect_tokens`.

        The components of a full decomposition and `logit_attr_bias` sum to the logit (the one before a soft cap
        where the model has one).

        Args:
            residual_stack: components of the last stream, not yet through the norm.
            tokens: a token id, or ids `[batch]` (`[pos]` without rows) or `[batch pos]`.
            incorrect_tokens: ids of the same shape.
            pos_slice: the positions that the stack has been cut to.
            batch_slice: rows to take of the stack; `tokens` are those of the rows taken.
            has_batch_dim: whether the stack has rows.

        Raises:
            CacheError: the tokens do not fit the stack, or are text: a cache has no tokenizer.
        """
        normed = self.apply_ln_to_stack(
            residual_stack, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim
        )
        asked = find_directions(self, tokens, incorrect_tokens, like_activation=normed)
        directions = align_directions(asked.directions, normed.shape[1:-1])
        return (widen(normed) * directions).sum(-1)

    def logit_attr_bias(
        self, tokens: TokenIds | str, incorrect_tokens: TokenIds | str | None = None
    ) -> Float[Tensor, "*ids"]:
        """What the final norm's bias and `b_U` add to the logit of `tokens`, or to a difference; in shape of `tokens`.

        Raises:
            CacheError: ids outside the vocabulary, or text.
        """
        reference = next((tensor for tensor in self.values() if tensor.is_floating_point()), torch.zeros(()))
        return find_directions(self, tokens, incorrect_tokens, like_activation=reference).bias


def _answer(stack: LabelledStack, *, return_labels: bool, directions: Tensor | None = None) -> StackAndLabels:
    values = stack.values[..., 0] if directions is not None and directions.ndim == 1 else stack.values
    return (values, stack.labels) if return_labels else values


def _broadcasts(shape: torch.Size, expected: torch.Size) -> bool:
    return len(shape) == len(expected) and all(
        size in (1, wanted) for size, wanted in zip(shape, expected, strict=True)
    )
