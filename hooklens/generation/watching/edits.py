"""Edits while generating: their positions, and the rows they mean once rows have finished.

An edit's `rows` are prompts; all samples of a prompt get its edits. Positions are absolute, and so is what a
negative one means: it counts from the end of the prompt, at every step. `when="prefill"` acts on the prompts'
tokens, `when="decode"` on the new ones. `Mean` takes its mean over the tokens of one step: the prompts', then
one token of every unfinished row.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.axes import find_site
from hooklens.errors import EditError, join_names
from hooklens.generation.model import GeneratingModel
from hooklens.generation.prompts import Prompts
from hooklens.hooks.call import Hook, Listeners, Listening, Phase, TokenIndex
from hooklens.hooks.choice import read_choice, resolve_choice
from hooklens.hooks.edits import Add, Edit, Mean, Project, Replace, Scale, SetComponents, Zero
from hooklens.hooks.point import HookPoint


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """Which tokens a step runs, as edits see them.

    Attributes:
        token_index: `[batch pos]`, absolute positions; -1 for what the edit must leave alone.
        n_tokens: `[batch]`, the most tokens each row can come to.
        phase: what the step is part of.
        positions_by_column: None: rows differ.
        columns: None: tensors hold all columns of the step.
    """

    token_index: Tensor
    n_tokens: Tensor
    phase: Phase
    positions_by_column: None = None
    columns: None = None

    @property
    def length(self) -> int:
        """The most tokens of any row; rows differ, so nobody asks."""
        return int(self.n_tokens.max())

    @property
    def n_run(self) -> int:
        """Columns of the step."""
        return self.token_index.shape[1]


class StepEdits:
    """The edits of one generation.

    Args:
        model: finds hook points.
        edits: the caller's edits.
        prompts: give rows and ends of prompts.
        max_new_tokens: most tokens to come.
        n_samples: rows generated for each prompt.
        whole_sequences: every step runs all tokens of a row, for want of a key-value cache.

    Raises:
        EditError: positions, rows or query heads that the generation does not have, or an edit that a key-value
            cache cannot hold.
        HookNameError: an edit names no hook point.
    """

    def __init__(
        self,
        model: GeneratingModel,
        edits: Sequence[Edit],
        prompts: Prompts,
        *,
        max_new_tokens: int,
        n_samples: int,
        whole_sequences: bool,
    ) -> None:
        self._n_samples = n_samples
        self._whole_sequences = whole_sequences
        self._device = prompts.ids.device
        ends = [before + length for before, length in zip(prompts.n_before, prompts.lengths, strict=True)]
        for edit in edits:
            _check_positions(edit, ends, max_new_tokens)
        self._prompt_ends = torch.tensor(ends, device=self._device)
        # Negative positions are counted from here, so each is moved back by the tokens to come.
        self._n_tokens = self._prompt_ends + max_new_tokens
        self._placed = [
            (_from_prompt_end(edit, max_new_tokens), point)
            for edit in edits
            for point in model.find_edit_points(edit).values()
        ]
        if not whole_sequences:
            _refuse_uncached(self._placed)
        self._prompt_of = list(range(len(ends)))
        self._sample_of = [0] * len(ends)
        self._tokens: StepTokens | None = None

    def __bool__(self) -> bool:
        return bool(self._placed)

    @property
    def listeners(self) -> Listeners:
        """The edits at each of their points."""
        made: dict[HookPoint, Listening] = {}
        for edit, point in self._placed:
            made.setdefault(point, Listening()).hooks.append(Hook(_Listener(self, edit), point, form="point"))
        return made

    def begin_step(self, tokens: TokenIndex, rows: Sequence[int] | None, finished: Sequence[int]) -> None:
        """Take note of the step that comes.

        Args:
            tokens: the plan of the call.
            rows: the row of the result that each row of the call is; None while each is a prompt.
            finished: rows of the call that are run along without meaning.
        """
        n_prompts = len(self._prompt_ends)
        if rows is None:
            self._prompt_of, self._sample_of = list(range(n_prompts)), [0] * n_prompts
        else:
            self._prompt_of = [row // self._n_samples for row in rows]
            self._sample_of = [row % self._n_samples for row in rows]
        token_index = tokens.token_index
        if finished:
            token_index = token_index.clone()
            token_index[list(finished)] = -1
        self._tokens = StepTokens(token_index=token_index, n_tokens=self._n_tokens[self._prompt_of], phase=tokens.phase)

    def apply(self, edit: Edit, tensor: Tensor, point: HookPoint) -> Tensor | None:
        """The edited tensor; None when the edit has nothing to do in this step."""
        assert self._tokens is not None
        tokens = self._tokens
        if self._whole_sequences and edit.when != "all":
            edit, tokens = self._restrict_to_phase(edit, tokens)
        in_order = self._prompt_of == list(range(len(self._prompt_ends)))
        if in_order or _treats_rows_alike(edit):
            return edit.apply(tensor, point, tokens)
        return self._apply_by_prompt(edit, tensor, point, tokens)

    def _restrict_to_phase(self, edit: Edit, tokens: StepTokens) -> tuple[Edit, StepTokens]:
        """The edit and the tokens of its phase, in a call that runs those of both."""
        ends = self._prompt_ends[self._prompt_of][:, None]
        in_phase = tokens.token_index < ends if edit.when == "prefill" else tokens.token_index >= ends
        phase: Phase = "prefill" if edit.when == "prefill" else "decode"
        index = tokens.token_index.masked_fill(~in_phase, -1)
        pos = slice(None) if edit.pos is None else edit.pos
        return dataclasses.replace(edit, pos=pos), StepTokens(token_index=index, n_tokens=tokens.n_tokens, phase=phase)

    def _apply_by_prompt(self, edit: Edit, tensor: Tensor, point: HookPoint, tokens: StepTokens) -> Tensor | None:
        """Apply the edit to one sample of every prompt at a time, so that it finds the prompts as rows."""
        edited: Tensor | None = None
        n_prompts = len(self._prompt_ends)
        for sample in sorted(set(self._sample_of)):
            place_of = {
                prompt: place
                for place, (prompt, own) in enumerate(zip(self._prompt_of, self._sample_of, strict=True))
                if own == sample
            }
            # Some row stands in for those that are gone; being no tokens, it is left alone.
            filler = next(iter(place_of.values()))
            places = [place_of.get(prompt, filler) for prompt in range(n_prompts)]
            token_index = tokens.token_index[places]
            token_index[[prompt for prompt in range(n_prompts) if prompt not in place_of]] = -1
            view = StepTokens(token_index=token_index, n_tokens=self._n_tokens, phase=tokens.phase)
            returned = edit.apply(tensor[places], point, view)
            if returned is not None:
                edited = tensor.clone() if edited is None else edited
                edited[list(place_of.values())] = returned[list(place_of)]
        return edited


@dataclass(frozen=True)
class _Listener:
    """An edit as a hook function."""

    step_edits: StepEdits
    edit: Edit

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor | None:
        return self.step_edits.apply(self.edit, tensor, hook)


def _refuse_uncached(placed: Sequence[tuple[Edit, HookPoint]]) -> None:
    """Refuse edits that the steps to come would not find in the key-value cache, before any work is done."""
    names = [name for _, point in placed if (site := find_site(name := point.name or "")) is not None and site.repeats]
    if names:
        raise EditError(
            f"edits at {join_names(list(dict.fromkeys(names)), limit=5)} change what single query heads read; the "
            "key-value cache keeps one key and value for all query heads that share them, so later steps would read "
            "them without the edit. Generate with use_past_kv_cache=False, or edit the key-value head with head= "
            "at hook_k or hook_v"
        )


def _treats_rows_alike(edit: Edit) -> bool:
    """Whether an edit does to each row what it would do to it alone."""
    if edit.rows is not None:
        return False
    if isinstance(edit, Replace | Add):
        return not isinstance(edit.value, Tensor) or edit.value.ndim <= 1
    return isinstance(edit, Scale | Zero | Project | SetComponents)


def _from_prompt_end(edit: Edit, max_new_tokens: int) -> Edit:
    """The edit with negative positions moved back by the tokens to come."""

    def move(position: int) -> int:
        return position - max_new_tokens if position < 0 else position

    pos = read_choice(edit.pos, what="pos", error=EditError)
    if isinstance(edit, Mean) and pos is None:
        # Neither padding nor finished rows belong into a mean.
        return dataclasses.replace(edit, pos=slice(None))
    if pos is None:
        return edit
    if isinstance(pos, int):
        return dataclasses.replace(edit, pos=move(pos))
    if isinstance(pos, slice):
        start, stop = (None if end is None else move(end) for end in (pos.start, pos.stop))
        return dataclasses.replace(edit, pos=slice(start, stop, pos.step))
    return dataclasses.replace(edit, pos=[move(position) for position in pos])


def _check_positions(edit: Edit, prompt_ends: list[int], max_new_tokens: int) -> None:
    """Refuse positions no row can have, and rows that are no prompts, before any work is done."""
    subject = f"edit {type(edit).__name__}({edit.name!r})"
    index = read_choice(edit.rows, what=f"{subject}: rows", error=EditError)
    rows = resolve_choice(
        index, len(prompt_ends), what=f"{subject}: rows", noun="prompts, which rows are while generating",
        error=EditError,
    )  # fmt: skip
    pos = read_choice(edit.pos, what=f"{subject}: pos", error=EditError)
    if pos is None or isinstance(pos, slice):
        return
    wanted = (pos,) if isinstance(pos, int) else pos
    bad = [
        f"{position} in row {row}"
        for row in rows
        for position in wanted
        if not -prompt_ends[row] <= position < prompt_ends[row] + max_new_tokens
    ]
    if bad:
        raise EditError(
            f"{subject}: positions out of range: {', '.join(bad[:10])}; prompts have {prompt_ends} tokens and "
            f"max_new_tokens={max_new_tokens}; negative positions count from the end of the prompt"
        )
