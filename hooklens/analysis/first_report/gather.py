"""Running a prompt once, and asking all of a report's questions about the run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.activation_cache import ActivationCache
from hooklens.analysis.first_report import findings
from hooklens.analysis.first_report.page import Finding, Report
from hooklens.analysis.first_report.question import Question
from hooklens.analysis.lens.streams import check_transport
from hooklens.analysis.lens.transport import Transport, read_transport
from hooklens.analysis.reading.connection import read_model
from hooklens.analysis.reading.token_names import read_token
from hooklens.arguments import optional, read_int, reads, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import HookLensError, InputError
from hooklens.tokens import Prompt

# What the findings read of a run; the rest need not be kept.
_ENDS = (
    "hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_scale",
    "hook_z", "hook_pattern", "hook_v",
)  # fmt: skip


@reads(model=read_model, pos=read_int, k=partial(read_int, least=1), transport=optional(read_transport))
@torch.no_grad()
def report(
    model: HookedCausalLM,
    prompt: Prompt,
    *,
    answer: str | int | None = None,
    wrong: str | int | None = None,
    pos: int = -1,
    k: int = 3,
    transport: Transport | None = None,
) -> Report:
    """One page on what a model does with a prompt: predictions, lens, components, heads, sources, known kinds.

    It names what stands out, and each finding has the call that makes its table, to go on from. What a model has no
    place for (heads in one without attention, say) is left out, and the report says so.

    The numbers on components, heads and sources are of direct logit attribution, of the answer's logit minus that of
    another token: what a head does for later layers is not in them; patching tells (`hooklens.patching`).

    Args:
        model: the model.
        prompt: a text, or token ids of one row.
        answer: the token to explain, its text or id; None: the likeliest one.
        wrong: the token to compare it with; None: the likeliest other one.
        pos: the position whose next token is asked about, counted over the prompt's tokens.
        k: how many predictions to list.
        transport: what the lens reads through, a `TunedLens` or a `JacobianLens`; None: streams as they are.

    Raises:
        InputError: no prompt of one row, no such position or token, answer and wrong are one, a model whose outputs
            are no tokens, or a transport of another model.
        TransformError: the transport was fitted on weights that were processed otherwise.
    """
    refuse_other_outputs(model.cfg, "a report is on the next token", InputError)
    if k > model.cfg.d_vocab:
        raise InputError(f"report: k={k}; expected 1 to {model.cfg.d_vocab}, the size of the vocabulary")
    check_transport(model, transport, sublayers=False)
    given = _read_prompt(model, prompt)
    chosen = [
        None if one is None else read_token(model, one, what=what)
        for one, what in (
            (answer, "answer"),
            (wrong, "wrong"),
        )
    ]
    logits: Any = model(given, logits_at=pos)
    cache = _run(model, given)
    pair = _choose(logits[0, 0], *chosen)
    question = Question(
        model=model, cache=cache, logits=logits[0, 0], answer=pair[0], wrong=pair[1], pos=pos, transport=transport
    )
    found, skipped = _ask(question, k)
    return Report(
        prompt=given if isinstance(given, str) else _tell_ids(model, given),
        asked=(
            f"{question.name(pair[0])} against {question.name(pair[1])}: a difference of {question.difference:+.2f} "
            f"logits, at position {pos}"
        ),
        setup=_write_setup(question, given),
        findings=tuple(found),
        skipped=tuple(skipped),
    )


def _read_prompt(model: HookedCausalLM, prompt: object) -> str | Int[Tensor, "one pos"]:
    """A text, or the ids of one row.

    Raises:
        InputError: something else.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("prompt is '', expected a text that is not empty, or token ids of one row")
        return prompt
    if tokenization.is_text(prompt):
        raise refusal(prompt, "prompt", "one text, or token ids of one row", InputError)
    ids, mask = tokenization.read_tokens(prompt, model.tokenizer, d_vocab=model.cfg.d_vocab, what="prompt")
    if len(ids) != 1:
        raise InputError(f"prompt has {len(ids)} rows; expected a text, or token ids of one row")
    return ids if mask is None else ids[:, mask[0].bool()]


def _run(model: HookedCausalLM, given: str | Tensor) -> ActivationCache:
    names = [name for name in model.hook_points() if name.endswith(_ENDS)]
    _, cache = model.run_with_cache(given, return_type=None, names_filter=names)
    return cache


def _choose(logits: Tensor, answer: int | None, wrong: int | None) -> tuple[int, int]:
    """The two tokens: what was asked for, or the likeliest.

    Raises:
        InputError: they are one.
    """
    best: list[int] = logits.topk(min(3, len(logits))).indices.tolist()
    if answer is None:
        answer = next(token for token in best if token != wrong)
    if wrong is None:
        wrong = next(token for token in best if token != answer)
    if answer == wrong:
        raise InputError(f"answer and wrong are both token {answer}; expected two tokens")
    return answer, wrong


def _ask(question: Question, k: int) -> tuple[list[Finding], list[tuple[str, str]]]:
    """What was found, and what this model has no place for."""
    found: list[Finding] = []
    skipped: list[tuple[str, str]] = []
    has_heads = any(block.attn is not None for block in question.model.cfg.blocks)
    makers: dict[str, Callable[[], Finding]] = {
        "predictions": lambda: findings.find_predictions(question, k),
        "lens": lambda: findings.find_layers(question, k),
        "components": lambda: findings.find_components(question),
        "heads": lambda: findings.find_heads(question),
        "sources": lambda: findings.find_sources(question),
        "kinds": lambda: findings.find_kinds(question, next((one for one in found if one.name == "heads"), None)),
    }
    for name, make in makers.items():
        if name in ("heads", "sources", "kinds") and not has_heads:
            skipped.append((name, "the model has no attention"))
            continue
        try:
            found.append(make())
        except HookLensError as reason:
            skipped.append((name, str(reason)))
    return found, skipped


def _write_setup(question: Question, given: str | Tensor) -> tuple[str, ...]:
    prompt = repr(given) if isinstance(given, str) else repr(given.tolist())
    names = ", ".join(question.name(token) for token in (question.answer, question.wrong))
    return (
        "from hooklens import analysis",
        f"prompt, answer, wrong = {prompt}, {question.answer}, {question.wrong}  # {names}",
        f"logits = model(prompt, logits_at={question.pos})[0, 0]",
        "_, cache = model.run_with_cache(prompt, return_type=None)",
    )


def _tell_ids(model: HookedCausalLM, ids: Int[Tensor, "one pos"]) -> str:
    if model.tokenizer is None or int(ids.max()) >= len(model.tokenizer):
        return str(ids[0].tolist())
    return str(model.to_string(ids[0]))
