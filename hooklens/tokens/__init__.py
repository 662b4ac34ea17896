"""Text to token ids and back: the BOS rule, padding, truncation, and what a call may be given.

Pure functions around a `transformers` tokenizer, which they never change.
"""

from hooklens.tokens.batch import CallTokens, read_tokens
from hooklens.tokens.continuation import (
    TextBefore,
    describe_clash,
    encode_behind,
    find_text_before,
    without_last_spaces,
)
from hooklens.tokens.decoding import to_str_tokens, to_string
from hooklens.tokens.encoding import TokenBatch, check_encoded, to_tokens
from hooklens.tokens.ids import as_usable, check_has_values, check_range, check_token_ids, is_integer, knows_id
from hooklens.tokens.inputs import Ids, Numbers, OneNumber, Prompt, TextList, is_text, read_input, read_prepend_bos
from hooklens.tokens.padding import PaddingSide, dedicated_pad_id, mask_of_ids, padding_token_id
from hooklens.tokens.prompts import check_same_tokens, read_prompts
from hooklens.tokens.single import PositionMode, get_token_position, to_single_str_token, to_single_token
from hooklens.tokens.tokenizer import Tokenizer, read_tokenizer
from hooklens.tokens.unknown import unknown_token_id

__all__ = [
    "CallTokens",
    "Ids",
    "Numbers",
    "OneNumber",
    "PaddingSide",
    "PositionMode",
    "Prompt",
    "TextBefore",
    "TextList",
    "TokenBatch",
    "Tokenizer",
    "as_usable",
    "check_encoded",
    "check_has_values",
    "check_range",
    "check_same_tokens",
    "check_token_ids",
    "dedicated_pad_id",
    "describe_clash",
    "encode_behind",
    "find_text_before",
    "get_token_position",
    "is_integer",
    "is_text",
    "knows_id",
    "mask_of_ids",
    "padding_token_id",
    "read_input",
    "read_prepend_bos",
    "read_prompts",
    "read_tokenizer",
    "read_tokens",
    "to_single_str_token",
    "to_single_token",
    "to_str_tokens",
    "to_string",
    "to_tokens",
    "unknown_token_id",
    "without_last_spaces",
]
