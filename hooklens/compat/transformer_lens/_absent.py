"""Models of 2.x that are no decoders: code that names them can be imported, and using one says that it is not there."""

from typing import Any, NoReturn


class _Absent:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.from_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise NotImplementedError(
            f"{cls.__name__}: HookLens has decoders only; TransformerLens itself has {cls.__name__} up to version 3.9"
        )


class HookedEncoder(_Absent):
    """BERT; not implemented."""


class HookedEncoderDecoder(_Absent):
    """T5; not implemented."""


class BertNextSentencePrediction(_Absent):
    """BERT's head for pairs of sentences; not implemented."""
