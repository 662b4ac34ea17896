"""Small real tokenizers, built with the `tokenizers` library."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "cat", "sat", "on", "mat"]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def word_tokenizer(*, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Words split at spaces: ids 0 to 3 are SPECIALS, then WORDS."""
    vocab = {word: index for index, word in enumerate(SPECIALS + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        named = [(token, vocab[token]) for token in SPECIALS if token in template.split()]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def byte_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which one token is BOS, EOS and padding, as in the GPT-2 and GPT-NeoX checkpoints."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat", "the mat, the cat", "Paris and the cat"] * 3, trainer)
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


ALL_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PLAIN = word_tokenizer(**ALL_SPECIAL)
WITH_BOS = word_tokenizer(template="<s> $A", **ALL_SPECIAL)
WITH_EOS = word_tokenizer(template="$A </s>", **ALL_SPECIAL)
WITH_BOTH = word_tokenizer(template="<s> $A </s>", **ALL_SPECIAL)
PAD_IS_EOS = word_tokenizer(template="<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
NO_BOS = word_tokenizer(eos_token="</s>")
BYTES = byte_tokenizer()
BYTES_WITH_BOS = byte_tokenizer(template="<|end|> $A")
BYTES_WITH_EOS = byte_tokenizer(template="$A <|end|>")

BOS, EOS, THE, CAT = 1, 2, 4, 5

# Every way in which special tokens share ids; all have ids 0 to 8, as `word_tokenizer` says.
PAD_IS_UNKNOWN = word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<unk>")
BOS_IS_EOS = word_tokenizer(bos_token="</s>", eos_token="</s>")
ONLY_BOS = word_tokenizer(bos_token="<s>")
KINDS = {
    "dedicated pad": PLAIN,
    "pad is EOS": PAD_IS_EOS,
    "BOS is EOS, no pad": BOS_IS_EOS,
    "pad is unknown": PAD_IS_UNKNOWN,
    "BOS only": ONLY_BOS,
}
WITHOUT_DEDICATED_PAD = {name: tokenizer for name, tokenizer in KINDS.items() if tokenizer is not PLAIN}
