"""The word-level tokenizer of the bundled checkpoints.

One word, one token, so that prompts built from the same template have the same length. The tokenizer
itself puts the end-of-text token in front, as Llama's does its BOS. Decoding joins the words by spaces and
leaves punctuation a word of its own, so text that came out goes in again unchanged.
"""

from typing import TYPE_CHECKING

from hooklens.bundled.words import END_OF_TEXT, PAD, UNKNOWN, VOCABULARY
from hooklens.optional import import_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(*, n_ctx: int) -> "PreTrainedTokenizerFast":
    """Build the tokenizer; `VOCABULARY` gives the ids.

    Args:
        n_ctx: the longest sequence, in tokens, that the model accepts.
    """
    tokenizers = import_package("tokenizers")
    transformers = import_package("transformers")
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, ids[END_OF_TEXT])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=n_ctx,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
