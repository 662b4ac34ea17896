"""What 2.x has beside decoders: code that names it can be imported, and using it says that it is not there."""

from typing import Any, NoReturn


class Absent:
    """A model or part that is not implemented."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.from_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise NotImplementedError(
            f"{cls.__name__}: HookLens has decoders only; TransformerLens itself has {cls.__name__} up to version 3.9"
        )


class HookedEncoder(Absent):
    """BERT; not implemented."""


class HookedEncoderDecoder(Absent):
    """T5; not implemented."""


class BertNextSentencePrediction(Absent):
    """BERT's head for pairs of sentences; not implemented."""
