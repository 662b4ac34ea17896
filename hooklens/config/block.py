"""One layer as its parts see it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from hooklens.config.attention import QueryTemperature
from hooklens.config.checks import check_counts, read_fields
from hooklens.config.norms import NormConfig
from hooklens.config.positions import Positions
from hooklens.config.stream import has_bias
from hooklens.display import Displayed, Summary
from hooklens.errors import ConfigError

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

Option = str | int | float | bool | None


class _Options(dict[str, Option]):
    """Options that stay as they are: configurations are compared, hashed and copied."""

    def _refuse(self: object, *given: object, **named: object) -> NoReturn:
        raise TypeError("the options of a part do not change; make a new PartConfig")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type["_Options"], tuple[dict[str, Option]]]:
        return _Options, (dict(self),)


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Which part stands in a place: attention, an MLP, or one of somebody's own (see `hooklens.model.parts.part.Part`).

    A kind may have a subclass of this one, with a typed and checked field for each option (`MoEConfig`). A config
    then holds that class, also where the kind was given with options.

    Attributes:
        kind: the name under which the class of the part is known.
        options: what this kind wants to know besides the network's config; sizes of axes among them.
    """

    typed: ClassVar[dict[str, type["PartConfig"]]] = {}

    kind: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def __init_subclass__(cls, *, kind: str | None = None) -> None:
        """Make the typed form of a kind known.

        Args:
            kind: whose options the fields of this class are.
        """
        super().__init_subclass__()
        if kind is not None:
            cls.typed[kind] = cls

    def __post_init__(self) -> None:
        wrong = not isinstance(self.options, Mapping) or any(
            not isinstance(name, str) or not isinstance(value, Option) for name, value in self.options.items()
        )
        if not isinstance(self.kind, str) or wrong:
            raise ConfigError(
                f"part {self.kind!r} with options {self.options!r}; expected the name of a kind, and options that are "
                "text, numbers, True, False or None"
            )
        object.__setattr__(self, "options", _Options(self.options))

    def __hash__(self) -> int:
        return hash((self.kind, tuple(sorted(self.options))))

    @property
    def sizes(self) -> Mapping[str, Option]:
        """The sizes of axes that the part brings, by axis, among other options."""
        return self.options

    def with_biases(self) -> "PartConfig":
        """The same part with a bias for each map that reads its input, as far as it has a say in that."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return {"kind": self.kind, "options": dict(self.options)}


def read_part(given: object, what: str = "part") -> Any:
    """A part in the form that its kind has, also one given as plain JSON values; what is no part comes back.

    Raises:
        ConfigError: fields that a part does not have, or options that its kind does not.
    """
    if isinstance(given, Mapping):
        given = read_fields(PartConfig, what, given)
    if type(given) is PartConfig and given.kind in PartConfig.typed:
        return read_fields(PartConfig.typed[given.kind], f"part of the kind {given.kind!r}", given.options)
    return given


Value = TypeVar("Value", bound=PartConfig | NormConfig | QueryTemperature | float | None)


@dataclass(frozen=True, repr=False)
class BlockConfig(Displayed):
    """The description of one layer.

    What a setting of the network says of a part that the layer lacks has no effect.

    Attributes:
        cfg: what all layers share.
        layer: which layer.
        options: of the part that is being made.
    """

    cfg: "HookedConfig"
    layer: int
    options: Mapping[str, Option] = field(default_factory=dict)

    def _summary(self) -> Summary:
        own = ("attn", "mlp", "norm", "norm_before", "norm_after", "qk_norm", "positions", "window", "chunk")
        return Summary(
            title=f"BlockConfig of layer {self.layer}",
            facts={name: str(found) for name in own if (found := getattr(self, name)) is not None},
        )

    @property
    def attn(self) -> PartConfig | None:
        """The attention; None: the layer has none."""
        return self._own(self.cfg.attn)

    @property
    def mlp(self) -> PartConfig | None:
        """The MLP, or what stands in its place; None: the layer has none."""
        return self._own(self.cfg.mlp)

    @property
    def norm(self) -> NormConfig | None:
        """The kind of the norms around the branches; None: the layer has none."""
        return self._own(self.cfg.norm)

    @property
    def norm_before(self) -> bool:
        """Whether norms stand at the entrances of the branches."""
        return self.norm is not None and self._own(self.cfg.norm_before)

    @property
    def norm_after(self) -> bool:
        """Whether norms stand at the exits of the branches."""
        return self.norm is not None and self._own(self.cfg.norm_after)

    @property
    def attn_norm(self) -> str | None:
        """The norm through which attention reads the stream, `"ln1"`; None: as it is, or there is no attention."""
        return "ln1" if self.norm_before and self.attn is not None else None

    @property
    def mlp_norm(self) -> str | None:
        """The norm through which the MLP reads the stream, `"ln2"`, or a shared `"ln1"`; None as in `attn_norm`."""
        if not self.norm_before or self.mlp is None:
            return None
        return "ln1" if self.cfg.shared_norm else "ln2"

    @property
    def has_mid(self) -> bool:
        """Whether the stream has a place between attention and MLP."""
        return self.cfg.wiring == "sequential" and self.attn is not None and self.mlp is not None

    @property
    def qk_norm(self) -> NormConfig | None:
        """The norm over each head's query and key."""
        return self._own(self.cfg.qk_norm)

    @property
    def positions(self) -> Positions:
        """How positions enter attention."""
        given = self.cfg.positions
        return given[self.layer] if isinstance(given, tuple) else given

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores: `attn_scale`, or `d_head ** -0.5` where that is None."""
        scale = self._own(self.cfg.attn_scale)
        return self.cfg.d_head**-0.5 if scale is None else scale

    @property
    def d_head_v(self) -> int:
        """The width of a head's values: `d_head`, but in latent attention."""
        width = None if self.attn is None else self.attn.sizes.get("d_head_v")
        return width if isinstance(width, int) else self.cfg.d_head

    @property
    def query_temperature(self) -> QueryTemperature | None:
        """The factor on queries that grows with their position; None: none."""
        return self._own(self.cfg.query_temperature)

    @property
    def chunk(self) -> int | None:
        """The size of the chunks of positions of which a query sees its own only; None: none."""
        return None if self.cfg.chunks is None else self.cfg.chunks[self.layer]

    @property
    def window(self) -> int | None:
        """How many of the latest keys a query may see; None: all."""
        return None if self.cfg.windows is None else self.cfg.windows[self.layer]

    def has_bias(self, name: str) -> bool:
        """Whether a map has a bias: `"q"`, `"k"`, `"v"`, `"mlp_in"`, `"mlp_gate"` or `"mlp_out"`."""
        return has_bias(self.cfg, f"{name}_bias")

    def _own(self, value: Value | tuple[Value, ...]) -> Value:
        return value[self.layer] if isinstance(value, tuple) else value

    def of(self, part: PartConfig) -> "BlockConfig":
        """The description for one part, with its options."""
        return BlockConfig(self.cfg, self.layer, part.sizes)

    def size(self, axis: str) -> int:
        """The size of an axis: an option of the part, or what the network says.

        Raises:
            ConfigError: nobody says, or the option is no size.
        """
        if axis not in self.options:
            return self.cfg.size(axis)
        size = self.options[axis]
        check_counts(f"options of the part in layer {self.layer}", {axis: size})
        assert isinstance(size, int)
        return size
