"""Config parts for layers that attend differently: sliding windows, and rotary that goes with them.

transformers 5 names the kind of each layer in `layer_types`; before that every family had a rule of its own, which
holds where the list is absent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hooklens.adapters.keys.positions import PositionKeys
from hooklens.adapters.keys.reader import ConfigReader
from hooklens.config import NoPositions, RotaryPositions

FULL, SLIDING = "full_attention", "sliding_attention"


def every_layer(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    """The rule of families whose layers all slide, where there is a window."""
    return [True] * n_layers


def late_layers(key: str, default: int) -> Callable[[ConfigReader, int], Sequence[bool]]:
    """The rule of families whose layers slide from one on, whose number is under a key."""

    def slides(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
        first = reader.get(key, int, default)
        return [layer >= first for layer in range(n_layers)]

    return slides


@dataclass(frozen=True, kw_only=True)
class WindowKeys:
    """Sliding windows: `windows`. No window is what null and 0 say, too.

    Attributes:
        key: of the window's size.
        default: the size that transformers takes where the key is absent (not: null); None: no window.
        switch: a flag without which there is no window; None: there is none.
        slides: which layers slide where there are no `layer_types`, from the config and the number of layers.
        slides_keys: what `slides` reads.
        typed: whether `layer_types` is read and written.
        nullable: whether null is written where no layer slides; False: the default, which no layer then has.
    """

    key: str = "sliding_window"
    default: int | None = None
    switch: str | None = None
    slides: Callable[[ConfigReader, int], Sequence[bool]] = every_layer
    slides_keys: tuple[str, ...] = ()
    typed: bool = True
    nullable: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        optional = (self.switch, "layer_types" if self.typed else None)
        return (self.key, *self.slides_keys, *(key for key in optional if key is not None))

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read `windows`."""
        size, kinds = self.size(reader), self.kinds(reader, fields)
        windows = tuple(size if kind == SLIDING else None for kind in kinds)
        return {"windows": windows if any(windows) else None}

    def size(self, reader: ConfigReader) -> int | None:
        """The window of layers that slide; None: there is none."""
        default = None if reader.is_null(self.key) else self.default
        size = reader.get(self.key, int, default) or None
        switched_off = self.switch is not None and not reader.get(self.switch, bool, False)
        return None if switched_off else size

    def kinds(self, reader: ConfigReader, fields: Mapping[str, Any]) -> Sequence[str]:
        """The kind of each layer."""
        n_layers = len(reader.layers(fields.get("n_layers", 0)))
        reader.used.update(self.slides_keys)
        kinds = reader.by_layer("layer_types", str, n_layers) if self.typed else None
        if kinds is None:
            return [SLIDING if slides else FULL for slides in self.slides(reader, n_layers)]
        if unknown := set(kinds) - {FULL, SLIDING}:
            reader.reject("layer_types", f"of {FULL!r} and {SLIDING!r} only; {sorted(unknown)} are not implemented")
            return []
        return kinds

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the size, the switch and the kind of each layer."""
        windows = fields["windows"] or (None,) * fields["n_layers"]
        unused = None if self.nullable else self.default
        size = next((window for window in windows if window is not None), unused)
        switch = {} if self.switch is None else {self.switch: size is not None}
        types = {"layer_types": [FULL if window is None else SLIDING for window in windows]} if self.typed else {}
        return {self.key: size, **switch, **types}


def all_but_every(default: int, key: str | None = None) -> Callable[[ConfigReader, int], Sequence[bool]]:
    """The rule of families in which every n-th layer sees all, and the others slide.

    Args:
        default: n, where the config is silent.
        key: of n; None: there is none.
    """

    def slides(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
        period = default if key is None else reader.get(key, int, default)
        if key is not None and period < 1:
            reader.reject(key, "at least 1")
            return []
        return [(layer + 1) % period != 0 for layer in range(n_layers)]

    return slides


@dataclass(frozen=True, kw_only=True)
class LayeredRotary:
    """Windows and a rotation that depends on the kind of a layer: `windows`, `positions` and `n_ctx`.

    Attributes:
        windows: how windows are read.
        rotary: how a rotation is read.
        local_base: key and default of the base of the plain rotation in layers that slide, where the config has one
            object for the rotation of the others; None: these share it. A key of None: the base is fixed.
        unrotated: which layers have no rotation, from the config, the kinds of layers and the window; None: none.
        unrotated_keys: what `unrotated` reads.
        write_unrotated: the keys of `unrotated`, from whether each layer is rotated; None: there are none to write.
    """

    windows: WindowKeys
    rotary: PositionKeys
    local_base: tuple[str | None, float] | None = None
    unrotated: Callable[[ConfigReader, Sequence[str], int | None], Sequence[bool]] | None = None
    unrotated_keys: tuple[str, ...] = ()
    write_unrotated: Callable[[Sequence[bool]], dict[str, Any]] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        local = () if self.local_base is None or self.local_base[0] is None else (self.local_base[0],)
        return (*self.windows.keys, *self.rotary.keys, *local, *self.unrotated_keys)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read `windows`, `positions` and `n_ctx`."""
        kinds = self.windows.kinds(reader, fields)
        n_ctx = reader.get(self.rotary.n_ctx, int, self.rotary.default_n_ctx)
        rotations, n_ctx = self._read_rotations(reader, fields, n_ctx=n_ctx)
        bare = [False] * len(kinds)
        reader.used.update(self.unrotated_keys)
        if self.unrotated is not None:
            bare = list(self.unrotated(reader, kinds, self.windows.size(reader)))
        if reader.problems:
            return {}
        positions = tuple(
            NoPositions() if is_bare else rotations[kind] for kind, is_bare in zip(kinds, bare, strict=True)
        )
        same = not positions or len(set(positions)) == 1
        return {
            **self.windows.read(reader, fields),
            "n_ctx": n_ctx,
            "positions": (positions[0] if positions else rotations[FULL]) if same else positions,
        }

    @property
    def _local(self) -> PositionKeys:
        """How the rotation of layers that slide is read."""
        if self.local_base is None:
            return self.rotary
        key, base = self.local_base
        return replace(self.rotary, base=key, default_base=base)

    def _read_rotations(
        self, reader: ConfigReader, fields: Mapping[str, Any], *, n_ctx: int
    ) -> tuple[dict[str, RotaryPositions | None], int]:
        rope = self.rotary.open_rope(reader)
        by_kind = {FULL: self.rotary, SLIDING: self._local}
        if rope.has(FULL) or rope.has(SLIDING):
            # A kind that is not there turns plainly.
            ropes = {kind: rope.nested(kind) for kind in by_kind}
        elif self.local_base is None:
            rotation, n_ctx = self.rotary.read_rotary(reader, rope, fields, n_ctx=n_ctx)
            return dict.fromkeys(by_kind, rotation), n_ctx
        else:
            # One object in the old spelling is that of the layers that see all.
            if reader.get("rope_parameters", dict, {}):
                reader.reject("rope_parameters", f"an object for each of {FULL!r} and {SLIDING!r}")
            ropes = {FULL: rope, SLIDING: ConfigReader({})}
        read = {kind: keys.read_rotary(reader, ropes[kind], fields, n_ctx=n_ctx) for kind, keys in by_kind.items()}
        return {kind: rotation for kind, (rotation, _) in read.items()}, max(length for _, length in read.values())

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write windows, and the rotation of each kind of layer."""
        positions, n_layers = fields["positions"], fields["n_layers"]
        by_layer = positions if isinstance(positions, tuple) else (positions,) * n_layers
        windows = self.windows.write(fields)
        kinds = windows.get("layer_types", [FULL] * n_layers)
        rotations = {
            kind: position
            for kind, position in zip(kinds, by_layer, strict=True)
            if isinstance(position, RotaryPositions)
        }
        # One whose scaling makes the context longer says what it was before.
        growing = (one for one in rotations.values() if one.scaling is not None and one.scaling.kind == "dynamic")
        one = next(growing, rotations.get(FULL, rotations.get(SLIDING, NoPositions())))
        written = {**windows, **self.rotary.write({**fields, "positions": one})}
        if self.local_base is not None and isinstance(one, RotaryPositions):
            both = {FULL: one, SLIDING: one} | rotations
            written["rope_parameters"] = {
                kind: self.rotary.write_rotary(rotation, fields) for kind, rotation in both.items()
            }
        if self.write_unrotated is not None:
            written |= self.write_unrotated([isinstance(position, RotaryPositions) for position in by_layer])
        return written
