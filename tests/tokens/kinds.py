"""Tokenizers of every kind that puts words together in a way of its own, with and without BOS and EOS templates."""

import json
from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
TEMPLATES = {"none": None, "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}
CORPUS = [
    "the cat sat on the mat",
    "the cats sat on the mats, and the mat sat on",
    "A: yes\nB: no\n\nA: no\nB: yes",
    "world hello, hello world",
    "no on yes at nono",
] * 4
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bpe(*, byte_fallback: bool = False) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))


def _train_bpe(backend: Tokenizer, *, alphabet: Sequence[str] = (), more: Sequence[str] = ()) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + len(alphabet) + len(more) + 80,
        special_tokens=[*SPECIALS, *more],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)


def _byte_level(*, add_prefix_space: bool, use_regex: bool = True) -> Tokenizer:
    backend = _bpe()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    _train_bpe(backend, alphabet=pre_tokenizers.ByteLevel.alphabet())
    return backend


def _metaspace(scheme: str, *, split: bool = True) -> Tokenizer:
    backend = _bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    _train_bpe(backend)
    return backend


def _prepend(*, byte_fallback: bool) -> Tokenizer:
    """As the Llama 1 and 2 checkpoints: no pre-tokenizer, a space in front by a normalizer."""
    trained = _bpe(byte_fallback=byte_fallback)
    # Its tokens were found inside words, as SentencePiece does.
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    _train_bpe(trained, more=_BYTES if byte_fallback else [])
    trained.pre_tokenizer = None
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if not byte_fallback:
        return trained
    # Bytes are tokens of the model, and no strings that a text may spell out.
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in _BYTES]
    return Tokenizer.from_str(json.dumps(state))


def _unigram(scheme: str) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _word_pieces() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: _byte_level(add_prefix_space=False),
    "byte-level BPE, space in front": lambda: _byte_level(add_prefix_space=True),
    "byte-level BPE over words": lambda: _byte_level(add_prefix_space=False, use_regex=False),
    "Metaspace first": lambda: _metaspace("first"),
    "Metaspace always": lambda: _metaspace("always"),
    "Metaspace never": lambda: _metaspace("never"),
    "Metaspace always, unsplit": lambda: _metaspace("always", split=False),
    "Prepend": lambda: _prepend(byte_fallback=False),
    "Prepend, byte fallback": lambda: _prepend(byte_fallback=True),
    "unigram first": lambda: _unigram("first"),
    "unigram always": lambda: _unigram("always"),
    "word pieces": _word_pieces,
}
DROPS_SPACES = {"word pieces"}
"""Kinds in whose tokens no space is, so that ids do not tell whether their text ended in one."""


@cache
def make_tokenizer(kind: str, template: str = "none") -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with special tokens put around texts."""
    backend = KINDS[kind]()
    single = TEMPLATES[template]
    if single is not None:
        named = [(token, backend.token_to_id(token)) for token in SPECIALS if token in single.split()]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
