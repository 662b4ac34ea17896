"""What a report asks: a run, the token that the model expects, and the one it is compared with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.analysis.lens.transport import Transport
from hooklens.analysis.reading.token_names import name_tokens
from hooklens.causal_lm import HookedCausalLM


@dataclass(frozen=True, kw_only=True)
class Question:
    """A run and two tokens.

    Attributes:
        model: the model.
        cache: the run, of one row.
        logits: at the position that is asked about.
        answer: the token whose logit is taken apart.
        wrong: the token that it is compared with.
        pos: the position, counted over the prompt's tokens.
        transport: what the lens reads through; None: as it is.
    """

    model: HookedCausalLM
    cache: ActivationCache
    logits: Float[Tensor, " d_vocab"]
    answer: int
    wrong: int
    pos: int
    transport: Transport | None

    def name(self, token: int) -> str:
        """A token as sentences have it: its text in quotes, or its id."""
        [name] = name_tokens(self.model, torch.tensor([token]))
        return repr(name) if isinstance(name, str) else f"token {name}"

    @property
    def difference(self) -> float:
        """The logit of the answer minus that of the other token."""
        return float(self.logits[self.answer] - self.logits[self.wrong])

    @property
    def unit(self) -> str:
        """What direct attribution is in."""
        return "logits" if self.model.cfg.logits_softcap is None else "logits before the soft cap"

    def at(self, keyword: str) -> str:
        """The position as a keyword of a call, where it is not the last one, which calls take of themselves."""
        return "" if self.pos == -1 else f", {keyword}={self.pos}"
