"""Answers that metrics read: tokens given as ids or as texts, for all pairs of prompts or for each its own.

3, " Mary"                   one answer, the same for all pairs
[3, " John", 7]              one answer for each pair, in their order
[[3, 4]]                     several answers, the same for all pairs
[[3, 4], [" John"], [7]]     several answers for each pair, not all equally many; or a tensor `[pairs answers]`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import HookLensError, InputError
from hooklens.patching.errors import MetricError

Token = int | str
Tokens = (
    Token | Sequence[Token] | Sequence[Token | Sequence[Token]] | Int[Tensor, "..."] | np.ndarray[Any, np.dtype[Any]]
)
"""Answers as a caller gives them."""

Row = tuple[Token, ...]

_EXPECTED = (
    "a token id or text, a list of one for each pair, or a list of lists (or tensor [pairs answers]) of several for "
    "each pair"
)


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers as token ids, in one row for all pairs, or in one row for each.

    Attributes:
        ids: rows of fewer answers than others repeat their first one.
        real: False at the repeated ones.
    """

    ids: Int[Tensor, "rows answers"]
    real: Bool[Tensor, "rows answers"]

    @classmethod
    def of_ids(cls, rows: Sequence[Sequence[int]], *, device: torch.device | None = None) -> "Answers":
        """Rows of ids; each has at least one."""
        most = max(map(len, rows))
        ids = [[*row, *[row[0]] * (most - len(row))] for row in rows]
        real = [[place < len(row) for place in range(most)] for row in rows]
        return cls(torch.tensor(ids, device=device), torch.tensor(real, device=device))

    def of_pairs(self, pairs: Sequence[int], n_pairs: int | None, *, what: str) -> "Answers":
        """The rows of some of an experiment's pairs.

        Args:
            pairs: the pairs wanted.
            n_pairs: how many the experiment has; None: it is not known, since they come one after another.
            what: what an error calls the answers.

        Raises:
            InputError: neither one row nor one for each pair of the experiment.
        """
        n_rows = len(self.ids)
        if n_rows == 1:
            return self
        if n_pairs is None:
            raise InputError(
                f"{what}: answers of {n_rows} pairs, but the pairs come from a loader, so their number is not known; "
                "let each bring its own, Pair(clean, corrupted, answer=..., wrong=...)"
            )
        if n_rows != n_pairs:
            raise InputError(
                f"{what}: {n_rows} tokens for {n_pairs} pairs; expected 1 or {n_pairs} (several answers of one pair "
                "stand in a list of their own: [[1, 2]])"
            )
        return self.take(pairs)

    def among(self, places: Int[Tensor, " d_vocab"]) -> "Answers":
        """The answers among fewer tokens, which stand at these places; -1 where one does not."""
        return Answers(places.to(self.ids.device)[self.ids], self.real)

    def take(self, rows: Sequence[int]) -> "Answers":
        """Some of the rows."""
        chosen = list(rows)
        return Answers(self.ids[chosen], self.real[chosen])

    def read(self, values: Float[Tensor, "cells pairs read d_vocab"], *, what: str) -> Float[Tensor, "_ _ _ answers"]:
        """The entries of a vocabulary axis at the answers, `[cells pairs read answers]`.

        Raises:
            MetricError: another number of rows than pairs, or ids outside the vocabulary.
        """
        self._check_fits(values, what)
        ids = self.ids.to(values.device)[None, :, None]
        return values.take_along_dim(ids.expand(len(values), *values.shape[1:3], -1), -1)

    def hold(self, best: Int[Tensor, "cells pairs read"]) -> Bool[Tensor, "cells pairs read"]:
        """Whether tokens are among the answers."""
        ids = self.ids.to(best.device)[None, :, None]
        return (best[..., None] == ids).any(-1)

    def _check_fits(self, values: Tensor, what: str) -> None:
        if len(self.ids) not in (1, values.shape[1]):
            raise MetricError(
                f"{what}: {len(self.ids)} tokens for {values.shape[1]} rows of logits; expected 1 or one for each"
            )
        _check_vocabulary(self.ids.flatten().tolist(), values.shape[-1], what, MetricError)


def list_answers(given: object, *, what: str) -> tuple[Row, ...]:
    """Answers as rows: one for all pairs, or one for each.

    Raises:
        InputError: something else than tokens (booleans and numbers with a fraction are), none, or one that a row
            names twice.
    """
    plain = _as_lists(given)
    if isinstance(plain, int | str) and not isinstance(plain, bool):
        return ((plain,),)
    if not isinstance(plain, list) or not plain:
        raise InputError(f"{what} is {show(given)}; expected {_EXPECTED}")
    rows = [tuple(row) if isinstance(row, list) else (row,) for row in plain]
    wrong = [
        number
        for number, row in enumerate(rows)
        if not row or not all(isinstance(one, int | str) and not isinstance(one, bool) for one in row)
    ]
    if wrong:
        raise InputError(f"{what} is {show(given)}, of which entries {wrong[:10]} are no tokens; expected {_EXPECTED}")
    _refuse_doubles(rows, what)
    return tuple(rows)


def encode_answers(model: HookedCausalLM, given: object, *, what: str) -> Answers:
    """Answers as ids of a model.

    Raises:
        InputError: no tokens, a text that is no single token, or ids outside the vocabulary.
    """
    if isinstance(given, Answers):
        return given
    rows = list_answers(given, what=what)
    texts = dict.fromkeys(one for row in rows for one in row if isinstance(one, str))
    if texts:
        refuse_other_outputs(model.cfg, f"{what}: texts are tokens; give the numbers of outputs", InputError)
    id_of: dict[Token, int] = {text: model.to_single_token(text) for text in texts}
    ids = [[id_of[one] if isinstance(one, str) else one for one in row] for row in rows]
    _check_vocabulary([one for row in ids for one in row], model.cfg.d_vocab_out, what, InputError)
    _refuse_doubles(ids, what)
    return Answers.of_ids(ids, device=model.device)


def ids_as_given(given: object, *, what: str) -> Answers:
    """Answers for calls on logits, where no model is at hand.

    Raises:
        MetricError: some are texts.
    """
    if isinstance(given, Answers):
        return given
    rows = list_answers(given, what=what)
    texts = [one for row in rows for one in row if isinstance(one, str)]
    if texts:
        raise MetricError(
            f"{what.partition(':')[0]}: {texts[0]!r} is text, whose token id logits do not tell; call "
            "metric.encode(model) first"
        )
    return Answers.of_ids([[one for one in row if isinstance(one, int)] for row in rows])


def _as_lists(given: Any) -> Any:
    """Tensors, arrays, their scalars and sequences as lists, two levels deep; None for what is none of these."""
    if isinstance(given, Tensor | np.ndarray | np.generic):
        if isinstance(given, Tensor) and (given.is_meta or given.layout != torch.strided):
            return None
        return given.tolist() if given.ndim <= 2 else None
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return [_as_lists(one) for one in given]
    return given


def _refuse_doubles(rows: Sequence[Sequence[object]], what: str) -> None:
    doubled = [number for number, row in enumerate(rows) if len(set(row)) < len(row)]
    if doubled:
        raise InputError(f"{what}: rows {doubled[:10]} name a token twice; name each answer once")


def _check_vocabulary(ids: Sequence[int], d_vocab: int, what: str, error: type[HookLensError]) -> None:
    outside = sorted({one for one in ids if not 0 <= one < d_vocab})
    if outside:
        raise error(f"{what}: token ids {outside[:10]} are outside the vocabulary, 0 to {d_vocab - 1}")
