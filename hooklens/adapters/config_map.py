"""Config maps: `config.json` keys and `HookedConfig` fields, read in both directions.

Every key is accounted for. A *part* reads some keys into fields and writes them back; a *pinned* key may
only hold the value that HookLens implements; an *inert* key carries no architecture. Any other key is
reported in one warning. All that is wrong with a config is collected and raised once.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hooklens.arguments import MOST_ENTRIES, show
from hooklens.config import Activation, NormConfig, NormKind
from hooklens.errors import UnsupportedModelError, join_names

# Stands for "there is no default": transformers' own defaults for sizes belong to one particular checkpoint.
REQUIRED: Any = object()

# Keys that any config may have and that change nothing in the network: bookkeeping, dropout (which is said where a
# model is trained), tokens, training, and settings of other heads.
INERT_KEYS = frozenset(
    {
        "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "auto_map",
        "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
        "cross_attention_hidden_size", "custom_pipelines", "decoder_start_token_id", "dtype", "embd_pdrop",
        "eos_token_id", "finetuning_task", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
        "id2label", "is_decoder", "keys_to_ignore_at_inference", "label2id", "max_sequence_length", "model_type",
        "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
        "pretraining_tp", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
        "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "use_bfloat16", "use_cache", "unk_token_id",
        # Sampling settings, which transformers 4 kept in config.json.
        "bad_words_ids", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
        "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "remove_invalid_values", "repetition_penalty", "temperature", "top_k", "top_p",
        "typical_p",
        # Notes of the programs that wrote the config.
        "activation_dropout", "dropout", "is_llama_config", "resid_dropout", "resid_pdrop", "transformers.js_config",
        "unsloth_fixed", "unsloth_version",
    }
)  # fmt: skip


# Under one of these the several ways to quantise say which one it was (`quantization` is that of MLX).
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
_KIND_WORDS = {int: "int", float: "float", bool: "true or false", str: "a text", dict: "an object"}


def _is_exactly(value: object, kind: type) -> bool:
    """Whether the value is of this very type: `isinstance` takes a bool for an int."""
    return type(value) is kind


class ConfigReader:
    """Takes values out of a `config.json`, remembering which keys were used and all that is wrong.

    Attributes:
        problems: one sentence per missing, mistyped or unsupported value.
        used: keys that somebody asked for.
    """

    def __init__(self, config: Mapping[str, Any], *, path: str = "") -> None:
        self._config = config
        self._path = path
        self._nested: list[ConfigReader] = []
        self.problems: list[str] = []
        self.used: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self.used.add(key)
        return self._config.get(key) is not None

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`; `default` where it is absent or null. What is wrong goes into `problems`."""
        if not self.has(key):
            if default is not REQUIRED:
                return default
            self.problems.append(f"{self._path}{key} is missing")
            return kind(1) if kind is not dict else {}
        value: Any = self._config[key]
        if kind is float and type(value) is int and abs(value) <= MOST_ENTRIES:
            value = float(value)
        if not _is_exactly(value, kind):
            self.problems.append(f"{self._path}{key} is {show(value)}; expected {_KIND_WORDS.get(kind, kind.__name__)}")
        elif kind is int and not 0 <= value <= MOST_ENTRIES:
            self.problems.append(f"{self._path}{key} is {show(value)}; expected a size, at least 0 and below 2**31")
        elif kind is float and not math.isfinite(value):
            self.problems.append(f"{self._path}{key} is {show(value)}; expected a finite number")
        else:
            return value
        return default if default is not REQUIRED else kind(1)

    def nested(self, key: str) -> "ConfigReader":
        """A reader of the object under `key` that reports into this one."""
        reader = ConfigReader(self.get(key, dict, {}), path=f"{self._path}{key}.")
        reader.problems = self.problems
        self._nested.append(reader)
        return reader

    def reject(self, key: str, expected: str) -> None:
        """Record that the value of `key` is not implemented."""
        self.problems.append(f"{self._path}{key} is {show(self._config.get(key))}; expected {expected}")

    def unused(self) -> list[str]:
        """Full names of the keys that nobody asked for, those of nested objects included."""
        own = [f"{self._path}{key}" for key in self._config if key not in self.used]
        return own + [key for reader in self._nested for key in reader.unused()]


@runtime_checkable
class ConfigPart(Protocol):
    """Some `config.json` keys and the fields of `HookedConfig` they decide."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads, old spellings included."""

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields decided by this part; `fields` are those of the parts before it."""

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The keys, in the spelling that transformers 5 writes, for the fields of a `HookedConfig`."""


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One key that is one field.

    Attributes:
        hub: the key.
        name: the field.
        kind: type of the value.
        default: what transformers takes where the key is absent; None leaves the field to `HookedConfig`.
        alias: older spelling, which wins where both are given.
        decode, encode: between the key's value and the field's.
    """

    hub: str
    name: str
    kind: type
    default: Any = REQUIRED
    alias: str | None = None
    decode: Callable[[Any], Any] = _unchanged
    encode: Callable[[Any], Any] = _unchanged

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and its older spelling."""
        return (self.hub,) if self.alias is None else (self.hub, self.alias)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Decode the value; an absent one without a default leaves the field out."""
        value = reader.get(self.alias, self.kind, None) if self.alias is not None else None
        if value is None:
            value = reader.get(self.hub, self.kind, self.default)
        else:
            reader.used.add(self.hub)
        return {} if value is None else {self.name: self.decode(value)}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the field."""
        return {self.hub: self.encode(fields[self.name])}


