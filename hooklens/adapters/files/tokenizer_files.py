"""The tokenizer of a checkpoint folder."""

from pathlib import Path

from hooklens.adapters.files.disk import read_json
from hooklens.errors import CheckpointError, join_names, warn_caller
from hooklens.optional import import_package
from hooklens.tokens import Tokenizer

# Any of these makes a tokenizer.
_MAIN = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TOKENIZER_FILES = (
    *dict.fromkeys((*_MAIN, *_JSON)),
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What transformers' tokenizers write; of an older tokenizer none may stay beside a newer one."""


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or None where it holds none. No code of the checkpoint is run.

    Raises:
        CheckpointError: its files are damaged, or ask for a tokenizer that transformers does not have.
    """
    present = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not set(present) & set(_MAIN):
        return None
    for name in present:
        if name in _JSON:
            read_json(folder / name)
    transformers = import_package("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except BaseException as error:
        # The tokenizers package, which is written in Rust, gives up with a BaseException of its own.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _unreadable(folder, present, f"{type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, Tokenizer):
        raise _unreadable(folder, present, f"transformers made {tokenizer!r} of them")
    return tokenizer


def _unreadable(folder: Path, present: list[str], reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the tokenizer files {join_names(present)} cannot be read ({reason}). Download them again, or load "
        "with a tokenizer of your own (tokenizer=)"
    )


def can_be_written(tokenizer: Tokenizer | None) -> bool:
    """Whether there is a tokenizer that can write its files; one that cannot gives a warning."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        warn_caller(
            f"the tokenizer ({type(tokenizer).__name__}) has no save_pretrained, so the saved folder gets no "
            "tokenizer; load it with tokenizer="
        )
        return False
    return tokenizer is not None
