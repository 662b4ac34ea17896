"""Items as token ids, checked against the model's context before the first of them runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.evaluation.continuations import check_continuations
from hooklens.evaluation.fingerprint import hash_values
from hooklens.evaluation.items import ContinuationItem, Item
from hooklens.evaluation.prefix import Prefix, encode_continuations, encode_in_place, encode_prefix, extend_prefix
from hooklens.evaluation.scoring import check_context
from hooklens.hooks.edits import Edit

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class EncodedItem:
    """An item, and the token ids that stand for it.

    Attributes:
        item: as it was given.
        start: what the rows go on from, without a cache of its own; None: the prefix of all items.
        rows: the continuation, or the choices.
    """

    item: Item
    start: Prefix | None
    rows: list[list[int]]

    @property
    def fingerprint(self) -> str:
        """A hash of the item's content and token ids, which tells it apart from another item under its id."""
        before = [] if self.start is None else self.start.tokens[0].tolist()
        return hash_values(self.item.content, before, self.rows)


def encode_items(
    model: HookedCausalLM,
    items: Mapping[Key, Item],
    prefix: Prefix | None,
    *,
    edits: Sequence[Edit] = (),
    prepend_bos: bool | None = None,
) -> tuple[dict[Key, EncodedItem], dict[Key, str]]:
    """The items that can be scored, and what is wrong with the others; nothing runs.

    Args:
        model: scores.
        items: by whatever they are named by.
        prefix: what stands before every item; None: nothing, and a question begins its sequence.
        edits: of questions that begin their sequence.
        prepend_bos: for questions that are text and begin their sequence.
    """
    encoded: dict[Key, EncodedItem] = {}
    faults: dict[Key, str] = {}
    for key, item in items.items():
        try:
            if isinstance(item, ContinuationItem):
                assert prefix is not None
                start, rows = prefix, [encode_in_place(model, prefix, item.continuation)]
                encoded[key] = EncodedItem(item=item, start=None, rows=rows)
            else:
                if prefix is not None:
                    question = extend_prefix(model, prefix, item.question)
                else:
                    question = encode_prefix(model, item.question, edits=edits, prepend_bos=prepend_bos)
                check_continuations(item.choices)
                start, rows = encode_continuations(model, question, item.choices)
                encoded[key] = EncodedItem(item=item, start=start, rows=rows)
            check_context(model, len(start), [len(row) for row in rows])
        except InputError as error:
            encoded.pop(key, None)
            faults[key] = str(error)
    return encoded, faults
