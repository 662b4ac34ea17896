"""Generation from start to end: whole results, and streams of steps."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.errors import InputError, warn_caller
from hooklens.generation.decoding import Decoding
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions, ReturnKind, Streamer
from hooklens.generation.output import N_ALTERNATIVES, Alternative, GenerationOutput, GenerationStep, GenerationTiming
from hooklens.generation.prompts import Input, Prompts, read_prompts
from hooklens.generation.text import TextPieces
from hooklens.progress import progress_bar
from hooklens.tokens.tokenizer import Tokenizer, decode_each

Generated = str | list[str] | Tensor | GenerationOutput


def generate(
    model: GeneratingModel,
    input: Input,
    options: GenerationOptions,
    *,
    streamer: Streamer | None = None,
    return_type: ReturnKind = "input",
    verbose: bool = True,
) -> Generated:
    """Prompts with their continuations.

    Breaking off (Ctrl-C) ends the generation with a warning, and what there is so far is returned.

    Args:
        model: runs.
        input: text, texts, or token ids.
        options: how.
        streamer: is put the prompts, then the tokens of every step.
        return_type: `"input"` gives text for text and ids for ids, `"tokens"` ids `[rows pos]`, `"str"` text (a
            list for several rows), `"output"` a `GenerationOutput`.
        verbose: show a progress bar.

    Raises:
        InputError: anything that does not fit, before any work.
        CacheError: the key-value cache does not fit.
    """
    is_text = tokenization.is_text(input)
    gives_text = return_type == "str" or (return_type == "input" and is_text)
    # Text that was given needs a tokenizer before text that is to be given back does.
    if gives_text and not is_text and model.tokenizer is None:
        raise InputError(
            f"generate: return_type={return_type!r} needs a tokenizer and the model has none; use 'tokens'"
        )
    prompts = read_prompts(model, input, options)
    keeps = return_type == "output"
    decoding = Decoding(model, prompts, options, keeps_logprobs=keeps, n_alternatives=N_ALTERNATIVES if keeps else 0)
    clock = _Clock()
    interrupted = False
    try:
        with progress_bar("generating", total=options.max_new_tokens, unit="token", progress=verbose) as bar:
            for _ in _steps(decoding, prompts, streamer):
                clock.tick()
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
        warn_caller(f"generation was interrupted after {clock.n_steps} tokens a row")
    if streamer is not None:
        streamer.end()
    tokens = decoding.tokens()
    if return_type == "output":
        return _build_output(model, decoding, tokens, clock, interrupted=interrupted)
    if not gives_text:
        return tokens
    text = decoding.text(tokens)
    return text[0] if len(text) == 1 and (isinstance(input, str) or not is_text) else text


def generate_stream(model: GeneratingModel, input: Input, options: GenerationOptions) -> Iterator[GenerationStep]:
    """The steps of a generation as they are made.

    Between two steps the model is free: edits act only while a step is made.

    Raises:
        InputError: anything that does not fit, before any work.
        CacheError: the key-value cache does not fit.
    """
    if options.names_filter is not None:
        raise InputError("generate_stream has no result to put captured activations in; use generate, or add a hook")
    prompts = read_prompts(model, input, options)
    decoding = Decoding(model, prompts, options, keeps_logprobs=True)
    return _stream(model, decoding, prompts)


def _stream(model: GeneratingModel, decoding: Decoding, prompts: Prompts) -> Iterator[GenerationStep]:
    pieces: list[TextPieces] | None = None
    if model.tokenizer is not None:
        n_samples = len(decoding.rows) // len(prompts.lengths)
        pieces = [
            TextPieces(model.tokenizer, prompts.sequence(prompt))
            for prompt in range(len(prompts.lengths))
            for _ in range(n_samples)
        ]
    while not decoding.rows.done:
        decoding.step()
        yield decoding.newest_step(pieces)


def _steps(decoding: Decoding, prompts: Prompts, streamer: Streamer | None) -> Iterator[None]:
    """Make the steps, telling the streamer."""
    if streamer is not None:
        streamer.put(prompts.ids.cpu())
    rows = decoding.rows
    step = 0
    while not rows.done:
        decoding.step()
        step += 1
        if streamer is not None:
            newest = [ids[-1] if len(ids) == step else decoding.filling for ids in rows.new_ids]
            streamer.put(torch.tensor(newest))
        yield


class _Clock:
    """Takes the time of steps; reading tokens waits for the device, so steps end when their tokens are there."""

    def __init__(self) -> None:
        self.start = self.latest = time.perf_counter()
        self.first: float | None = None
        self.n_steps = 0

    def tick(self) -> None:
        self.latest = time.perf_counter()
        self.n_steps += 1
        if self.first is None:
            self.first = self.latest

    def timing(self) -> GenerationTiming:
        first = self.latest if self.first is None else self.first
        return GenerationTiming(
            time_to_first_token=first - self.start, total=self.latest - self.start, n_steps=self.n_steps
        )


def _build_output(
    model: GeneratingModel, decoding: Decoding, tokens: Tensor, clock: _Clock, *, interrupted: bool
) -> GenerationOutput:
    rows = decoding.rows
    return GenerationOutput(
        tokens=tokens,
        prompt_lengths=decoding.prompt_lengths,
        n_new_tokens=[len(ids) for ids in rows.new_ids],
        finish_reasons=["interrupted" if reason is None else reason for reason in rows.reasons],
        logprobs=decoding.logprobs(),
        text=None if model.tokenizer is None else decoding.text(tokens),
        cache=decoding.activation_cache(tokens),
        timing=clock.timing(),
        interrupted=interrupted,
        str_tokens=None
        if model.tokenizer is None
        else _name_tokens(model.tokenizer, decoding.prompt_lengths, tokens, rows.new_ids),
        alternatives=_name_alternatives(model.tokenizer, decoding),
    )


def _name_alternatives(tokenizer: Tokenizer | None, decoding: Decoding) -> list[list[list[Alternative]]]:
    """The likeliest tokens of every step of each row; each id is decoded once."""
    found = decoding.alternatives()
    ids = sorted({token for row in found for tokens, _ in row for token in tokens})
    strings = dict(zip(ids, map(str, ids) if tokenizer is None else decode_each(tokenizer, ids), strict=True))
    return [
        [
            [Alternative(token, strings[token], logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
            for tokens, logprobs in row
        ]
        for row in found
    ]


def _name_tokens(
    tokenizer: Tokenizer, prompt_lengths: list[int], tokens: Tensor, new_ids: list[list[int]]
) -> list[list[str]]:
    """The tokens of each row as strings; each id is decoded once."""
    lengths = [length + len(new) for length, new in zip(prompt_lengths, new_ids, strict=True)]
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    strings = iter(decode_each(tokenizer, [token for row in rows for token in row]))
    return [[next(strings) for _ in row] for row in rows]
