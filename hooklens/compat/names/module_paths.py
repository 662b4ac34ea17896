"""Module paths of transformers' models, as nnsight, baukit, dictionary_learning and torch's hooks write them."""

import re
from dataclasses import dataclass, replace

from hooklens.adapters.modules import ROOT, HubModule, HubModules, read_modules
from hooklens.compat.names.places import Differs, Found, Places, Point, Side
from hooklens.config import HookedConfig
from hooklens.errors import join_names, suggest_names

_NUMBER = re.compile(r"\[(-?\d+)\]")
_IS_PATH = re.compile(r"(?:[a-zA-Z_]\w*|\d+)(?:\.\w+)*")
_END = re.compile(
    r"(?P<path>.*?)\.(?P<side>inputs?|output)(?P<index>(?:\[-?\d+\])*)(?P<field>\.last_hidden_state|\.logits)?"
)
_HIDDEN = re.compile(r"(?:\w+\.)*(?P<what>hidden_states|attentions)(?:\[(?P<index>-?\d+)\])?")
# What transformers calls the activation function, a module that holds no weights.
_ACTIVATION = frozenset({"act", "act_fn", "activation", "activation_fn"})
_TUPLE = "there the first entry of a tuple"
_BLOCK = (
    "there the first entry of a tuple in the transformers versions whose blocks give one; else a tensor, of which [0] "
    "is the first row"
)
_EAGER = "there only with attn_implementation='eager'"


def is_module_path(name: str) -> bool:
    """Whether a name has the form of a module path, with or without `.input` or `.output`."""
    return bool(_END.fullmatch(name) or _HIDDEN.fullmatch(name) or _NUMBER.search(name) or _IS_PATH.fullmatch(name))


def find_module_path(name: str, cfg: HookedConfig) -> Found:
    """The hook point of what enters or leaves a module, or of an entry of `hidden_states` or `attentions`.

    Args:
        name: `"model.layers[3].mlp.output"`, `"transformer.h.3.attn.c_proj.input"`, `"hidden_states[2]"`; a path
            without `.input` or `.output` means what the module gives.
        cfg: the network.

    Raises:
        UnsupportedModelError: no family of checkpoints can express the network.
    """
    if match := _HIDDEN.fullmatch(name):
        return _find_output(match["what"], match["index"], cfg)
    match = _END.fullmatch(name)
    asked = _Asked() if match is None else _Asked(match["side"], match["index"], match["field"])
    modules = read_modules(cfg)
    path, module = _spell(name if match is None else match["path"], modules, cfg)
    if module is None:
        return Differs(_explain_unknown(path, modules))
    if len(module.places) > 1:
        return _explain_several(module, asked.from_side, cfg)
    reason = modules.why_peculiar(path, asked.word) if asked.index != "[1]" else None
    return _find_in_module(module, asked, cfg) if reason is None else Differs(reason)


@dataclass(frozen=True)
class _Asked:
    """What is asked of a module.

    Attributes:
        word: `"input"`, `"inputs"` or `"output"`.
        index: entries of it, as text: `"[0]"`.
        field: one by name, `".last_hidden_state"`.
    """

    word: str = "output"
    index: str = ""
    field: str | None = None

    @property
    def from_side(self) -> Side:
        """Whether it enters or leaves the module."""
        return "out" if self.word == "output" else "in"


def _find_in_module(module: HubModule, asked: _Asked, cfg: HookedConfig) -> Found:
    """The hook point of what is asked of a module that is one place."""
    (place,) = module.places
    refused = _explain_index(place, asked, cfg)
    if module.reorders:
        refused = Differs(f"it is {place} with the entries of each head in another order")
    if module.is_piece:
        refused = Differs(f"it is one of several modules that are {place} together")
    if refused is not None:
        return refused
    places = Places(cfg)
    if place.endswith(".attn") and asked.from_side == "out" and asked.index == "[1]":
        return places.check(Point(name=f"{place}.hook_pattern", note=_EAGER, edit="an edit there has no effect"))
    found = places.find(place, asked.from_side)
    if isinstance(found, Differs) or asked.word != "output" or asked.index != "[0]" or place == ROOT:
        return found
    if place.endswith(".W_router"):
        found = replace(found, edit="an edit there has no effect: the same module has chosen the experts already")
    note = _BLOCK if re.fullmatch(r"blocks\.\d+", place) else _TUPLE
    return replace(found, note=f"{note}; {found.note}" if found.note else note)


