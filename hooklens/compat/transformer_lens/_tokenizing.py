"""What `transformer_lens.utils` of 2.x does with tokenizers, masks and data sets of text."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.optional import import_package

USE_DEFAULT_VALUE: Any = None


def get_cumsum_along_dim(tensor: Tensor, dim: int, reverse: bool = False) -> Tensor:
    """Sums along an axis, from its start or its end."""
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def get_attention_mask(tokenizer: Any, tokens: Tensor, prepend_bos: bool) -> Tensor:
    """1 for tokens, 0 for runs of pads on the side that the tokenizer pads on; a BOS that is one stays."""
    if tokenizer is None:
        return torch.ones_like(tokens)
    pads_left = tokenizer.padding_side == "left"
    is_pad = get_cumsum_along_dim(tokens.ne(tokenizer.pad_token_id), -1, reverse=not pads_left) == 0
    mask = torch.ones_like(tokens).masked_fill(is_pad, 0)
    if pads_left and prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        mask[torch.arange(len(mask)), is_pad.sum(-1) - 1] = 1
    return mask


def get_offset_position_ids(past_kv_pos_offset: int, attention_mask: Tensor) -> Tensor:
    """Positions of tokens, counted without padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past_kv_pos_offset:]


def override_or_use_default_value(default_flag: Any, override: Any = None) -> Any:
    """The override, where there is one."""
    return default_flag if override is USE_DEFAULT_VALUE else override


class LocallyOverridenDefaults:
    """A block in which a model's defaults are others; `USE_DEFAULT_VALUE` leaves one as it is."""

    _VALID = {"prepend_bos": (True, False), "padding_side": ("left", "right")}  # noqa: RUF012

    def __init__(self, model: Any, **overrides: Any) -> None:
        for name in overrides:
            assert name in self._VALID, f"{name} is not a valid parameter to override: {', '.join(self._VALID)} are"
        places = {"prepend_bos": (model.cfg, "default_prepend_bos"), "padding_side": (model.tokenizer, "padding_side")}
        self._changes = [
            (*places[name], name, value)
            for name, value in overrides.items()
            if value is not USE_DEFAULT_VALUE and places[name][0] is not None
        ]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        for _, _, name, value in self._changes:
            assert value in self._VALID[name], f"{name} must be one of {self._VALID[name]}, but got {value}."
        self._before = [getattr(owner, attribute) for owner, attribute, _, _ in self._changes]
        for owner, attribute, _, value in self._changes:
            setattr(owner, attribute, value)

    def __exit__(self, *error: object) -> None:
        for (owner, attribute, _, _), value in zip(self._changes, self._before, strict=True):
            setattr(owner, attribute, value)


def get_tokenizer_with_bos(tokenizer: Any) -> Any:
    """The tokenizer, made anew so that it puts a BOS first, where it can be found again and says that it does not."""
    settings = deepcopy(tokenizer.init_kwargs)
    name, says = settings.pop("name_or_path", ""), settings.pop("add_bos_token", None)
    # One that does not say so puts no BOS, however it is made.
    if says is not False or not name:
        return tokenizer
    return import_package("transformers").AutoTokenizer.from_pretrained(name, add_bos_token=True, **settings)


def get_input_with_manually_prepended_bos(tokenizer: Any, input: str | list[str]) -> Any:
    """Text with the BOS token's text before it."""
    return tokenizer.bos_token + input if isinstance(input, str) else [tokenizer.bos_token + one for one in input]


def get_tokens_with_bos_removed(tokenizer: Any, tokens: Int[Tensor, "batch pos"]) -> Tensor:
    """Ids without the BOS that each row starts with."""
    if tokenizer.padding_side == "right":
        return tokens[..., 1:]
    if tokenizer.bos_token_id == tokenizer.pad_token_id:
        places = (get_cumsum_along_dim(tokens.ne(tokenizer.pad_token_id), -1) == 0).sum(-1) - 1
    else:
        places = (tokens == tokenizer.bos_token_id).int().argmax(-1)
    stays = torch.arange(tokens.shape[1], device=tokens.device) != places[:, None]
    return tokens[stays].view(tokens.shape[0], -1)


def keep_single_column(dataset: Any, col_name: str) -> Any:
    """The data set without its other columns."""
    return dataset.remove_columns([name for name in dataset.features if name != col_name])


def tokenize_and_concatenate(
    dataset: Any, tokenizer: Any, streaming: bool = False, max_length: int = 1024, column_name: str = "text",
    add_bos_token: bool = True, num_proc: int = 10,
) -> Any:  # fmt: skip
    """Rows of `max_length` tokens of all texts, one after another with an EOS between them, in a column `tokens`."""
    has_pad = tokenizer.pad_token is not None
    if not has_pad:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    # Processes that share the work are sent this.
    tokenize = partial(
        _rows_of, tokenizer=tokenizer, column=column_name, length=max_length - add_bos_token, has_pad=has_pad,
        bos=[tokenizer.bos_token_id] if add_bos_token else [],
    )  # fmt: skip
    workers = {} if streaming else {"num_proc": num_proc}
    one_column = keep_single_column(dataset, column_name)
    tokenized = one_column.map(tokenize, batched=True, remove_columns=[column_name], **workers)
    return tokenized.with_format(type="torch") if streaming else tokenized.with_format(type="torch", columns=["tokens"])


def _rows_of(
    examples: Any, *, tokenizer: Any, column: str, length: int, has_pad: bool, bos: list[int]
) -> dict[str, Any]:
    text = tokenizer.eos_token.join(examples[column])
    if not text.strip():
        return {"tokens": np.array([], dtype=np.int64)}
    ids = tokenizer(list(_chunks(text)), return_tensors="np", padding=True)["input_ids"].flatten()
    ids = ids[ids != tokenizer.pad_token_id]
    if len(ids) < length:
        filler = tokenizer.pad_token_id if has_pad else tokenizer.eos_token_id
        ids = np.concatenate([ids, np.full(length - len(ids), filler)])
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    return {"tokens": np.concatenate([np.tile(np.array(bos, dtype=ids.dtype), (len(rows), 1)), rows], axis=1)}


def _chunks(text: str, count: int = 20) -> Iterator[str]:
    """Some twenty pieces of a text, cut at white space where there is some soon."""
    size, start = (len(text) - 1) // count + 1, 0
    for _ in range(count):
        end = min(start + size, len(text))
        latest = min(end + size // 10, len(text))
        while end < latest and not text[end].isspace():
            end += 1
        yield text[start:end]
        start = end
