"""Reading the arguments of a cache's methods: entries of an axis, single numbers, flags."""

from hooklens import arguments
from hooklens.errors import CacheError
from hooklens.hooks.choice import read_choice, resolve_choice


def choose(given: object, size: int, *, what: str, noun: str) -> tuple[list[int], bool]:
    """The entries of an axis that a caller names, counted from 0, and whether it is a single one, without an axis.

    Args:
        given: a `Choice`; a tuple is refused, as TransformerLens reads it as the arguments of a slice.
        size: how many entries the axis has.
        what: the argument, for messages.
        noun: what the entries are, for messages.

    Raises:
        CacheError: another kind, an entry that is not there or named twice, or none at all.
    """
    index = read_choice(given, what=what, refuse_tuple=True, error=CacheError)
    chosen = resolve_choice(index, size, what=what, noun=noun, error=CacheError)
    if not chosen:
        raise CacheError(f"{what}={given!r} chooses none of the {size} {noun}; expected at least one")
    return chosen, isinstance(index, int)


def read_number(given: object, *, what: str, optional: bool = True) -> int | None:
    """A single whole number in plain Python, or None where that is allowed.

    Raises:
        CacheError: anything else, a mask or a fraction, too.
    """
    return None if given is None and optional else arguments.read_int(given, what=what, error=CacheError)


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False, a text such as "no" above all, which would count as True.

    Raises:
        CacheError: lists the arguments.
    """
    problems = []
    for name, flag in flags.items():
        try:
            arguments.read_flag(flag, what=name, error=CacheError)
        except CacheError as refusal:
            problems.append(str(refusal))
    if problems:
        raise CacheError("; ".join(problems))
