"""A model's methods for the adapters beside its weights: added, switched, saved, merged."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hooklens.adapters import open_adapter
from hooklens.arguments import read_path, read_text, reads, refusal
from hooklens.causal_lm.kept_adapters import (
    KEEPING,
    LAYERS,
    KeptAdapters,
    PinnedWeights,
    acting,
    activate,
    keep,
    own_map,
    path_of,
    refuse_processed,
)
from hooklens.causal_lm.settings import hand_on_settings
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, HookLensError, InputError, join_names, suggest_names
from hooklens.files import write_safetensors
from hooklens.model.decoder import Decoder
from hooklens.model.parameters import ModelWeights
from hooklens.model.parts.adapted import AdapterSwitch, adapted_maps
from hooklens.model.placement.shared_weights import refuse_shared
from hooklens.optional import import_package
from hooklens.weights.offloaded import refuse_offloaded

if TYPE_CHECKING:
    from hooklens.adapters.lora.keeping import KeptChange

Model = TypeVar("Model", bound="AdapterMethods")

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _read_names(given: object, *, what: str, error: type[HookLensError]) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, Mapping):
        names = list(given)
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return tuple(names)
    raise refusal(given, what, "the name of an adapter, a list of different ones, or None for none", error)


def read_adapter_name(given: object, *, what: str, error: type[HookLensError]) -> str:
    """A name that an adapter can be given."""
    name = read_text(given, what=what, error=error)
    # It becomes the name of modules, which are joined with dots, in containers that have methods.
    if not name or "." in name or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise refusal(given, what, "a name for an adapter, without dots, and not that of a module's attribute", error)
    return name


class AdapterMethods:
    """LoRA adapters beside the weights, under peft's words.

    Each map that an adapter changes has a hook point, `blocks.0.attn.q_proj.hook_lora_out`, at what the acting adapters
    add to its output: all of them together, and 0 where none acts. Which act is the model's state (`set_adapter`), or
    that of a thread inside `with model.disable_adapter()`.

    Weights that are read under the field's names (`W_Q`, `named_weights()`) are those that the model computes with,
    those of the acting adapters included: copies, that are not assigned.
    """

    cfg: HookedConfig
    transforms: tuple[str, ...]

    if TYPE_CHECKING:

        def as_decoder(self) -> Decoder:
            """The network."""
            ...

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters beside the weights, in the order in which they were added."""
        kept = self._kept_adapters()
        return () if kept is None else tuple(kept.by_name)

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of those that act in calls that this thread makes now."""
        kept = self._kept_adapters()
        return () if kept is None else acting(kept)

    def _kept_adapters(self) -> KeptAdapters | None:
        found: KeptAdapters | None = self.__dict__.get("_adapters")
        return found

    @reads(name=read_adapter_name, folder=read_path)
    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Keep a LoRA adapter of PEFT beside the weights, from its folder; it acts once `set_adapter` says so.

        The first one freezes the model's own weights, as peft does: `model.requires_grad_()` thaws all. Where one map
        on disk is several here (queries, keys and values), its `A` is one parameter, and of its `B` each has its rows.

        In training mode, dropout of an adapter draws for each map of the model anew, where peft draws once for those
        that are one map on disk.

        Args:
            name: for the methods of this model.
            folder: the adapter's folder, or its name on the hub.

        Raises:
            InputError: there is an adapter of that name, or the weights were processed.
            CheckpointError: the adapter cannot be read, or does not fit the model.
            UnsupportedModelError: it is of a kind that is not implemented, or cannot be kept beside the weights.
            MissingDependencyError: peft is not installed.
        """
        if name in self.adapters:
            raise InputError(
                f"add_adapter: there is an adapter {name!r} already; delete_adapter({name!r}) takes it out"
            )
        refuse_processed(self.transforms, "add_adapter")
        refuse_shared(self.as_decoder(), "add_adapter", InputError)
        cfg, layers = self.__dict__.get("_checkpoint", (self.cfg, None))
        kept = self._kept_adapters() or KeptAdapters(cfg, layers)
        adapter = import_package(KEEPING).keep_adapter(open_adapter(folder), kept.cfg, kept.layers)
        keep(self.as_decoder(), kept, name, adapter)

    @reads(names=_read_names)
    def set_adapter(self, names: str | Sequence[str] | None) -> None:
        """Have these adapters act from here on, in all threads, and no others; together they add up.

        As in peft, their parameters are trained from here on, and those of the others are not.

        Args:
            names: one, several, or None for none: the model then computes what it does without adapters, bit for bit.

        Raises:
            InputError: there is no such adapter, or several have a tensor for the same place.
        """
        assert not isinstance(names, str)
        chosen = tuple(names or ())
        kept = self._require_adapters(chosen, "set_adapter")
        if kept is not None:
            activate(self.as_decoder(), kept, chosen)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A `with` block inside of which no adapter acts in the calls that this thread makes.

        Other threads are outside of it. A call stays what it was opened as, also in a backward pass that comes later.
        What adapters train stays as it is.
        """
        kept = self._require_adapters((), "disable_adapter")
        return (AdapterSwitch() if kept is None else kept.switch).only(())

    @reads(name=read_text)
    def delete_adapter(self, name: str) -> None:
        """Take an adapter out; with the last one beside them, maps are plain ones again.

        Raises:
            InputError: there is no such adapter.
        """
        kept = self._require_adapters((name,), "delete_adapter")
        assert kept is not None
        decoder = self.as_decoder()
        activate(decoder, kept, tuple(one for one in kept.active if one != name))
        del kept.by_name[name]
        for path, layer in adapted_maps(decoder).items():
            place, _, attribute = path.rpartition(".")
            import_package(LAYERS).take_out(decoder.get_submodule(place), attribute, layer, name)
        if not kept.by_name:
            self.__dict__.pop("_adapters")
        decoder.name_hook_points()

    def merge_adapter(self: Model) -> Model:
        """A new plain model with the acting adapters in its weights; this one stays as it is.

        Each weight is added up and then rounded once, to its dtype. Where adapters beside the embedding act on looking
        tokens up alone, a tied unembedding gets a weight of its own.

        Raises:
            InputError: no adapter is beside the weights, or some of these are offloaded.
        """
        kept = self._kept_adapters()
        if kept is None:
            raise InputError("merge_adapter: this model has no adapters; add_adapter(name, folder) adds one")
        refuse_offloaded(
            self.as_decoder(),
            "merge_adapter: the merged model would have all weights in memory",
            InputError,
            otherwise="from_pretrained(..., adapter=folder, device_map=...) merges while it offloads, weight by weight",
        )
        weights = {name: weight.clone() for name, weight in PinnedWeights(self.as_decoder(), kept).items()}
        cfg, state = self.cfg, self.__dict__
        if cfg.tied_unembed and not torch.equal(weights["unembed.W_U"], weights["embed.W_E"].T):
            cfg = cfg.replace(tied_unembed=False)
        made: Any = type(self)
        model = made.from_state_dict(weights, cfg, state["tokenizer"])
        hand_on_settings(self, model)
        return model  # type: ignore[no-any-return]

    def named_weights(self) -> ModelWeights:
        """The weights by name, read when asked for and shared, not copied; quantised ones dequantised anew.

        With adapters beside them: what is made of them by the adapters that act now, copies.
        """
        kept = self._kept_adapters()
        return ModelWeights(self.as_decoder()) if kept is None else PinnedWeights(self.as_decoder(), kept)

    @reads(folder=read_path, name=read_text)
    def save_adapter(self, folder: str | Path, name: str) -> None:
        """Write an adapter as it is now, a folder that peft's `PeftModel.from_pretrained` loads beside the base model.

        Raises:
            InputError: there is no such adapter.
            CheckpointError: the folder cannot be written to.
        """
        kept = self._require_adapters((name,), "save_adapter")
        assert kept is not None
        maps, adapter = adapted_maps(self.as_decoder()), kept.by_name[name]
        weights = self.cfg.description.weights
        layers = import_package(LAYERS)

        def read_change(change: "KeptChange") -> "KeptChange":
            held = layers.read_tensors(maps[path_of(weights[change.weight])], name)
            return replace(change, **held)

        def read_whole(weight: str) -> Tensor:
            path, _, role = weights[weight].parameter.rpartition(".")
            beside = maps.get(path)
            found: Any = None if beside is None or name not in beside.replacements else beside.replacements[name]
            # What is the model's own has not been taken over.
            held = None if found is None else getattr(found, role)
            return (getattr(own_map(self.as_decoder(), path), role) if held is None else held).detach()  # type: ignore[no-any-return]

        tensors = import_package(KEEPING).join_adapter(adapter, read_change, read_whole)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_safetensors(Path(folder) / _WEIGHTS, tensors, {"format": "pt"})
            (Path(folder) / _CONFIG).write_text(json.dumps(dict(adapter.config), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written to ({error})") from error

    def _require_adapters(self, names: Sequence[str], method: str) -> KeptAdapters | None:
        """The model's adapters; all of these names have to be among them."""
        kept = self._kept_adapters()
        known = () if kept is None else tuple(kept.by_name)
        unknown = [name for name in names if name not in known]
        if unknown:
            has = f"those of this model are {join_names(known)}" if known else "this model has none"
            raise InputError(
                f"{method}: no adapter is called {join_names(unknown)}.{suggest_names(unknown[0], known)} {has}; "
                "add_adapter(name, folder) adds one"
            )
        return kept
