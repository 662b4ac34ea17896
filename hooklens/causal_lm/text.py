"""Text to tokens and back, as methods of the model."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.arguments import optional, read_tensor, reads, refusal
from hooklens.config import HookedConfig
from hooklens.errors import InputError
from hooklens.tokens import Ids, Numbers, OneNumber, PaddingSide, Prompt, TextList, TokenBatch, Tokenizer


class TextMethods:
    """What a tokenizer adds to a network; see `hooklens.tokens` for the rules."""

    cfg: HookedConfig
    tokenizer: Tokenizer | None
    device: torch.device
    W_U: Float[Tensor, "d_model d_vocab"]
    _default_prepend_bos: bool | None = None

    @property
    def default_prepend_bos(self) -> bool | None:
        """What `prepend_bos=None` means, wherever this model reads text that begins a sequence.

        True and False are as the argument, None is the tokenizer's own rule. It may be set at any time, and goes with
        the model: to copies, and to models made of its weights, but into no file.
        """
        return self._default_prepend_bos

    @default_prepend_bos.setter
    def default_prepend_bos(self, default: bool | None) -> None:
        self._default_prepend_bos = tokenization.read_prepend_bos(default, what="default_prepend_bos")

    def bos_rule(self, *, prepend_bos: bool | None = None, begins: bool = True) -> bool | None:
        """The BOS rule for a text, given what a caller says; see `hooklens.tokens.encoding`.

        Args:
            prepend_bos: the caller's word; None: `default_prepend_bos`.
            begins: a sequence begins with the text. One that goes on from tokens has no BOS, whatever the default.
        """
        return self._default_prepend_bos if prepend_bos is None and begins else prepend_bos

    @reads(tokenizer=optional(tokenization.read_tokenizer))
    def set_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Use a tokenizer from here on; None: the model takes token ids alone.

        The tokenizer is taken as it is, and its padding side stays.

        Raises:
            InputError: it is none.
        """
        self.tokenizer = tokenizer

    @overload
    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = ...,
        padding_side: PaddingSide | None = ...,
        truncate: bool = ...,
        return_attention_mask: Literal[False] = ...,
    ) -> Int[Tensor, "batch pos"]: ...

    @overload
    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = ...,
        padding_side: PaddingSide | None = ...,
        truncate: bool = ...,
        return_attention_mask: Literal[True],
    ) -> TokenBatch: ...

    @overload
    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = ...,
        padding_side: PaddingSide | None = ...,
        truncate: bool = ...,
        return_attention_mask: bool,
    ) -> Int[Tensor, "batch pos"] | TokenBatch: ...

    @reads()
    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
        return_attention_mask: bool = False,
    ) -> Int[Tensor, "batch pos"] | TokenBatch:
        """Token ids of text, with `return_attention_mask=True` `(ids, mask)`; see `hooklens.tokens.to_tokens`.

        Both lie on the model's device. Give the mask with the ids wherever texts of different length were padded:
        unless the tokenizer has a pad token of its own, ids do not tell.
        """
        batch = tokenization.to_tokens(
            self._need_tokenizer(),
            text,
            prepend_bos=self.bos_rule(prepend_bos=prepend_bos),
            padding_side=padding_side,
            truncate=truncate,
            n_ctx=self.cfg.n_ctx,
            d_vocab=self.cfg.d_vocab,
            return_attention_mask=return_attention_mask,
        )
        if isinstance(batch, Tensor):
            return batch.to(self.device)
        return TokenBatch(batch.tokens.to(self.device), batch.attention_mask.to(self.device))

    @overload
    def to_string(self, tokens: OneNumber | Numbers) -> str: ...
    @reads()
    @overload
    def to_string(self, tokens: Sequence[Numbers]) -> list[str]: ...
    # Only the shape of a tensor says whether it is one prompt, so what comes back may be used as either.
    @reads()
    @overload
    def to_string(self, tokens: Tensor | Ids) -> str | Any: ...
    @reads()
    def to_string(self, tokens: OneNumber | Tensor | Ids) -> str | list[str]:
        """The text of token ids: a string for one row, a list of strings for several."""
        return tokenization.to_string(self._need_tokenizer(), tokens)

    @reads()
    @overload
    def to_str_tokens(self, input: str | Numbers, *, prepend_bos: bool | None = ...) -> list[str]: ...
    @reads()
    @overload
    def to_str_tokens(
        self, input: TextList | Sequence[Numbers], *, prepend_bos: bool | None = ...
    ) -> list[list[str]]: ...
    @reads()
    @overload
    def to_str_tokens(self, input: Prompt, *, prepend_bos: bool | None = ...) -> list[str] | Any: ...
    @reads()
    def to_str_tokens(self, input: Prompt, *, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """The text of each token of a prompt or row of ids."""
        return tokenization.to_str_tokens(
            self._need_tokenizer(), input, prepend_bos=self.bos_rule(prepend_bos=prepend_bos)
        )

    @reads()
    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token inside a row: `" word"` with its space, `"word"` without.

        Raises:
            InputError: it is none or several (the text names them), or a word that the vocabulary lacks.
        """
        return tokenization.to_single_token(self._need_tokenizer(), text)

    @reads()
    def to_single_str_token(self, token: OneNumber | Tensor) -> str:
        """The text of one token id."""
        return tokenization.to_single_str_token(self._need_tokenizer(), token)

    @reads()
    def get_token_position(
        self,
        token: str | OneNumber | Tensor,
        input: Any,
        *,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a prompt.

        Raises:
            InputError: it does not occur.
        """
        return tokenization.get_token_position(
            self._need_tokenizer(), token, input, mode=mode, prepend_bos=self.bos_rule(prepend_bos=prepend_bos)
        )

    @reads()
    def tokens_to_residual_directions(self, tokens: str | int | Integer[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """The unembedding direction of each token: the column of `W_U` whose product with the stream is its logit.

        Raises:
            InputError: a text that is no single token, or ids outside the vocabulary.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        expected = "a text of one token, or token ids, integers"
        try:
            ids = read_tensor(torch.as_tensor(tokens), what="tokens", expected=expected)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise refusal(tokens, "tokens", expected) from None
        if not tokenization.is_integer(ids):
            raise refusal(tokens, "tokens", expected)
        ids = ids.long()
        tokenization.check_range(ids, self.cfg.d_vocab)
        W_U = self.W_U
        directions = W_U.T[ids.to(W_U.device)]
        return directions if self.cfg.logits_scale == 1 else directions * self.cfg.logits_scale

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
            )
        return self.tokenizer
