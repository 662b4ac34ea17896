"""The loop of a generation: prefill, then a token a step for every row that goes on."""

import torch
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.errors import InputError
from hooklens.generation.choosing.processors import build_pipeline
from hooklens.generation.choosing.sampling import RowDraws, likeliest_tokens, sample_tokens, token_log_probs
from hooklens.generation.choosing.stopping import FinishReason, StopRules
from hooklens.generation.forward import Forward
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions
from hooklens.generation.output import GenerationStep
from hooklens.generation.prompts import Prompts, filling_token_id
from hooklens.generation.rows import Rows
from hooklens.generation.text import TextPieces, decode_behind
from hooklens.generation.watching.recording import RowLayout
from hooklens.precision import widen


class Decoding:
    """One generation in progress.

    Args:
        model: runs.
        prompts: what to go on from.
        options: how.
        keeps_logprobs: compute the log-probability of every token.
        n_alternatives: keep so many of the likeliest tokens of every step.

    Attributes:
        rows: the tokens so far.
        filling: the id that stands where a row has no token.
    """

    def __init__(
        self,
        model: GeneratingModel,
        prompts: Prompts,
        options: GenerationOptions,
        *,
        keeps_logprobs: bool,
        n_alternatives: int = 0,
    ) -> None:
        self._prompts = prompts
        self._stops = StopRules(model, options, prompts)
        self._pipeline = build_pipeline(options)
        self._forward = Forward(model, prompts, options)
        self._n_samples = options.num_return_sequences
        self._n_past = 0 if options.past_kv_cache is None else len(options.past_kv_cache)
        self._past_mask = None if options.past_kv_cache is None else options.past_kv_cache.previous_attention_mask
        self._model = model
        self.filling = filling_token_id(model)
        self._reads_ids = bool(self._pipeline.reading_ids) or self._stops.reads_ids
        self.rows = Rows(
            prompts,
            n_samples=self._n_samples,
            max_new_tokens=options.max_new_tokens,
            keeps_all=self._forward.keeps_all_rows,
            needs_table=self._reads_ids or not options.use_past_kv_cache or self._forward.may_start_anew,
        )
        if options.samples and options.seed is None and getattr(model, "processes", None) is not None:
            raise InputError(
                "generate: several processes share this network (hooklens.parallel), and each would draw tokens of its "
                "own; give seed=, the same in all of them, or do_sample=False"
            )
        self._draws = RowDraws(len(self.rows), options.seed, prompts.ids.device) if options.samples else None
        self._newest: Tensor | None = None
        self._logprobs: list[tuple[list[int], Tensor]] | None = [] if keeps_logprobs else None
        self._n_alternatives = n_alternatives
        self._likeliest: list[tuple[list[int], Tensor, Tensor]] = []

    def step(self) -> None:
        """Add a token to every row that goes on."""
        rows = self.rows
        newest = self._newest
        logits = self._forward.run_prompts() if newest is None else self._forward.run_step(newest, rows)
        scores = widen(logits)
        processed = scores
        if self._reads_ids:
            processed = self._pipeline(scores, rows.ids)
        elif self._pipeline.reading_scores:
            processed = self._pipeline.warp(scores)
        tokens = self._choose(processed)
        if self._logprobs is not None:
            self._logprobs.append((list(rows.active), token_log_probs(scores, tokens)))
        if self._n_alternatives:
            self._likeliest.append((list(rows.active), *likeliest_tokens(scores, self._n_alternatives)))
        rows.append(tokens)
        ended = self._stops.ask_criteria(rows.ids, processed) if self._stops.reads_ids else None
        reasons: list[FinishReason | None] = [
            self._stops.reason(row, rows.new_ids[row], criterion=ended is not None and ended[place])
            for place in rows.places
            for row in [rows.active[place]]
        ]
        staying = rows.end(reasons)
        if staying is not None:
            self._forward.drop_rows(staying)
            tokens = tokens[staying]
        self._newest = tokens

    def _choose(self, processed: Tensor) -> Tensor:
        if self._draws is None:
            return processed.argmax(-1)
        uniform = self._draws.draw()
        if len(self.rows.active) != len(self.rows):
            uniform = uniform[self.rows.active_index]
        return sample_tokens(processed, uniform)

    def newest_step(self, pieces: list[TextPieces] | None) -> GenerationStep:
        """The step just made, for a stream.

        Args:
            pieces: of each row, told of its token; None without a tokenizer.
        """
        rows = self.rows
        assert self._logprobs is not None
        longest = max(len(ids) for ids in rows.new_ids)
        is_new = [len(ids) == longest for ids in rows.new_ids]
        text = None
        if pieces is not None:
            text = [
                piece.push(ids[-1], last=reason is not None) if new else ""
                for piece, ids, new, reason in zip(pieces, rows.new_ids, is_new, rows.reasons, strict=True)
            ]
        mask = torch.tensor(is_new, device=rows.device)
        active, values = self._logprobs[-1]
        logprobs = values.new_zeros(len(rows))
        logprobs[active] = values
        tokens = [ids[-1] if new else self.filling for ids, new in zip(rows.new_ids, is_new, strict=True)]
        return GenerationStep(
            tokens=torch.tensor(tokens, device=rows.device),
            is_new=mask,
            text=text,
            logprobs=logprobs.masked_fill(~mask, 0.0),
            finish_reasons=list(rows.reasons),
        )

    def tokens(self) -> Tensor:
        """`[rows pos]`: prompts and continuations, padding on the right."""
        sequences = []
        for row, new in enumerate(self.rows.new_ids):
            prompt = row // self._n_samples
            ids = self._prompts.ids[prompt, self._prompts.padding[prompt] :]
            sequences.append(torch.cat([ids, ids.new_tensor(new)]))
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self.filling)

    def logprobs(self) -> Tensor:
        """`[rows new]`: log-probabilities of the new tokens, 0 where a row has none."""
        assert self._logprobs is not None
        n_rows = len(self.rows)
        if not self._logprobs:
            return torch.zeros(n_rows, 0)
        columns = []
        for active, values in self._logprobs:
            column = values.new_zeros(n_rows)
            column[active] = values
            columns.append(column)
        lengths = torch.tensor([len(ids) for ids in self.rows.new_ids], device=columns[0].device)
        steps = torch.arange(len(columns), device=columns[0].device)
        return torch.stack(columns, 1).masked_fill(steps >= lengths[:, None], 0.0)

    def alternatives(self) -> list[list[tuple[list[int], list[float]]]]:
        """Of each row, for each new token the likeliest tokens and their log-probabilities."""
        found: list[list[tuple[list[int], list[float]]]] = [[] for _ in self.rows.new_ids]
        for active, tokens, logprobs in self._likeliest:
            for row, ids, values in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
                found[row].append((ids, values))
        return [steps[: len(new)] for steps, new in zip(found, self.rows.new_ids, strict=True)]

    def text(self, tokens: Tensor) -> list[str]:
        """The text of each row of `tokens()` without special tokens, as it reads behind what is in the cache."""
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        texts = []
        for row, (length, new) in enumerate(zip(self.prompt_lengths, self.rows.new_ids, strict=True)):
            before = self._prompts.tokens_before(row // self._n_samples)
            texts.append(decode_behind(tokenizer, before, tokens[row, : length + len(new)].tolist()))
        return texts

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return [length for length in self._prompts.lengths for _ in range(self._n_samples)]

    def activation_cache(self, tokens: Tensor) -> ActivationCache | None:
        """What was captured, as one run of all tokens but each row's last."""
        recorder = self._forward.recorder
        if not recorder:
            return None
        lengths = zip(self.prompt_lengths, self.rows.new_ids, strict=True)
        n_run = torch.tensor([length + max(0, len(ids) - 1) for length, ids in lengths], device=tokens.device)
        padding = torch.tensor(self._prompts.padding, device=tokens.device).repeat_interleave(self._n_samples)
        layout = RowLayout(padding=padding, n_run=n_run, n_past=self._n_past, n_samples=self._n_samples)
        n_columns = int(n_run.max())
        mask = torch.arange(n_columns, device=tokens.device) < n_run[:, None]
        if self._past_mask is not None:
            past = self._past_mask.to(tokens.device)[:, : self._n_past]
            past = past.expand(len(self._prompts.lengths), -1).repeat_interleave(self._n_samples, 0)
            mask = torch.cat([past, mask], 1)
        return ActivationCache(
            recorder.assemble(layout),
            cfg=self._model.cfg,
            transforms=self._model.transforms,
            tokens=tokens[:, :n_columns],
            attention_mask=mask,
            weights=self._model.named_weights(),
        )
