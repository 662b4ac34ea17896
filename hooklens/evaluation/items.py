"""Items to score, from values or from JSON Lines files; a line that is no item costs only itself.

A line is a JSON object with

- `"continuation"`, a text, or `"tokens"`, a list of token ids: a continuation to score; or
- `"question"` and `"choices"` (texts or lists of token ids), perhaps `"answer"`: the index of the right choice,
  or that choice itself: multiple choice;

and perhaps `"id"`, a string or an integer. An item without one is named by a hash of its content, which stays when
lines are put before it or others are sorted; the second of equal items has `-2` behind it. Other keys are left alone.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hooklens.arguments import read_path, reads, show
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import InputError, join_names
from hooklens.evaluation.fingerprint import hash_values

TextOrTokens = str | tuple[int, ...]

_KEYS = ("id", "continuation", "tokens", "question", "choices", "answer")


@dataclass(frozen=True, kw_only=True)
class ContinuationItem:
    """A continuation to score.

    Attributes:
        id: names the item in results.
        continuation: text or token ids.
    """

    id: str
    continuation: TextOrTokens

    @property
    def content(self) -> dict[str, Any]:
        """All but the id, as a line of a file holds it."""
        key = "continuation" if isinstance(self.continuation, str) else "tokens"
        return {key: self.continuation}


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceItem:
    """A question with choices, each scored as its continuation.

    Attributes:
        id: names the item in results.
        question: what the choices continue.
        choices: at least two.
        answer: index of the right choice, None if that is not known.
    """

    id: str
    question: TextOrTokens
    choices: tuple[TextOrTokens, ...]
    answer: int | None = None

    @property
    def content(self) -> dict[str, Any]:
        """All but the id, as a line of a file holds it."""
        return {"question": self.question, "choices": self.choices, "answer": self.answer}


Item = ContinuationItem | MultipleChoiceItem


@dataclass(frozen=True, kw_only=True)
class ItemError:
    """A line that could not be scored.

    Attributes:
        path: the file.
        line: counted from 1.
        message: what is wrong with it.
    """

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.message}"


@dataclass(frozen=True, kw_only=True, repr=False)
class ItemFile(Displayed):
    """What a file holds.

    Attributes:
        path: the file.
        items: by number of line, counted from 1.
        errors: the lines that are no items.
    """

    path: Path
    items: dict[int, Item]
    errors: list[ItemError]

    def _summary(self) -> Summary:
        kinds = dict(Counter(type(item).__name__ for item in self.items.values()))
        return Summary(
            title=f"ItemFile of {len(self.items):,} items: {self.path.name}",
            facts={
                "items": ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()) or None,
                "path": str(self.path),
            },
            listing=Listing(
                columns=("line", "error"),
                rows=[(str(one.line), one.message) for one in self.errors],
                what="lines that are no items",
                more="errors has all",
            ),
        )

    def fault(self, line: int, message: str) -> ItemError:
        """An error about one of its lines."""
        return ItemError(path=self.path, line=line, message=message)


@reads()
def read_items(path: str | Path) -> ItemFile:
    """Read items from a JSON Lines file; empty lines are skipped, faulty ones are listed in `errors`.

    Raises:
        InputError: the file cannot be read.
    """
    path = read_path(path, what="the file of items")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read items from {path}: {error.strerror or error}") from error
    found = ItemFile(path=path, items={}, errors=[])
    lines_of: dict[str, int] = {}
    n_unnamed: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _name_item(parse_item(_parse_object(line), default_id=_UNNAMED), n_unnamed)
            if item.id in lines_of:
                raise InputError(f"the id {show(item.id)} stands in line {lines_of[item.id]} already; ids must differ")
        except (InputError, RecursionError) as error:
            message = str(error) if isinstance(error, InputError) else "is JSON nested too deeply to be read"
            found.errors.append(found.fault(number, message))
            continue
        lines_of[item.id] = number
        found.items[number] = item
    return found


# No string and no integer becomes this id.
_UNNAMED = ""


def _name_item(item: Item, n_unnamed: Counter[str]) -> Item:
    """The item with an id; `n_unnamed` counts equal items that have none of their own."""
    if item.id != _UNNAMED:
        return item
    name = hash_values(item.content)
    n_unnamed[name] += 1
    return replace(item, id=name if n_unnamed[name] == 1 else f"{name}-{n_unnamed[name]}")


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_make_object)
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON ({error.msg} at column {error.colno})") from error
    except InputError:
        raise
    except ValueError as error:
        # Python refuses integers of thousands of digits.
        raise InputError(f"cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"is a JSON {type(values).__name__}; expected an object")
    return values


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    repeated = [name for name in _KEYS if names[name] > 1]
    if repeated:
        raise InputError(f"has the keys {join_names(repeated)} more than once; expected each once")
    return dict(pairs)


def parse_item(values: Mapping[str, Any], *, default_id: str) -> Item:
    """An item from the values of a line.

    Raises:
        InputError: they describe none.
    """
    given = values.get("id", default_id)
    if isinstance(given, bool) or not isinstance(given, str | int) or ("id" in values and given == ""):
        raise InputError(f"the id is {show(given)}; expected a string that is not empty, or an integer")
    if "choices" in values or "question" in values:
        return _parse_multiple_choice(values, str(given))
    kinds = [key for key in ("continuation", "tokens") if key in values]
    if len(kinds) != 1:
        raise InputError(
            f"has the keys {show(sorted(values))}; expected 'continuation' (text), or 'tokens' (ids), or 'question' "
            "and 'choices'"
        )
    [kind] = kinds
    wanted = str if kind == "continuation" else list
    if not isinstance(values[kind], wanted):
        raise InputError(
            f"{kind!r} is {show(values[kind])}; expected {'a string' if wanted is str else 'a list of ids'}"
        )
    return ContinuationItem(id=str(given), continuation=_parse_text(kind, values[kind]))


def _parse_multiple_choice(values: Mapping[str, Any], item_id: str) -> MultipleChoiceItem:
    missing = [key for key in ("question", "choices") if key not in values]
    if missing:
        raise InputError(f"lacks {missing[0]!r}; a multiple-choice item has 'question' and 'choices'")
    given = values["choices"]
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) < 2:
        raise InputError(f"'choices' is {show(given)}; expected a list of at least two texts")
    choices = tuple(_parse_text(f"choice {number}", choice) for number, choice in enumerate(given))
    return MultipleChoiceItem(
        id=item_id,
        question=_parse_text("question", values["question"]),
        choices=choices,
        answer=_parse_answer(values.get("answer"), choices),
    )


def _parse_answer(answer: Any, choices: tuple[TextOrTokens, ...]) -> int | None:
    if answer is None:
        return None
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(f"'answer' is {show(answer)}; expected 0 to {len(choices) - 1}, or the text of one choice")
    return answer


def _parse_text(what: str, value: Any) -> TextOrTokens:
    if isinstance(value, str) and value:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what!r} is no text: it holds half of a surrogate pair ({error})") from error
        return value
    is_ids = isinstance(value, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if value and is_ids and not isinstance(value, str):
        return tuple(value)
    if isinstance(value, str | list | tuple) and not value:
        raise InputError(f"{what!r} is empty: there is nothing to score")
    raise InputError(f"{what!r} is {show(value)}; expected text or a list of token ids")
