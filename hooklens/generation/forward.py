"""The model calls of a generation: the prompts once, then one token a step."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.generation.model import GeneratingModel, init_cache
from hooklens.generation.options import GenerationOptions
from hooklens.generation.prompts import Prompts
from hooklens.generation.rows import Rows
from hooklens.generation.watching.edits import StepEdits
from hooklens.generation.watching.recording import Recorder
from hooklens.hooks.call import Call, Phase, join_listeners, thread_listeners
from hooklens.kv_cache import HookedKeyValueCache

Logits = Float[Tensor, "batch d_vocab"]


class Forward:
    """Runs the model for one generation, with its edits and captures.

    Args:
        model: runs.
        prompts: what to begin with.
        options: cache, samples, edits and captures.

    Attributes:
        may_start_anew: whole sequences may be run again, where rotary frequencies depend on their length.
        keeps_all_rows: rows that have ended stay in the batch.
    """

    def __init__(self, model: GeneratingModel, prompts: Prompts, options: GenerationOptions) -> None:
        self._model = model
        self._prompts = prompts
        self._n_samples = options.num_return_sequences
        given = options.past_kv_cache
        # A hook may count on its rows, and a cache that is appended to keeps its own.
        points = model.hook_points()
        foreign_hooks = bool(thread_listeners()) or any(point.own is not None for point in points.values())
        self._masks_finished = given is not None and not given.frozen
        self.keeps_all_rows = foreign_hooks or self._masks_finished
        self.recorder = Recorder(model, options.names_filter)
        self.edits = StepEdits(
            model,
            options.edits,
            prompts,
            max_new_tokens=options.max_new_tokens,
            n_samples=self._n_samples,
            whole_sequences=not options.use_past_kv_cache,
        )
        self._listens = bool(self.recorder) or bool(self.edits)
        self._listeners = join_listeners([self.edits.listeners, self.recorder.listeners])
        self._uses_cache = options.use_past_kv_cache
        self._cache = self._open_cache(given) if self._uses_cache else None
        longest = max((seen + n for seen, n in zip(prompts.n_before, prompts.lengths, strict=True)), default=0)
        # Whoever listens or goes on from a cache counts on one token a step.
        self.may_start_anew = (
            self._uses_cache
            and given is None
            and not self._listens
            and model.depends_on_length(longest + options.max_new_tokens)
        )
        self._unembed_points = [point for name, point in points.items() if name.startswith("unembed.")]

    def _open_cache(self, given: HookedKeyValueCache | None) -> HookedKeyValueCache:
        n_prompts = len(self._prompts.lengths)
        if given is None:
            return init_cache(self._model, n_prompts)
        if not given.frozen:
            return given
        # New objects over the same tensors: the first append copies them, the given cache stays as it is.
        rows = given.expand(n_prompts) if given.batch_size == 1 else given.select(slice(None))
        return rows.unfreeze()

    @torch.no_grad()
    def run_prompts(self) -> Logits:
        """Logits of the first new token of every row."""
        prompts = self._prompts
        plan = self._model.make_plan(prompts.ids, prompts.mask, None, self._cache)
        if self.edits:
            self.edits.begin_step(plan, None, ())
        logits = self._run_last(prompts.ids, plan)
        if self.recorder:
            self.recorder.end_step(n_new=prompts.ids.shape[1], first_column=0, rows=None, places=None)
        if self._n_samples == 1:
            return logits
        samples = torch.arange(len(logits), device=logits.device).repeat_interleave(self._n_samples)
        if self._cache is not None:
            one = self._cache.batch_size == 1
            self._cache = self._cache.expand(self._n_samples) if one else self._cache.select(samples)
        return logits[samples]

    @torch.no_grad()
    def run_step(self, tokens: Int[Tensor, " active"], rows: Rows) -> Logits:
        """Logits of the next token of every active row.

        Args:
            tokens: the newest token of every active row.
            rows: which rows these are.
        """
        finished = rows.finished_places
        if self._cache is None:
            ids, mask = rows.table, self._mask_table(rows)
        else:
            ids = tokens[:, None]
            mask = self._mask_finished(len(ids), finished) if finished and self._masks_finished else None
        phase: Phase = "decode" if self._uses_cache else "prefill"
        plan = self._model.make_plan(ids, mask, None, self._cache, phase=phase)
        if self.may_start_anew and not self._model.fits_past(plan):
            return self._start_anew(rows)
        if not self._listens:
            return self._run_last(ids, plan)
        if self.edits:
            self.edits.begin_step(plan, rows.active, finished)
        logits = self._run_last(ids, plan)
        if self.recorder:
            places = torch.tensor(rows.places, device=logits.device)
            unfinished = rows.active_index[places]
            self.recorder.end_step(
                n_new=1,
                first_column=rows.n_columns - 1,
                rows=unfinished,
                places=None if len(rows.places) == len(rows.active) else places,
            )
        return logits

    def _start_anew(self, rows: Rows) -> Logits:
        """Run whole sequences into a new cache: those of the old one were short ones, which turn otherwise."""
        self._cache = init_cache(self._model, len(rows.active))
        ids, mask = rows.table, self._mask_table(rows)
        return self._run_last(ids, self._model.make_plan(ids, mask, None, self._cache, phase="prefill"))

    def drop_rows(self, staying: Sequence[int]) -> None:
        """Go on with some of the rows, by their places in the batch."""
        if self._cache is not None:
            self._cache = self._cache.select(staying)

    def _run_last(self, ids: Tensor, plan: object) -> Logits:
        """Logits at the last column; at all of them only where somebody listens there."""
        call = Call(join_listeners([thread_listeners(), self._listeners]))
        only_last = ids.shape[1] > 1 and not any(point.listens(call) for point in self._unembed_points)
        logits: Tensor = self._model.run(
            ids, plan, listeners=self._listeners, past_kv_cache=self._cache, logits_at=-1 if only_last else None
        )
        # Where tokens are chosen, which on several devices is not where logits come out.
        return logits[:, -1].to(ids.device)

    def _mask_table(self, rows: Rows) -> Bool[Tensor, "active pos"] | None:
        """Which columns of whole sequences are tokens."""
        prompt_mask = self._prompts.mask
        if prompt_mask is None:
            return None
        mask = torch.ones(len(rows.active), rows.n_columns, dtype=torch.bool, device=prompt_mask.device)
        mask[:, : prompt_mask.shape[1]] = prompt_mask.repeat_interleave(self._n_samples, 0)[rows.active_index]
        return mask

    def _mask_finished(self, batch: int, finished: Sequence[int]) -> Bool[Tensor, "batch one"]:
        mask = torch.ones(batch, 1, dtype=torch.bool, device=self._prompts.ids.device)
        mask[list(finished)] = False
        return mask
