"""`ActivationCache`: what a run captured, and what can be read off it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, SupportsIndex, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache.arguments import LAYER, STACKING, Mode
from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.components import (
    Components,
    check_any,
    of_all,
    of_embeddings,
    of_heads,
    of_neurons,
    of_outputs,
    of_streams,
    read_components,
)
from hooklens.activation_cache.logits import TokenIds, align_directions, find_directions
from hooklens.activation_cache.readout import Readout, make_readout
from hooklens.activation_cache.stacks import fit_norm
from hooklens.activation_cache.stream import StreamPoint, locate, places_up_to, require, require_weight
from hooklens.arguments import read_flag, reads
from hooklens.errors import CacheError
from hooklens.hooks.choice import Choice
from hooklens.precision import widen

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.activation_cache.arguments import (
        DecompositionKeywords,
        HeadKeywords,
        NeuronKeywords,
        OutputKeywords,
        StreamKeywords,
    )

Stack = Float[Tensor, "component *batch_pos read"]
Vectors = Float[Tensor, "*components_batch_pos d_model"]
TakenVectors = Float[Tensor, "*components_taken d_model"]
Attributions = Float[Tensor, "*components_taken"]
StackAndLabels = Stack | tuple[Stack, list[str]]


class ActivationCache(CapturedActivations):
    """Activations by hook name, and the residual stream taken apart.

    Reading: full names and shorthands both work: `cache["blocks.3.attn.hook_pattern"]`,
    `cache["pattern", 3]`, `cache["scale", 3, "ln1"]`, `cache["k3"]`, `cache["resid_pre", -1]`. The gradient
    of an activation is under its name with `_grad` after it: `cache["pattern_grad", 3]`. See `CapturedActivations`
    for the attributes.

    Taking apart: the methods below stack components along a first axis, with the arguments and labels of
    TransformerLens 2.x. These arguments are the same for all of them:

    - `layer`: components that lie below this layer; the stack decomposes the stream entering it. None and -1
      are the end of the stream.
    - `mlp_input`: the stream entering the layer's MLP, not its attention. In a parallel block both read the
      same stream, through different norms.
    - `apply_ln`: read through the norm that reads the stream there, its denominator held at the value it had in
      the run. Unlike TransformerLens this applies the norm's weight, too, so it is right for a model whose norms are
      not folded. The norm's bias belongs to no component: it is added to whole streams only.
    - `pos_slice`: positions (int, slice, or list, array or tensor of ints), counted over the captured ones; an int
      drops the axis.
    - `project_output_onto`: directions `[d_model]` or `[d_model, n]`; read products with them, `n` numbers (for
      one direction a single one, without an axis) in the place of a vector. Components are never built then.
    - `incl_remainder`: with what else is in the stream, `"remainder"`.
    - `return_labels`: give `(stack, labels)`.

    They raise MissingActivationError, which lists all that was not captured, and CacheError or InputError for
    arguments that do not fit.

    Of a model on several devices components come together where the first activation of the cache lies.

    Sums and products are taken in float32 for half-precision activations. Weights come from the cache's own
    record of the model, the very tensors: a cache read from a file has none, see `with_weights`.
    """

    if TYPE_CHECKING:

        @overload
        def accumulated_resid(
            self,
            layer: SupportsIndex | None = ...,
            *,
            return_labels: Literal[False] = ...,
            **options: Unpack[StreamKeywords],
        ) -> Stack: ...
        @overload
        def accumulated_resid(
            self, layer: SupportsIndex | None = ..., *, return_labels: Literal[True], **options: Unpack[StreamKeywords]
        ) -> tuple[Stack, list[str]]: ...
        @overload
        def accumulated_resid(
            self, layer: SupportsIndex | None = ..., *, return_labels: bool, **options: Unpack[StreamKeywords]
        ) -> StackAndLabels: ...

    @reads(CacheError, **STACKING, mlp_input=read_flag, incl_mid=read_flag)
    def accumulated_resid(
        self,
        layer: SupportsIndex | None = None,
        *,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Choice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> StackAndLabels:
        """The stream as it was at the entrance of every layer up to `layer`, `"0_pre"` to `"final_post"`.

        With `apply_ln` every stream is read through the norm at `layer`, bias included, over the denominator that the
        norm had in the run at `layer`, as in TransformerLens 2.x: the last entry is what the norm gave, at the end of
        the stream `unembed.hook_in`. `hooklens.analysis.logit_lens` gives each stream a denominator of its own.

        Args:
            layer, apply_ln, pos_slice, mlp_input, return_labels: see the class.
            incl_mid: also between attention and MLP, `"0_mid"`; sequential blocks only.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        return self._stack(
            "accumulated_resid", point, [of_streams(self, places_up_to(point, incl_mid=incl_mid))],
            apply_ln=apply_ln, pos_slice=pos_slice, return_labels=return_labels,
        )  # fmt: skip

    if TYPE_CHECKING:

        @overload
        def decompose_resid(
            self,
            layer: SupportsIndex | None = ...,
            *,
            return_labels: Literal[False] = ...,
            **options: Unpack[OutputKeywords],
        ) -> Stack: ...
        @overload
        def decompose_resid(
            self, layer: SupportsIndex | None = ..., *, return_labels: Literal[True], **options: Unpack[OutputKeywords]
        ) -> tuple[Stack, list[str]]: ...
        @overload
        def decompose_resid(
            self, layer: SupportsIndex | None = ..., *, return_labels: bool, **options: Unpack[OutputKeywords]
        ) -> StackAndLabels: ...

    @reads(CacheError, **STACKING, mlp_input=read_flag, incl_embeds=read_flag)
    def decompose_resid(
        self,
        layer: SupportsIndex | None = None,
        *,
        mlp_input: bool = False,
        mode: Mode = "all",
        apply_ln: bool = False,
        pos_slice: Choice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> StackAndLabels:
        """Embeddings and the outputs of layers, `"embed"`, `"pos_embed"`, `"0_attn_out"`, `"0_mlp_out"`, ...

        They sum to the stream entering `layer`.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels: see the class.
            mode: `"attn"` or `"mlp"`: outputs of that kind only.
            incl_embeds: with the embeddings.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        components = [*([of_embeddings(self)] if incl_embeds else []), of_outputs(point, mode)]
        return self._stack(
            "decompose_resid", point, components,
            apply_ln=apply_ln, pos_slice=pos_slice, return_labels=return_labels,
        )  # fmt: skip

    @reads(CacheError, **LAYER)
    def stack_activation(
        self, activation_name: str, layer: SupportsIndex | None = -1, sublayer_type: str | None = None
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
        cache = self.gathered()
        return torch.stack([cache[activation_name, below, sublayer_type] for below in range(point.layer)])

    def compute_head_results(self) -> "ActivationCache":
        """A new cache that also holds each layer's `hook_result`, `z W_O` for each head, in its dtype.

        Only needed for `cache["result", 3]`: the methods here compute what they need. With b_O the heads sum
        to the output of attention, before a norm at its exit. It holds n_heads times the memory of the stream.

        Raises:
            MissingActivationError: lists the `hook_z` that were not captured.
        """
        names = [f"blocks.{block.layer}.attn" for block in self.cfg.blocks if block.attn is not None]
        todo = [attn for attn in names if f"{attn}.hook_result" not in self]
        require(self, [f"{attn}.hook_z" for attn in todo], purpose="compute_head_results")
        results = {}
        for attn in todo:
            z = self[f"{attn}.hook_z"]
            parts = Readout().read_products(z, require_weight(self, f"{attn}.W_O"), None)
            results[f"{attn}.hook_result"] = parts.movedim(0, -2).to(z.dtype)
        return self._derive({**self, **results})

    if TYPE_CHECKING:

        @overload
        def stack_head_results(
            self,
            layer: SupportsIndex | None = ...,
            *,
            return_labels: Literal[False] = ...,
            **options: Unpack[HeadKeywords],
        ) -> Stack: ...
        @overload
        def stack_head_results(
            self, layer: SupportsIndex | None = ..., *, return_labels: Literal[True], **options: Unpack[HeadKeywords]
        ) -> tuple[Stack, list[str]]: ...
        @overload
        def stack_head_results(
            self, layer: SupportsIndex | None = ..., *, return_labels: bool, **options: Unpack[HeadKeywords]
        ) -> StackAndLabels: ...

    @reads(CacheError, **STACKING, incl_remainder=read_flag)
    def stack_head_results(
        self,
        layer: SupportsIndex | None = -1,
        *,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Choice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """What each head below `layer` adds to the stream, `"L0H0"`, `"L0H1"`, ...; arguments as in the class."""
        point = locate(self.cfg, layer)
        return self._stack(
            "stack_head_results", point, [of_heads(self, point.attention_layers)], incl_remainder=incl_remainder,
            apply_ln=apply_ln, pos_slice=pos_slice, return_labels=return_labels,
            project_output_onto=project_output_onto,
        )  # fmt: skip

    if TYPE_CHECKING:

        @overload
        def stack_neuron_results(
            self,
            layer: SupportsIndex | None = ...,
            *,
            return_labels: Literal[False] = ...,
            **options: Unpack[NeuronKeywords],
        ) -> Stack: ...
        @overload
        def stack_neuron_results(
            self, layer: SupportsIndex | None = ..., *, return_labels: Literal[True], **options: Unpack[NeuronKeywords]
        ) -> tuple[Stack, list[str]]: ...
        @overload
        def stack_neuron_results(
            self, layer: SupportsIndex | None = ..., *, return_labels: bool, **options: Unpack[NeuronKeywords]
        ) -> StackAndLabels: ...

    @reads(CacheError, **STACKING, incl_remainder=read_flag)
    def stack_neuron_results(
        self,
        layer: SupportsIndex | None = -1,
        *,
        pos_slice: Choice = None,
        neuron_slice: Choice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """What each neuron below `layer` adds to the stream, `"L0N0"`, `"L0N1"`, ...

        That is layers x d_mlp vectors at every position; ask for positions, neurons or a projection.

        Args:
            layer, pos_slice, return_labels, incl_remainder, apply_ln, project_output_onto: see the class.
            neuron_slice: the neurons (int, slice or list), the same in every layer.
        """
        point = locate(self.cfg, layer)
        neurons = of_neurons(self, point.mlp_layers, neuron_slice)
        return self._stack(
            "stack_neuron_results", point, [neurons], incl_remainder=incl_remainder,
            apply_ln=apply_ln, pos_slice=pos_slice, return_labels=return_labels,
            project_output_onto=project_output_onto,
        )  # fmt: skip

    if TYPE_CHECKING:

        @overload
        def get_full_resid_decomposition(
            self,
            layer: SupportsIndex | None = ...,
            *,
            return_labels: Literal[False] = ...,
            **options: Unpack[DecompositionKeywords],
        ) -> Stack: ...
        @overload
        def get_full_resid_decomposition(
            self,
            layer: SupportsIndex | None = ...,
            *,
            return_labels: Literal[True],
            **options: Unpack[DecompositionKeywords],
        ) -> tuple[Stack, list[str]]: ...
        @overload
        def get_full_resid_decomposition(
            self, layer: SupportsIndex | None = ..., *, return_labels: bool, **options: Unpack[DecompositionKeywords]
        ) -> StackAndLabels: ...

    @reads(CacheError, **STACKING, mlp_input=read_flag, expand_neurons=read_flag)
    def get_full_resid_decomposition(
        self,
        layer: SupportsIndex | None = None,
        *,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Choice = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """Each head, each neuron (or MLP), the embeddings and `"bias"`; they sum to the stream entering `layer`.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels, project_output_onto: see the class.
            expand_neurons: neurons one by one; otherwise the MLPs' outputs, biases included.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        return self._stack(
            "get_full_resid_decomposition", point, of_all(self, point, expand_neurons=expand_neurons),
            apply_ln=apply_ln, pos_slice=pos_slice, return_labels=return_labels,
            project_output_onto=project_output_onto,
        )  # fmt: skip

    def _stack(
        self,
        purpose: str,
        point: StreamPoint,
        components: Sequence[Components],
        *,
        apply_ln: bool,
        pos_slice: Choice,
        return_labels: bool,
        incl_remainder: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> StackAndLabels:
        """What there is of some components, with what the methods have in common around it."""
        cache = self.gathered()
        remainder = [point.name_in(self)] if incl_remainder else []
        if not remainder:
            check_any(components, point)
        readout = make_readout(
            cache, point, purpose=purpose, names=[*(name for one in components for name in one.names), *remainder],
            apply_ln=apply_ln, pos_slice=pos_slice, project_output_onto=project_output_onto,
        )  # fmt: skip
        values, labels = read_components(cache, components, readout, remainder_at=point if incl_remainder else None)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            values = values[..., 0]
        return (values, labels) if return_labels else values

    @reads(CacheError, **LAYER, mlp_input=read_flag, has_batch_dim=read_flag, whole_streams=read_flag)
    def apply_ln_to_stack(
        self,
        residual_stack: Vectors,
        layer: SupportsIndex | None = None,
        *,
        mlp_input: bool = False,
        pos_slice: Choice = None,
        batch_slice: Choice = None,
        has_batch_dim: bool = True,
        whole_streams: bool = False,
    ) -> TakenVectors:
        """Vectors read through the norm at `layer`: centred (LayerNorm only), over the run's scale, times its weight.

        With the norm's bias added once, the components of a full decomposition sum to the norm's output.

        Args:
            residual_stack: `[*components batch pos d_model]` with any number of component axes, or none; without
                `pos` for an int `pos_slice`, without `batch` where there are no rows.
            layer, mlp_input: see the class.
            pos_slice: the positions that the stack has been cut to.
            batch_slice: rows to take, of the stack and of the scale.
            has_batch_dim: whether the stack has rows; without them `batch_slice` is the one it is of.
            whole_streams: the vectors are whole streams, not components: add the norm's bias to each.

        Raises:
            MissingActivationError: the norm's `hook_scale` was not captured.
            CacheError: the shapes do not fit.
        """
        point = locate(self.cfg, layer, mlp_input=mlp_input)
        stack, norm, _ = fit_norm(
            self._beside(residual_stack), residual_stack, point,
            pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim,
        )  # fmt: skip
        if norm is None:
            return stack
        return norm.apply_to_whole(stack) if whole_streams else norm.apply(stack)

    @reads(CacheError, has_batch_dim=read_flag)
    def logit_attrs(
        self,
        residual_stack: Vectors,
        tokens: TokenIds | str,
        incorrect_tokens: TokenIds | str | None = None,
        *,
        pos_slice: Choice = None,
        batch_slice: Choice = None,
        has_batch_dim: bool = True,
    ) -> Attributions:
        """How much each component adds to the logit of `tokens`, or to its difference to `incorrect_tokens`.

        The components of a full decomposition and `logit_attr_bias` sum to the logit (the one before a soft cap
        where the model has one); so does the last stream as a whole.

        Args:
            residual_stack, pos_slice, batch_slice, has_batch_dim: as in `apply_ln_to_stack`; vectors of the last
                stream, not yet through the norm.
            tokens: a token id, or ids `[batch]` (`[pos]` without rows) or `[batch pos]`, of the rows taken.
            incorrect_tokens: ids of the same shape.

        Raises:
            CacheError: the tokens do not fit the stack, or are text: a cache has no tokenizer.
        """
        stack, norm, lead = fit_norm(
            self._beside(residual_stack), residual_stack, locate(self.cfg, None),
            pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim,
        )  # fmt: skip
        asked = find_directions(self, tokens, incorrect_tokens, like_activation=stack)
        read = widen(stack) if norm is None else norm.apply(stack)
        return (read * align_directions(asked.directions, lead)).sum(-1)

    def _beside(self, stack: object) -> "ActivationCache":
        """The cache with what is read of it where a stack is, if it lies on several devices."""
        return self.gathered(stack.device) if isinstance(stack, Tensor) else self

    def logit_attr_bias(
        self, tokens: TokenIds | str, incorrect_tokens: TokenIds | str | None = None
    ) -> Float[Tensor, "*ids"]:
        """What the final norm's bias and `b_U` add to the logit of `tokens`, or to a difference; in shape of `tokens`.

        Raises:
            CacheError: ids outside the vocabulary, or text.
        """
        reference = next((tensor for tensor in self.values() if tensor.is_floating_point()), torch.zeros(()))
        return find_directions(self, tokens, incorrect_tokens, like_activation=reference).bias
