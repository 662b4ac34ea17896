"""Text to token ids and back: the BOS rule, padding, truncation, and what a batch of ids must satisfy.

Pure functions around a `transformers` tokenizer, which they never change.
"""

from hooklens.tokens.decoding import to_str_tokens, to_string
from hooklens.tokens.encoding import TokenBatch, to_tokens
from hooklens.tokens.ids import check_token_ids
from hooklens.tokens.padding import PaddingSide, infer_attention_mask, padding_token_id
from hooklens.tokens.single import PositionMode, get_token_position, to_single_str_token, to_single_token
from hooklens.tokens.tokenizer import Tokenizer

__all__ = [
    "PaddingSide",
    "PositionMode",
    "TokenBatch",
    "Tokenizer",
    "check_token_ids",
    "get_token_position",
    "infer_attention_mask",
    "padding_token_id",
    "to_single_str_token",
    "to_single_token",
    "to_str_tokens",
    "to_string",
    "to_tokens",
]
