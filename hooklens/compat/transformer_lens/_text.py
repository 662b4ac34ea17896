"""Text and tokens of a `HookedTransformer`: a BOS token goes first unless told otherwise."""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens import utils
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.utils import USE_DEFAULT_VALUE
from hooklens.optional import import_package

Side = Literal["left", "right"] | None

# Texts like those that checkpoints of an architecture were trained on.
_TRAINED_ON = {
    "neel": "c4_code", "neel-solu-old": "pile", "GPT2LMHeadModel": "openwebtext", "GPTNeoForCausalLM": "pile",
    "GPTNeoXForCausalLM": "pile", "GPTJForCausalLM": "pile", "OPTForCausalLM": "pile",
}  # fmt: skip


class TextMethods(nn.Module):
    """What a tokenizer adds."""

    cfg: HookedTransformerConfig
    hooked: HookedCausalLM
    tokenizer: Any
    dataset: Any

    def _find_tokenizer(self, tokenizer: Any, default_padding_side: str) -> None:
        """Set the tokenizer given, or that of the config."""
        if tokenizer is None and self.cfg.tokenizer_name is not None:
            tokenizer = import_package("transformers").AutoTokenizer.from_pretrained(self.cfg.tokenizer_name)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side=default_padding_side)

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str = "right") -> None:
        """Use a tokenizer, with an end token for padding and beginning where it has no other."""
        from_transformers = hasattr(tokenizer, "convert_ids_to_tokens")
        assert from_transformers, f"{type(tokenizer)} is not a supported tokenizer; give one of transformers"
        assert default_padding_side in ("right", "left"), (
            f"padding_side must be 'right' or 'left', got {default_padding_side}"
        )
        self.tokenizer = utils.get_tokenizer_with_bos(tokenizer)
        self.tokenizer.padding_side = default_padding_side
        self.cfg.tokenizer_prepends_bos = len(self.tokenizer.encode("")) > 0
        if self.tokenizer.eos_token is None:
            self.tokenizer.eos_token = "<|endoftext|>"
        for name in ("pad_token", "bos_token"):
            if getattr(self.tokenizer, name) is None:
                setattr(self.tokenizer, name, self.tokenizer.eos_token)
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = max(self.tokenizer.vocab.values()) + 1
        if self.cfg.d_vocab_out == -1:
            self.cfg.d_vocab_out = self.cfg.d_vocab
        if "hooked" in self.__dict__:
            self.hooked.tokenizer = self.tokenizer

    def to_tokens(
        self, input: str | list[str], prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Side = USE_DEFAULT_VALUE, move_to_device: bool = True, truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:  # fmt: skip
        """Token ids of text."""
        with utils.LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            assert self.tokenizer is not None, "Cannot use to_tokens without a tokenizer"
            if self.cfg.default_prepend_bos and not self.cfg.tokenizer_prepends_bos:
                input = utils.get_input_with_manually_prepended_bos(self.tokenizer, input)
            tokens: Tensor = self.tokenizer(
                input,
                return_tensors="pt",
                padding=True,
                truncation=truncate,
                max_length=self.cfg.n_ctx if truncate else None,
            )["input_ids"]
            if not self.cfg.default_prepend_bos and self.cfg.tokenizer_prepends_bos:
                tokens = utils.get_tokens_with_bos_removed(self.tokenizer, tokens)
            return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids: one string for one row."""
        assert self.tokenizer is not None, "Cannot use to_string without a tokenizer"
        ids = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens)
        if ids.ndim > 2:
            raise ValueError(f"Invalid shape passed in: {ids.shape}")
        if ids.ndim == 2:
            return [self._decode(row.tolist()) for row in ids]
        return self._decode(ids.reshape(-1).tolist())

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = USE_DEFAULT_VALUE, padding_side: Side = USE_DEFAULT_VALUE
    ) -> Any:
        """The text of each token; a flat list for one row."""
        assert self.tokenizer is not None, "Cannot use to_str_tokens without a tokenizer"
        if isinstance(input, list):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)[0]
        elif isinstance(input, Tensor | np.ndarray):
            ids = torch.as_tensor(input).squeeze()
            ids = ids[None] if ids.ndim == 0 else ids
            assert ids.ndim == 1, f"Invalid tokens input to to_str_tokens, has shape: {tuple(ids.shape)}"
        else:
            raise ValueError(f"Invalid input type to to_str_tokens: {type(input)}")
        return [self._decode([one]) for one in ids.tolist()]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token."""
        tokens = self.to_tokens(string, prepend_bos=False).squeeze()
        assert not tokens.shape, f"Input string: {string} is not a single token!"
        return int(tokens)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of a token."""
        assert isinstance(int_token, int)
        return self._decode([int_token])

    def get_token_position(
        self, single_token: str | int | Tensor, input: Any, mode: str = "first",
        prepend_bos: bool | None = USE_DEFAULT_VALUE, padding_side: Side = USE_DEFAULT_VALUE,
    ) -> int:  # fmt: skip
        """Where a token stands in a prompt."""
        ids = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else input
        if ids.ndim == 2:
            assert ids.shape[0] == 1, f"If tokens are rank two, they must have shape [1, seq_len], not {ids.shape}"
            ids = ids[0]
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        places = torch.nonzero(ids == token).flatten().tolist()
        assert places, "The token does not occur in the prompt"
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', not {mode}")
        return int(places[0 if mode == "first" else -1])

    def load_sample_training_dataset(self, **kwargs: Any) -> Any:
        """Set `dataset` to ten thousand or more texts like those the model was trained on, from the hub."""
        kind = self.cfg.original_architecture
        if kind not in _TRAINED_ON:
            raise ValueError(f"We do not have an available dataset for the relevant model: {kind}")
        self.dataset = utils.get_dataset(_TRAINED_ON[kind], **kwargs)
        return self.dataset

    def sample_datapoint(
        self, tokenize: bool = False, prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: Side = USE_DEFAULT_VALUE,
    ) -> str | Int[Tensor, "1 pos"]:  # fmt: skip
        """A text of `dataset`, drawn from numpy's generator, or its tokens; loads the data set where there is none."""
        data = self.load_sample_training_dataset() if self.dataset is None else self.dataset
        text: str = data[np.random.randint(0, len(data))]["text"]
        return self.to_tokens(text, prepend_bos, padding_side) if tokenize else text

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The unembedding direction of each token."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if not isinstance(tokens, int | Tensor):
            raise ValueError(f"Invalid token type: {type(tokens)}")
        ids = torch.as_tensor(tokens)
        return self.hooked.W_U.T[ids.reshape(()) if ids.numel() == 1 else ids]
