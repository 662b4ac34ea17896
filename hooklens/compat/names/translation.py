"""Names of other libraries as names of hook points."""

from collections.abc import Callable
from functools import partial

from hooklens.arguments import optional, read_one_of, reads, refusal
from hooklens.compat.names.module_paths import find_module_path, is_module_path
from hooklens.compat.names.places import Differs, Found
from hooklens.compat.names.transformer_lens import find_transformer_lens, is_transformer_lens
from hooklens.config import HookedConfig
from hooklens.errors import HookNameError

NOTATIONS = ("transformer_lens-2", "transformer_lens-3", "transformer_bridge", "transformers")


class Translation(str):
    """The name of a hook point, usable wherever a name is, with what to know of the name it was translated from.

    Attributes:
        given: the name that was translated.
        notation: whose name it is, one of `NOTATIONS`, or "transformer_lens" where all versions mean the same.
        note: what differs in shape, or in when the other library has it; empty: nothing.
        edit: what an edit under the other name reaches, where it is something else than here; empty: the same.
    """

    given: str
    notation: str
    note: str
    edit: str

    __slots__ = ("edit", "given", "notation", "note")

    def __new__(cls, name: str, *, given: str, notation: str, note: str = "", edit: str = "") -> "Translation":
        """A translation to `name`."""
        made = super().__new__(cls, name)
        made.given, made.notation, made.note, made.edit = given, notation, note, edit
        return made

    def __reduce__(self) -> tuple[Callable[..., "Translation"], tuple[str]]:
        """What copies and pickles are made of."""
        again = partial(Translation, given=self.given, notation=self.notation, note=self.note, edit=self.edit)
        return again, (str(self),)

    @property
    def name(self) -> str:
        """The name of the hook point as plain text."""
        return str(self)

    def __repr__(self) -> str:
        told = "".join(f", {word}={value!r}" for word in ("note", "edit") if (value := getattr(self, word)))
        return f"Translation({str(self)!r}, given={self.given!r}, notation={self.notation!r}{told})"


@reads(HookNameError, notation=optional(partial(read_one_of, options=NOTATIONS)))
def translate(name: str | tuple[str | int, ...], cfg: HookedConfig, *, notation: str | None = None) -> Translation:
    """The hook point whose values are those of another library's name.

    Understood are names of TransformerLens 2.x and 3.x with their shorthands (`"k6a"`, `("scale", 3, "ln1")`), which
    are SAELens' `hook_name`s, too; names of its `TransformerBridge` (`"blocks.0.attn.q.hook_out"`); module paths of
    transformers' models, as nnsight (`"model.layers[0].mlp.output"`), baukit and dictionary_learning
    (`"transformer.h.3"`: what the module gives) write them, in the words of the family that the model was loaded from;
    and entries of transformers' outputs (`"hidden_states[2]"`, `"attentions[0]"`).

        cache[translate("model.layers[0].mlp.down_proj.input", model.cfg)]

    The values are those of the unprocessed model: what folding and centring change is changed here and there.

    Args:
        name: the other library's name.
        cfg: the model's, `model.cfg`.
        notation: whose name it is: `"transformer_lens-2"`, `"transformer_lens-3"`, `"transformer_bridge"` or
            `"transformers"`. None: told by its form; needed only where versions mean different tensors by one name.

    Returns:
        The name, with a `note` where shapes differ and an `edit` where an edit there does not reach the same.

    Raises:
        HookNameError: no hook point has these values; the text says what differs, or which of several readings to ask
            for.
        UnsupportedModelError: a module path, and no family of checkpoints can express the network.
    """
    if not isinstance(cfg, HookedConfig):
        raise refusal(cfg, "cfg", "a model's HookedConfig, model.cfg", HookNameError)
    if not (isinstance(name, str) or _is_shorthand(name)):
        raise refusal(name, "name", "another library's name, or a shorthand such as ('k', 3, 'attn')", HookNameError)
    whose, found = _find(name, cfg, notation)
    given = name if isinstance(name, str) else repr(name)
    if isinstance(found, Differs):
        raise HookNameError(f"{given!r} ({whose}) has no hook point here: {found.why}")
    return Translation(found.name, given=given, notation=whose, note=found.note, edit=found.edit)


def _is_shorthand(name: object) -> bool:
    return isinstance(name, tuple) and bool(name) and isinstance(name[0], str)


def _find(name: str | tuple[str | int, ...], cfg: HookedConfig, notation: str | None) -> tuple[str, Found]:
    """Whose name it is, and what it stands for."""
    if notation is not None and notation != "transformers":
        return notation, find_transformer_lens(name, cfg, notation)
    if not isinstance(name, str) and notation is not None:
        return notation, Differs("a tuple is a shorthand of TransformerLens's; the text of a module path is expected")
    if not isinstance(name, str) or (notation is None and is_transformer_lens(name)):
        return "transformer_lens", find_transformer_lens(name, cfg, None)
    if is_module_path(name):
        return "transformers", find_module_path(name, cfg)
    return "transformers", Differs(
        "it has the form of no known name: 'blocks.3.hook_resid_pre', 'model.layers[3].mlp.output', 'hidden_states[3]'"
    )
