"""A LoRA adapter of PEFT as it lies in a folder: which tensors of a model it changes, and how."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.files.disk import DiskTensors, read_json
from hooklens.adapters.formats.place import Place
from hooklens.adapters.lora.settings import LoraSettings, read_settings
from hooklens.adapters.sources import CheckpointFiles, LocalFiles, Repository, open_files
from hooklens.adapters.sources.fsspec_files import is_url
from hooklens.display import Displayed, Listing, Summary, format_count, format_shape, merge_layers
from hooklens.errors import CheckpointError, join_names

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What PEFT puts before all names: its own model around the one that was trained.
_PREFIX = "base_model.model."
_LAYER, _SAVED = ".base_layer", ".modules_to_save"
_ROLES = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias", "lora_embedding_A": "A",
    "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_KEY = re.compile(r"(?P<module>.+)\.(?P<role>" + "|".join(map(re.escape, _ROLES)) + ")")
_OF_THE_HUB = ("token", "cache_dir", "local_files_only")
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True, eq=False)
class LoraModule:
    """What an adapter does to one module.

    Attributes:
        name: of the module in the model that was trained, as transformers has it in memory.
        A: `[rank d_in]`; of experts, whose parameter is one tensor, those of all of them, `[expert * rank d_in]`.
        B: `[d_out rank]`; of experts `[d_out rank * expert]`.
        is_embedding: the module looks tokens up: `d_in` is the vocabulary.
        magnitude: DoRA's lengths, `[d_out]`; None: plain LoRA.
        bias: what is added to the module's bias, `[d_out]`, before it is scaled; None: nothing.
        outside: how many further changes of parameters of the same module lie around this one.
    """

    name: str
    A: Tensor
    B: Tensor
    is_embedding: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    outside: int = 0


@dataclass(frozen=True, eq=False, repr=False)
class LoraAdapter(Displayed):
    """A LoRA adapter.

    Attributes:
        where: what to call it in texts of errors.
        settings: what its `adapter_config.json` says.
        modules: what it changes by a product of two matrices.
        whole: tensors that take the place of the base's, by their names in the model that was trained: of modules that
            were trained whole, biases, and an embedding that was saved along.
        config: the contents of its `adapter_config.json`.
    """

    where: str
    settings: LoraSettings
    modules: tuple[LoraModule, ...]
    whole: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def _summary(self) -> Summary:
        changes = [(one.name, f"{format_shape(one.A.shape)}, {format_shape(one.B.shape)}") for one in self.modules]
        changes += [(name, f"{format_shape(one.shape)} in its place") for name, one in self.whole.items()]
        tensors = [tensor for one in self.modules for tensor in (one.A, one.B)] + list(self.whole.values())
        return Summary(
            title=f"LoraAdapter of {len(self.modules):,} modules",
            facts={
                "from": self.where,
                "base": self.settings.base,
                "parameters": format_count(sum(one.numel() for one in tensors)),
            },
            listing=Listing(
                columns=("module", "A and B"),
                rows=[(name, shapes) for name, shapes, _ in merge_layers(changes)],
                what="kinds of modules",
                more="modules and whole have all",
            ),
        )


@dataclass(eq=False)
class _Found:
    """The tensors of one module, while they are collected."""

    keys: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    is_embedding: bool = False


def open_adapter(source: "str | Path | Repository", **options: Any) -> LoraAdapter:
    """Read a LoRA adapter of PEFT: a local folder, a name on the hub, a URL, or a repository.

    Args:
        source: see `hooklens.adapters.sources.open_files`.
        **options: those of `open_files`.

    Raises:
        CheckpointError: the adapter cannot be found or read, or its tensors do not fit together.
        UnsupportedModelError: it is an adapter of another type, or of a kind that is not implemented.
        InputError: an option that this kind of source has not.
    """
    return read_files(open_files(source, **options))


def read_files(files: CheckpointFiles) -> LoraAdapter:
    """The adapter that files hold.

    Args:
        files: where they lie.

    Raises:
        CheckpointError: they are no adapter's, or its tensors do not fit together.
        UnsupportedModelError: it is an adapter of another type, or of a kind that is not implemented.
    """
    names = files.names() if isinstance(files, Place) else ()
    weights = next((name for name in WEIGHTS if name in names), None)
    if CONFIG not in names or weights is None or not isinstance(files, Place):
        found = join_names(sorted(names)) or "nothing of the kind"
        raise CheckpointError(
            f"{files.where}: is no PEFT adapter; expected {CONFIG} and {WEIGHTS[0]} or {WEIGHTS[1]}, found {found}"
        )
    config = read_json(files.fetch([CONFIG]) / CONFIG)
    # Before the weights are fetched.
    read_settings(config, where=files.where)
    tensors = DiskTensors(files.fetch([CONFIG, weights]), files=WEIGHTS)
    return read_adapter(config, tensors, where=files.where)


def open_base(files: CheckpointFiles, options: Mapping[str, Any]) -> CheckpointFiles:
    """The files of the model that an adapter says it was made for.

    A path that is relative is one from where the program runs, as for PEFT, or else from the adapter's folder.

    Args:
        files: the adapter's.
        options: those with which they were opened, of `open_files`: what they say of the hub holds for the base.

    Raises:
        CheckpointError: the adapter does not name its base, or there is none of that name.
    """
    assert isinstance(files, Place)
    settings = read_settings(read_json(files.fetch([CONFIG]) / CONFIG), where=files.where)
    if settings.base is None:
        raise CheckpointError(
            f"{files.where}: is a PEFT adapter, and its {CONFIG} does not say of which model; give that as source, and "
            "this as adapter"
        )
    if is_url(settings.base):
        return open_files(settings.base, storage_options=options.get("storage_options"))
    beside = files.folder() / settings.base if isinstance(files, LocalFiles) else None
    if beside is not None and beside.is_dir() and not Path(settings.base).expanduser().is_dir():
        return open_files(beside)
    hub = {name: options[name] for name in _OF_THE_HUB if name in options}
    try:
        return open_files(settings.base, revision=settings.base_revision, **hub)
    except CheckpointError as error:
        raise CheckpointError(
            f"{files.where}: is a PEFT adapter for {settings.base!r}, which cannot be opened ({error}). Give its base "
            "as source, and this as adapter"
        ) from error


def read_adapter(config: Mapping[str, Any], tensors: TensorSource, *, where: str) -> LoraAdapter:
    """A LoRA adapter from its config and tensors.

    Args:
        config: the contents of its `adapter_config.json`.
        tensors: under the names that PEFT saves them with.
        where: what to call it in texts of errors.

    Raises:
        CheckpointError: its tensors do not fit together; all that is wrong is listed.
        UnsupportedModelError: it is of another type, or of a kind that is not implemented.
    """
    settings = read_settings(config, where=where)
    problems = [
        f"{name!r} is {tensors.header(name).dtype}"
        for name in tensors.names()
        if tensors.header(name).dtype not in _FLOATS
    ]
    found, whole = ({}, {}) if problems else _sort(tensors, problems)
    modules = []
    for key, one in found.items():
        wrong = _find_wrong(one, settings)
        problems += [f"{key!r}: {text}" for text in wrong]
        if not wrong:
            modules.append(
                LoraModule(
                    name=key.replace(_LAYER, ""),
                    is_embedding=one.is_embedding,
                    outside=key.count(_LAYER),
                    **one.tensors,
                )
            )
    if not (modules or whole or problems):
        problems.append("there are none")
    if problems:
        raise CheckpointError(
            f"{where}: the adapter's tensors do not fit together: {_list_some(problems)}. Check that {CONFIG} and the "
            "weights belong together and that the download is whole"
        )
    return LoraAdapter(where=where, settings=settings, modules=tuple(modules), whole=whole, config=dict(config))


def _sort(tensors: TensorSource, problems: list[str]) -> tuple[dict[str, _Found], dict[str, Tensor]]:
    """The tensors of changes by module, and those that replace the base's."""
    found: dict[str, _Found] = {}
    whole: dict[str, Tensor] = {}
    # Files do not keep an order, and texts of errors are to have one.
    for name in sorted(tensors.names()):
        path = name.removeprefix(_PREFIX)
        match = _KEY.fullmatch(path)
        if match is None and (".lora_" in path or ".token_adapter" in path):
            problems.append(f"{name!r} has an unknown meaning")
        elif match is None:
            whole[path.replace(_LAYER, "").replace(_SAVED, "")] = tensors.read(name)
        else:
            one = found.setdefault(match["module"], _Found())
            one.tensors[_ROLES[match["role"]]] = tensors.read(name)
            one.is_embedding = one.is_embedding or "embedding" in match["role"]
    return found, whole


def _find_wrong(found: _Found, settings: LoraSettings) -> list[str]:
    """What does not fit together in the tensors of one module."""
    missing = [f"there is no lora_{role}" for role in ("A", "B") if role not in found.tensors]
    if missing:
        return missing
    A, B = found.tensors["A"], found.tensors["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return [f"lora_A is {list(A.shape)} and lora_B {list(B.shape)}; expected [rank in] and [out rank]"]
    wrong = []
    for role in ("magnitude", "bias"):
        if role in found.tensors and tuple(found.tensors[role].shape) != (B.shape[0],):
            wrong.append(f"its {role} is {list(found.tensors[role].shape)}; expected [{B.shape[0]}]")
    if settings.dora != ("magnitude" in found.tensors):
        has = "no lora_magnitude_vector" if settings.dora else "a lora_magnitude_vector"
        wrong.append(f"has {has}, and use_dora is {str(settings.dora).lower()}")
    return wrong


def _list_some(problems: Collection[str]) -> str:
    left_out = len(problems) - 20
    return "; ".join(list(problems)[:20]) + (f" and {left_out} more" if left_out > 0 else "")
