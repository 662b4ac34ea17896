"""Text to tokens and back, as methods of the model."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.errors import InputError
from hooklens.model.weight_views import WeightViews
from hooklens.tokens import PaddingSide, Tokenizer


class TextMethods(WeightViews):
    """A network with a tokenizer; see `hooklens.tokens` for the rules."""

    tokenizer: Tokenizer | None

    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of text; see `hooklens.tokens.to_tokens` for the rules."""
        batch = tokenization.to_tokens(
            self._need_tokenizer(),
            text,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            truncate=truncate,
            n_ctx=self.cfg.n_ctx,
        )
        return batch.tokens.to(self.device)

    def to_string(self, tokens: int | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """The text of token ids: a string for one row, a list of strings for several."""
        return tokenization.to_string(self._need_tokenizer(), tokens)

    def to_str_tokens(self, input: Any, *, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """The text of each token of a prompt or row of ids."""
        return tokenization.to_str_tokens(self._need_tokenizer(), input, prepend_bos=prepend_bos)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            InputError: it is none or several; the text names them.
        """
        return tokenization.to_single_token(self._need_tokenizer(), text)

    def to_single_str_token(self, token: int) -> str:
        """The text of one token id."""
        return tokenization.to_single_str_token(self._need_tokenizer(), token)

    def get_token_position(
        self, token: str | int, input: Any, *, mode: Literal["first", "last"] = "first", prepend_bos: bool | None = None
    ) -> int:
        """Where a token stands in a prompt.

        Raises:
            InputError: it does not occur.
        """
        return tokenization.get_token_position(self._need_tokenizer(), token, input, mode=mode, prepend_bos=prepend_bos)

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """The unembedding direction of each token: the column of `W_U` whose product with the stream is its logit."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.device)
        return self.W_U.T[ids]

    def _infer_attention_mask(self, ids: Tensor, padding_side: PaddingSide | None) -> Tensor | None:
        tokenizer = self._need_tokenizer()
        return tokenization.infer_attention_mask(
            ids,
            pad_token_id=tokenization.padding_token_id(tokenizer),
            bos_token_id=getattr(tokenizer, "bos_token_id", None),
            eos_token_id=getattr(tokenizer, "eos_token_id", None),
            padding_side=padding_side,
        )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
            )
        return self.tokenizer
