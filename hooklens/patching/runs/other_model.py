"""Another model as the source of activations: a fine-tune's put into its base, a merge's into what it was merged from.

The other model is run whole, on the prompts that the activations are to come from; what passes a hook point there goes
into the same hook point here. Both hook points must have one shape, but for axes that the input decides; the rest of
the two models may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.axes import is_past_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, TransformError
from hooklens.patching.errors import SiteError
from hooklens.patching.runs.vocabulary import Vocabulary, unembed
from hooklens.weights.processing import check_transforms_match


@dataclass(frozen=True)
class OtherRun:
    """What another model did on some prompts.

    Attributes:
        captured: activations by hook name, `[pairs pos ...]`, where the model has its own and in its dtype.
        last: the stream that left its last block, `[pairs pos d_model]` of the other model.
    """

    captured: dict[str, Tensor]
    last: Float[Tensor, "pairs pos d_model"]


def check_other_model(
    model: HookedCausalLM, other: HookedCausalLM, names: Sequence[str], *, allow_training: bool
) -> None:
    """Refuse a source model whose activations cannot stand in the model's place, before anything runs.

    Args:
        model: the model that is patched.
        other: the one that activations come from.
        names: the hook points that are patched.
        allow_training: accept a source in training mode.

    Raises:
        SiteError: hook points that it lacks, or of another shape; all are named.
        InputError: it predicts other outputs, or is in training mode.
        TransformError: its weights were processed differently.
    """
    shapes, others = _shapes(model), _shapes(other)
    problems = [
        f"{name!r} is {_show(shapes[name])} here, and there {_show(others[name]) if name in others else 'absent'}"
        for name in names
        if others.get(name) != shapes[name]
    ]
    if problems:
        raise SiteError(
            "source: the models do not agree in shape where activations are put in: "
            f"{'; '.join(problems[:10])}{f' and {len(problems) - 10} more' if len(problems) > 10 else ''}; patch hook "
            "points that both have in one shape"
        )
    if other.cfg.d_vocab_out != model.cfg.d_vocab_out:
        raise InputError(
            f"source: the model predicts {other.cfg.d_vocab_out} outputs and the one that is patched "
            f"{model.cfg.d_vocab_out}, so no metric takes the logits of both; give models of one vocabulary"
        )
    if other.drops or (other.training and not allow_training):
        raise InputError("source: the model is in training mode; call eval() of it first")
    try:
        check_transforms_match(other.transforms, model.transforms)
    except TransformError as error:
        raise TransformError(f"source (first) and the model (second): {error}") from error


def run_other_model(
    model: HookedCausalLM,
    other: HookedCausalLM,
    tokens: Int[Tensor, "pairs pos"],
    mask: Tensor | None,
    names: Sequence[str],
) -> OtherRun:
    """Run the source model.

    Args:
        model: the model that is patched, whose tokenizer has encoded the prompts.
        other: the one that activations come from.
        tokens: the prompts.
        mask: their real tokens; None: all are.
        names: the hook points that are patched.

    Raises:
        InputError: tokens that the source does not have, or that are others to its tokenizer.
    """
    tokenization.check_range(tokens, other.cfg.d_vocab)
    if model.tokenizer is not None and other.tokenizer is not None:
        used = tokens if mask is None else tokens[mask]
        whose = ("the model", "the source")
        tokenization.check_same_tokens(model.tokenizer, other.tokenizer, torch.unique(used).tolist(), whose=whose)
    last = f"blocks.{other.cfg.n_layers - 1}.hook_resid_post"
    tokens = tokens.to(other.device)
    with torch.no_grad(), other.capture([*dict.fromkeys([*names, last])]) as captured:
        plan = other.make_plan(tokens, None if mask is None else mask.to(other.device))
        other.run(tokens, plan, unembed=any(map(is_past_blocks, names)))
    return OtherRun({name: captured[name].to(model.device, model.dtype) for name in names}, captured[last])


def unembed_other_model(
    other: HookedCausalLM, stream: Float[Tensor, "pairs read d_model"], vocabulary: Vocabulary | None
) -> Float[Tensor, "pairs read tokens"]:
    """The source model's logits of its own stream, of some tokens or all."""
    logits = unembed(other, stream)
    return logits if vocabulary is None else logits[..., vocabulary.tokens.to(logits.device)]


def _shapes(model: HookedCausalLM) -> dict[str, tuple[int | str, ...]]:
    table = model.hook_table()
    return dict(zip(table["name"], table["shape"], strict=True))


def _show(shape: tuple[int | str, ...]) -> str:
    return f"[{' '.join(map(str, shape))}]"