SIZE_KEYS = (
    Key("vocab_size", "d_vocab", int),
    Key("hidden_size", "d_model", int),
    Key("num_hidden_layers", "n_layers", int),
    Key("num_attention_heads", "n_heads", int),
)
"""The sizes that most families name alike."""

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
_ACTIVATION_KEYS: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_quick": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}


@dataclass(frozen=True)
class ActivationKey:
    """The activation of the MLP: transformers' several tanh approximations of GELU are one function."""

    hub: str
    default: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.hub,)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Translate the name; one that is not implemented is a problem."""
        name = reader.get(self.hub, str, self.default)
        if name not in _ACTIVATIONS:
            reader.reject(self.hub, f"one of {', '.join(map(repr, _ACTIVATIONS))}")
            return {}
        return {"act_fn": _ACTIVATIONS[name]}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The name of the activation in transformers."""
        # What has no name there differs from what is read back, and is refused there.
        return {self.hub: _ACTIVATION_KEYS.get(fields["act_fn"], self.default)}


def norm_key(hub: str, kind: NormKind, *, default_eps: float) -> Key:
    """The key of the norms' epsilon; the kind of norm is the family's."""

    def decode(eps: float) -> NormConfig:
        return NormConfig(kind=kind, eps=eps, bias=kind == "layer")

    def encode(norm: object) -> float:
        # What is no norm, or one for each layer, differs from what is read back, and is refused there.
        return norm.eps if isinstance(norm, NormConfig) else default_eps

    return Key(hub, "norm", float, default=default_eps, decode=decode, encode=encode)


@dataclass(frozen=True)
class BiasFlag:
    """One flag that gives several linear maps their biases.

    Some conversions hold only some of those biases (Qwen rewritten as Llama has them on query, key and value
    but not on the output). transformers zeroes the absent ones, so the tensors present decide
    (`Family.read_config`).

    Attributes:
        hub: the key.
        names: the fields it decides.
        default: what transformers takes where the key is absent.
    """

    hub: str
    names: tuple[str, ...]
    default: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.hub,)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Give all fields the flag's value."""
        return dict.fromkeys(self.names, reader.get(self.hub, bool, self.default))

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The flag is on where any of the fields is."""
        return {self.hub: any(fields[name] for name in self.names)}


@dataclass(frozen=True)
class Computed:
    """Several keys and several fields, related by two functions."""

    keys: tuple[str, ...]
    read: Callable[[ConfigReader, Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ConfigMap:
    """How one family's `config.json` and `HookedConfig` translate into each other.

    Attributes:
        parts: what is read and written; a part sees the fields of those before it.
        fixed: fields that are the same in every checkpoint of the family.
        pinned: keys that must hold the one value that is implemented, where they are present.
        inert: further keys that carry no architecture, besides `INERT_KEYS`.
    """

    parts: tuple[ConfigPart, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pinned: Mapping[str, Any] = field(default_factory=dict)
    inert: Collection[str] = ()

    # What no family implements, and what these values would have to be.
    always_pinned: Mapping[str, Any] = field(
        default_factory=lambda: {
            "add_cross_attention": False,
            "is_encoder_decoder": False,
            "pruned_heads": {},
            "tie_encoder_decoder": False,
        }
    )

    def read(self, config: Mapping[str, Any], *, where: str, warn: bool = True) -> dict[str, Any]:
        """The fields of `HookedConfig` that `config` decides. With `warn`, unknown keys give one warning.

        Raises:
            UnsupportedModelError: keys are missing, mistyped or hold values that are not implemented; all are
                listed.
        """
        reader = ConfigReader(config)
        fields = dict(self.fixed)
        for part in self.parts:
            fields |= part.read(reader, fields)
        for key, value in {**self.always_pinned, **self.pinned}.items():
            reader.used.add(key)
            if config.get(key) not in (None, value):
                reader.reject(key, f"{value!r}, the only value implemented")
        for key in QUANTISATION_KEYS:
            if reader.has(key):
                reader.reject(
                    key,
                    "none: the weights are quantised, and HookLens computes with plain ones. Take the checkpoint that "
                    "was quantised, or dequantise this one: AutoModelForCausalLM.from_pretrained(...).dequantize(), "
                    "which goes to HookedCausalLM.from_hf",
                )
        if reader.problems:
            listed = "; ".join(reader.problems)
            raise UnsupportedModelError(
                f"{where}: config.json describes a network that HookLens cannot build: {listed}. "
                "Correct the config if it is wrong, or take another checkpoint"
            )
        if warn:
            self._warn_of_unknown_keys(reader, where)
        return fields

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture's keys for the fields of a `HookedConfig`."""
        written: dict[str, Any] = {}
        for part in self.parts:
            written |= part.write(fields)
        return written

    def update(self, config: Mapping[str, Any], known: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """`config`, which describes the fields `known`, changed to describe `fields`; the rest stays as spelled."""
        updated = dict(config)
        for part in self.parts:
            written = part.write(fields)
            if written != part.write(known):
                updated = {key: value for key, value in updated.items() if key not in part.keys} | written
        return updated

    def _warn_of_unknown_keys(self, reader: ConfigReader, where: str) -> None:
        unknown = [
            key
            for key in reader.unused()
            if key not in INERT_KEYS and key not in self.inert and not key.startswith("_")
        ]
        if unknown:
            warnings.warn(
                f"{where}: config.json has keys that HookLens does not know: {join_names(unknown)}. They are "
                "ignored; if one of them changes the network, the numbers will be wrong",
                stacklevel=2,
            )