def _spell(given: str, modules: HubModules, cfg: HookedConfig) -> tuple[str, HubModule | None]:
    """The path as the family spells it, without the variable that holds the model and with the base model's name."""
    path = _NUMBER.sub(r".\1", given)
    for layer in set(re.findall(r"\.(-\d+)", path)):
        path = path.replace(f".{layer}", f".{int(layer) + cfg.n_layers}")
    bare = path.partition(".")[2]
    for spelled in (path, modules.prefix + path, bare, modules.prefix + bare):
        if spelled in modules.modules:
            return spelled, modules.modules[spelled]
        parent, _, name = spelled.rpartition(".")
        around = modules.modules.get(parent)
        if around is not None and name in _ACTIVATION and re.fullmatch(r"blocks\.\d+\.mlp", around.places[0]):
            return spelled, HubModule(places=(f"{around.places[0]}.act",))
    return path, None


def _explain_index(place: str, asked: _Asked, cfg: HookedConfig) -> Differs | None:
    """Why what is taken of a module's input or output is not its tensor; None where it is."""
    if asked.field is not None:
        fits = place == ROOT and asked.word == "output" and asked.field == ".last_hidden_state"
        return None if fits else Differs(f"{asked.field.removeprefix('.')} is no part of what this module gives")
    if asked.word == "inputs":
        told = "inputs are the arguments, positional and by keyword: ask for .input, the first of them"
        return None if asked.index == "[0][0]" else Differs(told)
    known = {""}
    if asked.word == "output":
        known |= {"[0]"} if _gives_tuple(place, cfg) else set()
        known |= {"[1]"} if place.endswith(".attn") else set()
    if asked.index in known:
        return None
    return Differs(
        f"{asked.word}{asked.index} takes a part of the tensor, or an entry that is no activation: leave {asked.index} "
        "out, and slice the activation"
    )


def _gives_tuple(place: str, cfg: HookedConfig) -> bool:
    """Whether a module gives a tuple, in some version of transformers, of which the activation is the first entry."""
    layer = re.fullmatch(r"blocks\.(\d+)\.mlp", place)
    if layer is not None:
        mlp = cfg.block(int(layer[1])).mlp
        return mlp is not None and mlp.kind != "mlp"
    return place == ROOT or place.endswith(".W_router") or bool(re.fullmatch(r"blocks\.\d+(\.attn)?", place))


def _explain_several(module: HubModule, side: Side, cfg: HookedConfig) -> Found:
    """What enters a module that is several maps, or why what leaves it has no point of its own."""
    found = [Places(cfg).find(place, side) for place in module.places]
    if side == "in":
        # All of them read the same.
        read = found[0]
        return replace(read, edit="an edit there reaches these maps alone") if isinstance(read, Point) else read
    names = [one.name for one in found if isinstance(one, Point)]
    told = f": {join_names(names)}" if names else ""
    return Differs(f"it is {len(module.places)} maps in one{told}")


def _explain_unknown(path: str, modules: HubModules) -> str:
    known = [one for one in modules.modules if one]
    around = max((one for one in known if path.startswith(f"{one}.")), key=len, default="")
    if around in ("", modules.prefix.removesuffix(".")):
        return f"the {modules.family} family has no module {path!r} with weights.{suggest_names(path, known)}"
    inside = [one for one in known if one.startswith(f"{around}.") and one.count(".") == around.count(".") + 1]
    told = f"; what holds weights in {around!r}: {join_names(inside)}" if inside else ""
    return f"the {modules.family} family has no weights in a module {path!r}, and modules are known by theirs{told}"


def _find_output(what: str, index: str | None, cfg: HookedConfig) -> Found:
    """The hook point of an entry of what transformers gives with `output_hidden_states` or `output_attentions`."""
    n_entries = cfg.n_layers + (what == "hidden_states")
    if index is None:
        return Differs(f"{what} has {n_entries} entries: say which, as in '{what}[0]'")
    place = int(index)
    if not -n_entries <= place < n_entries:
        return Differs(f"{what} has {n_entries} entries, 0 to {n_entries - 1}")
    place %= n_entries
    found = _find_hidden_state(place, cfg)
    if what == "attentions":
        found = Point(name=f"blocks.{place}.attn.hook_pattern", note=_EAGER)
    edited = replace(found, edit="it is an output, which nothing reads") if isinstance(found, Point) else found
    return Places(cfg).check(edited)


def _find_hidden_state(place: int, cfg: HookedConfig) -> Found:
    """The hook point of a hidden state, counted from that of the embeddings; the last one is normed."""
    if place == 0:
        is_sum = "hook_pos_embed" in cfg.description.points
        return Point(name="blocks.0.hook_resid_pre", note="token and position embedding together" if is_sum else "")
    stream = f"blocks.{place - 1}.hook_resid_post"
    if place < cfg.n_layers:
        return Point(name=stream)
    if cfg.d_embed is not None:
        return Differs(f"it is in the width of the token embedding, behind unembed.W_proj_out; the stream is {stream}")
    note = f"behind the final norm; the stream before it is {stream}" if cfg.final_norm is not None else ""
    return Point(name="unembed.hook_in", note=note)
