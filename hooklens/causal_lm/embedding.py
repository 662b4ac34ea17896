"""What enters the first block: an input as the stream that it becomes."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import reads
from hooklens.causal_lm.calls import PREPARING, Input, PreparedCall
from hooklens.config import HookedConfig
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.plan.planning import reads_positions
from hooklens.tokens import PaddingSide

_TAKES = ("prepend_bos", "padding_side", "attention_mask", "positions", "past_kv_cache")


class EmbeddedInput(NamedTuple):
    """An input as it enters the first block, and what a call needs to go on from there.

    Attributes:
        stream: the residual stream entering block 0.
        tokens: the ids that were embedded, padding included.
        positions: the position of each column, one row where all have the same; None in a network that reads none.
        attention_mask: True for tokens and False for padding; None: all are tokens.
    """

    stream: Float[Tensor, "batch pos d_model"]
    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "rows pos"] | None
    attention_mask: Bool[Tensor, "batch pos"] | None


class EmbeddingMethods:
    """Embedding apart from the rest of a call."""

    cfg: HookedConfig
    _prepare: Callable[..., PreparedCall]
    run: Callable[..., Tensor]

    @reads(**{name: PREPARING[name] for name in _TAKES})
    def input_to_embed(
        self,
        input: Input,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
    ) -> EmbeddedInput:
        """The stream that enters the first block, with the tokens, positions and mask that it was made of.

        The arguments are those of a call. A cache tells the positions that the input goes on from, and what text goes
        on from; nothing is appended to it. A call goes on from the stream:

            embedded = model.input_to_embed(prompts)
            logits = model(
                embedded.stream,
                start_at_layer=0,
                attention_mask=embedded.attention_mask,
                positions=embedded.positions,
            )

        Raises:
            InputError, CacheError: as a call.
        """
        call = self._prepare(
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            positions=positions,
            past_kv_cache=past_kv_cache,
        )
        # Without the cache, which is read by blocks and appended to behind them.
        stream = self.run(call.input, call.plan, stop_at_layer=0)
        read = call.plan.positions if reads_positions(self.cfg) else None
        return EmbeddedInput(stream, call.input, read, call.plan.attention_mask)
