"""Parts of config maps: some keys of a `config.json` and the fields of `HookedConfig` that they decide."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hooklens.adapters.keys.reader import REQUIRED, ConfigReader
from hooklens.config import Activation


@runtime_checkable
class ConfigPart(Protocol):
    """Some `config.json` keys and the fields of `HookedConfig` they decide."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads, old spellings included."""
        ...

    def read(self, reader: ConfigReader, fields: Mapping[str, Any], /) -> dict[str, Any]:
        """Fields decided by this part; `fields` are those of the parts before it."""
        ...

    def write(self, fields: Mapping[str, Any], /) -> dict[str, Any]:
        """The keys, in the spelling that transformers 5 writes, for the fields of a `HookedConfig`."""
        ...


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
        nullable: null leaves the field to `HookedConfig`, whatever transformers takes where the key is absent.
    """

    hub: str
    name: str
    kind: type
    default: Any = REQUIRED
    alias: str | None = None
    decode: Callable[[Any], Any] = _unchanged
    encode: Callable[[Any], Any] = _unchanged
    nullable: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and its older spelling."""
        return (self.hub,) if self.alias is None else (self.hub, self.alias)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Decode the value; an absent one without a default leaves the field out."""
        value = reader.get(self.alias, self.kind, None) if self.alias is not None else None
        if value is None:
            default = None if self.nullable and reader.is_null(self.hub) else self.default
            value = reader.get(self.hub, self.kind, default)
        else:
            reader.used.add(self.hub)
        return {} if value is None else {self.name: self.decode(value)}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the field; one that differs by layer has no place in the key, and is refused when it is read back."""
        value = fields[self.name]
        return {} if isinstance(value, tuple) else {self.hub: self.encode(value)}


SIZE_KEYS = (
    Key("vocab_size", "d_vocab", int),
    Key("hidden_size", "d_model", int),
    Key("num_hidden_layers", "n_layers", int),
    Key("num_attention_heads", "n_heads", int),
)
"""The sizes that most families name alike."""

SHORT_SIZE_KEYS = (
    Key("vocab_size", "d_vocab", int),
    Key("n_embd", "d_model", int, alias="hidden_size"),
    Key("n_layer", "n_layers", int, alias="num_hidden_layers"),
    Key("n_head", "n_heads", int, alias="num_attention_heads"),
)
"""The sizes in the short spelling; transformers takes the long one as well, which wins where both are given."""

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
    """The activation of the MLP: transformers' several tanh approximations of GELU are one function.

    Attributes:
        hub: the key.
        default: what transformers takes where the key is absent.
        alias: older spelling, which wins where both are given.
        meaning: names that mean something else in this family.
    """

    hub: str
    default: str
    alias: str | None = None
    meaning: Mapping[str, Activation] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and its older spelling."""
        return (self.hub,) if self.alias is None else (self.hub, self.alias)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Translate the name; one that is not implemented is a problem."""
        key = self.alias if self.alias is not None and reader.has(self.alias) else self.hub
        reader.used.add(self.hub)
        name, known = reader.get(key, str, self.default), {**_ACTIVATIONS, **self.meaning}
        if name not in known:
            reader.reject(key, f"one of {', '.join(map(repr, known))}")
            return {}
        return {"act_fn": known[name]}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The name of the activation in transformers."""
        names = {**_ACTIVATION_KEYS, **{act_fn: name for name, act_fn in self.meaning.items()}}
        # What has no name there differs from what is read back, and is refused there.
        return {self.hub: names.get(fields["act_fn"], self.default)}


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


@dataclass(frozen=True)
class Derived:
    """Fields that follow from others in every checkpoint of a family, without a key of their own."""

    derive: Callable[[Mapping[str, Any]], dict[str, Any]]

    @property
    def keys(self) -> tuple[str, ...]:
        """None."""
        return ()

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Derive the fields; nothing where those before are not to be had."""
        return {} if reader.problems else self.derive(fields)

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: fields that do not follow differ from what is read back, and are refused there."""
        return {}


def embed_scale_flag(hub: str, *, default: bool) -> Computed:
    """One flag that multiplies the token embedding by the root of its width: `embed_scale`.

    Args:
        hub: the key.
        default: what transformers takes where the key is absent.
    """

    def read(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"embed_scale": math.sqrt(fields["d_model"]) if reader.get(hub, bool, default) else None}

    def write(fields: Mapping[str, Any]) -> dict[str, Any]:
        # Another factor differs from what is read back, and is refused there.
        return {hub: fields["embed_scale"] is not None}

    return Computed((hub,), read, write)


def _decode_scalar(scalar: float) -> float:
    return float(scalar**-0.5)


def _encode_scalar(scale: float | None) -> float | None:
    # None is the scale of the head size, which the key does not know; what is read back differs, and is refused there.
    if not scale or scale < 0:
        return None
    scalar = scale**-2
    # A whole number where it is one, else the one of the floats around that comes back exactly.
    near = (math.nextafter(scalar, 0), math.nextafter(scalar, math.inf))
    exact = (one for one in (max(1, round(scalar)), scalar, *near) if _decode_scalar(one) == scale)
    return next(exact, scalar)


def score_scalar_key(hub: str, *, default: float) -> Key:
    """The key of a number whose inverse root is the factor on attention scores.

    Args:
        hub: the key.
        default: what transformers takes where it is absent.
    """
    return Key(hub, "attn_scale", float, default=default, decode=_decode_scalar, encode=_encode_scalar)


ROOT_EMBED_SCALE = Derived(lambda fields: {"embed_scale": math.sqrt(fields["d_model"]), "embed_scale_rounded": True})
"""The token embedding is multiplied by the root of the stream's width, rounded to the dtype of the weights."""
