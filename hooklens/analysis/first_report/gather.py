"""Running a prompt once, and asking all of a report's questions about the run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.stream import locate
from hooklens.analysis.first_report import findings
from hooklens.analysis.first_report.page import Finding, Report
from hooklens.analysis.first_report.question import Question
from hooklens.analysis.lens.streams import check_transport, list_captured
from hooklens.analysis.lens.transport import Transport, read_transport
from hooklens.analysis.reading.connection import connect_cache, find_real_positions, read_model
from hooklens.analysis.reading.runs import Run, read_run_or_prompt, take_run
from hooklens.analysis.reading.token_columns import choose_tokens
from hooklens.analysis.reading.token_names import read_token
from hooklens.arguments import optional, read_int, reads, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import HookLensError, InputError
from hooklens.model.stream_reader import StreamReader

# What the findings read of a run; the rest need not be kept.
_ENDS = (
    "hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_scale",
    "hook_z", "hook_pattern", "hook_v",
)  # fmt: skip


@reads(
    model=read_model,
    prompt=read_run_or_prompt,
    pos=read_int,
    k=partial(read_int, least=1),
    transport=optional(read_transport),
)
@torch.no_grad()
def report(
    model: HookedCausalLM,
    prompt: Run,
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
        prompt: a text, or token ids of one row; or the cache of a run of one row, edited ones included. Findings whose
            hook points a cache lacks are left out, and the report says which; kinds of heads are found by prompts of
            their own, without the run's edits.
        answer: the token to explain, its text or id; None: the likeliest one.
        wrong: the token to compare it with; None: the likeliest other one.
        pos: the position whose next token is asked about, counted over the prompt's tokens.
        k: how many predictions to list.
        transport: what the lens reads through, a `TunedLens` or a `JacobianLens`; None: streams as they are.

    Raises:
        InputError: no prompt of one row (or a cache without its tokens), no such position or token, answer and wrong
            are one, a model whose outputs are no tokens, or a transport of another model.
        CacheError: the cache is of another model.
        MissingActivationError: it has no last `resid_post`, of which the logits are made.
        TransformError: the transport was fitted on weights that were processed otherwise, or the cache is of such.
    """
    refuse_other_outputs(model.cfg, "a report is on the next token", InputError)
    if k > model.cfg.d_vocab:
        raise InputError(f"report: k={k}; expected 1 to {model.cfg.d_vocab}, the size of the vocabulary")
    check_transport(model, transport, sublayers=False)
    given, cache = _read_prompt(model, prompt)
    chosen = [
        None if one is None else read_token(model, one, what=what)
        for one, what in (
            (answer, "answer"),
            (wrong, "wrong"),
        )
    ]
    logits = _find_logits(model, given, pos) if cache is None else _read_logits(model, cache, pos)
    pair = _choose(logits, *chosen)
    question = Question(
        model=model, cache=take_run(model, given, _ENDS) if cache is None else cache, logits=logits, answer=pair[0],
        wrong=pair[1], pos=pos, transport=transport,
    )  # fmt: skip
    found, skipped = _ask(question, k)
    return Report(
        prompt=given if isinstance(given, str) else _tell_ids(model, given),
        asked=(
            f"{question.name(pair[0])} against {question.name(pair[1])}: a difference of {question.difference:+.2f} "
            f"logits, at position {pos}"
        ),
        setup=_write_setup(question, given, is_run=cache is not None),
        findings=tuple(found),
        skipped=tuple(skipped),
    )


def _read_prompt(model: HookedCausalLM, prompt: Run) -> tuple[str | Int[Tensor, "one token"], ActivationCache | None]:
    """A text, or the ids of one row; and the cache, where that was given.

    Raises:
        InputError: something else.
        CacheError, TransformError: the cache is not this model's.
    """
    if isinstance(prompt, ActivationCache):
        return _read_cache(model, prompt)
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("prompt is '', expected a text that is not empty, or token ids of one row")
        return prompt, None
    if tokenization.is_text(prompt):
        raise refusal(prompt, "prompt", "one text, token ids of one row, or a cache", InputError)
    ids, mask = tokenization.read_tokens(prompt, model.tokenizer, d_vocab=model.cfg.d_vocab, what="prompt")
    if len(ids) != 1:
        raise InputError(f"prompt has {len(ids)} rows; expected a text, or token ids of one row")
    return ids if mask is None else ids[:, mask[0].bool()], None


def _read_cache(model: HookedCausalLM, cache: ActivationCache) -> tuple[Int[Tensor, "one token"], ActivationCache]:
    """The token ids of a cache of one row, and the cache.

    Raises:
        InputError: several rows, a cache that does not know its tokens, or one of a part of the positions.
        CacheError, TransformError: it is not this model's.
    """
    cache = connect_cache(cache, model)
    tokens = cache.tokens
    if tokens is None:
        raise InputError("prompt is a cache that does not know its tokens (its run began at a layer); give the prompt")
    if len(tokens) != 1:
        raise InputError(
            f"prompt is a cache of {len(tokens)} rows; expected one: cache.unpad(row), or the run of one prompt"
        )
    if cache.positions is not None:
        raise InputError("prompt is a cache of some positions (pos_slice); expected one of the whole prompt")
    real = find_real_positions(cache, tokens.shape[1])
    return (tokens if real is None else tokens[:, real[0]]), cache


def _find_logits(model: HookedCausalLM, given: str | Tensor, pos: int) -> Float[Tensor, " d_vocab"]:
    logits: Any = model(given, logits_at=pos)
    found: Tensor = logits[0, 0]
    return found


def _read_logits(model: HookedCausalLM, cache: ActivationCache, pos: int) -> Float[Tensor, " d_vocab"]:
    """The logits at a position of a run that was captured, made of the stream behind the last layer.

    Raises:
        InputError: there is no such position.
        MissingActivationError: the cache lacks that stream.
    """
    tokens, _ = list_captured(cache)
    [[place]] = choose_tokens(tokens, [pos], what="pos")
    column = tokens[0][place]
    stream = locate(cache.cfg, None).read(cache)[..., column, :]
    reader = StreamReader(model)
    return reader.unembed(reader.normalize(stream)).view(-1)


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


def _write_setup(question: Question, given: str | Tensor, *, is_run: bool) -> tuple[str, ...]:
    prompt = repr(given) if isinstance(given, str) else repr(given.tolist())
    names = ", ".join(question.name(token) for token in (question.answer, question.wrong))
    makes = (
        f"logits = model(prompt, logits_at={question.pos})[0, 0]",
        "_, cache = model.run_with_cache(prompt, return_type=None)",
    )
    reads = (
        "# cache: the run that the report was made of",
        f'logits = model.unembed(model.ln_final(cache["resid_post", -1]))[..., {question.pos}, :].flatten()',
    )
    return (
        "from hooklens import analysis",
        f"prompt, answer, wrong = {prompt}, {question.answer}, {question.wrong}  # {names}",
        *(reads if is_run else makes),
    )


def _tell_ids(model: HookedCausalLM, ids: Int[Tensor, "one token"]) -> str:
    if model.tokenizer is None or int(ids.max()) >= len(model.tokenizer):
        return str(ids[0].tolist())
    return str(model.to_string(ids[0]))
