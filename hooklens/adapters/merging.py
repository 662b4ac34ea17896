"""Merging checkpoint folders: read in pieces from their files, and written in pieces into a new folder.

What comes out is a checkpoint like the first model's, the base's where there is one: its config, generation settings
and tokenizer, and merged weights under the family's names on disk. A tied unembedding that some files hold and others
do not is one weight.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters.checkpoint import download_checkpoint, open_checkpoint
from hooklens.adapters.export import ALWAYS_REPLACED, INDEX, check_folder, plan_shards, write_json
from hooklens.adapters.files.disk import TensorHeader, read_json
from hooklens.adapters.files.folder import replace_files
from hooklens.adapters.files.pieces import open_pieces
from hooklens.adapters.files.tokenizer_files import TOKENIZER_FILES
from hooklens.adapters.layout import with_dtype
from hooklens.adapters.sources.files import COMPANIONS
from hooklens.bundled import bundled_path
from hooklens.config import HookedConfig
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.weights.merging.kinds import MergedTensors, Outline, Target, open_operand

_BUNDLED = "bundled:"
_NOT_COPIED = ("config.json", "hooklens.json", "adapter_config.json")
# What no weight has to do with.
_NO_ARCHITECTURE = frozenset({"n_ctx", "init_std"})


class Folder:
    """A checkpoint in a folder, on the hub, or bundled.

    Args:
        given: which.
        label: what to call it in messages.

    Raises:
        InputError: it holds an adapter, or weights that have been processed.
        CheckpointError: it is no checkpoint, or damaged.
        UnsupportedModelError: the architecture is not implemented, or it is no plain checkpoint: quantised, in an old
            format, or inside of another model.
    """

    noun = "folders"

    def __init__(self, given: str | Path, label: str) -> None:
        source: str | Path = given
        if isinstance(given, str) and given.startswith(_BUNDLED):
            source = bundled_path(given.removeprefix(_BUNDLED))
        if (Path(source).expanduser() / "adapter_config.json").exists():
            raise InputError(
                f"{label}: {source} holds a PEFT adapter (adapter_config.json), not the weights of a model; merge "
                "the adapter into its base first, and give what is saved then"
            )
        self.path = download_checkpoint(source)
        checkpoint = open_checkpoint(self.path)
        if checkpoint.transforms:
            raise InputError(
                f"{label}: the weights in {self.path} have been processed ({', '.join(checkpoint.transforms)}), each "
                "model's in its own way, so that merging them means nothing; merge the checkpoints that were processed"
            )
        self._model = checkpoint.plain_model()
        self.cfg: HookedConfig = checkpoint.cfg
        self._outlines = {
            name: Outline(getattr(torch, header.dtype), header.shape) for name, header in self._model.headers().items()
        }
        self._loaded: Any = None

    def outlines(self) -> Mapping[str, Outline]:
        """The tensors under the family's names on disk, each weight once."""
        return self._outlines

    def same(self) -> Mapping[str, str]:
        """None: a tied unembedding that is stored all the same is left out."""
        return {}

    def read(self, name: str, span: slice) -> Tensor:
        """Some entries, mapped anew from the file, so that no others stay in memory."""
        return self._model.read_stored(name).reshape(-1)[span]

    def differences(self, other: "Folder") -> list[str]:
        """Fields of the configuration, and the family."""
        found = differing_fields(self.cfg, other.cfg)
        ours, theirs = self._model.family, other._model.family
        return [*([f"the family is {ours} and {theirs}"] if ours != theirs else []), *found]

    def check_target(self, target: Target) -> None:
        """Ask for a folder to write.

        Raises:
            InputError: none was given.
            CheckpointError: it is a file, or holds an adapter.
        """
        if target.out is None:
            raise InputError("out is None, expected the folder to write, since folders are merged")
        check_folder(target.out)

    def build(self, merged: MergedTensors, target: Target) -> Path:
        """Write the folder, one piece after another, and give its path."""
        assert target.out is not None
        outlines = {
            name: (one.dtype if target.dtype is None else target.dtype, one.shape)
            for name, one in self._outlines.items()
        }
        plan = plan_shards(outlines, target.max_shard_size)
        headers = {name: TensorHeader(str(kind).removeprefix("torch."), tuple(shape))
                   for name, (kind, shape) in outlines.items()}  # fmt: skip
        with self._replacing(target.out) as new:
            with contextlib.ExitStack() as stack:
                files = {
                    file: stack.enter_context(open_pieces(new / file, {name: headers[name] for name in names}))
                    for file, names in plan.filename_to_tensors.items()
                }
                for name, _, pieces in merged:
                    files[plan.tensor_to_filename[name]].write(name, pieces)
            if plan.is_sharded:
                write_json(new / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
            self._write_companions(new, target.dtype)
        return target.out

    def transformers_state(self) -> dict[str, Tensor]:
        """The state dict of the model that transformers loads."""
        transformers = import_package("transformers")
        self._loaded = transformers.AutoModelForCausalLM.from_pretrained(
            str(self.path), dtype="auto", local_files_only=True, trust_remote_code=False
        )
        state: dict[str, Tensor] = self._loaded.state_dict()
        return state

    def build_transformers(self, state: dict[str, Tensor], target: Target) -> Path:
        """Write what transformers writes of the model with other weights."""
        assert target.out is not None
        model = self._loaded if target.dtype is None else self._loaded.to(target.dtype)
        model.load_state_dict(state)
        with self._replacing(target.out) as new:
            model.save_pretrained(new, max_shard_size=target.max_shard_size)
            self._write_companions(new, target.dtype)
        return target.out

    @contextmanager
    def _replacing(self, out: Path) -> Iterator[Path]:
        """Gives the folder to write into, whose files take their places in `out` in one step when all are there."""
        is_new = not out.exists()
        brings_tokenizer = any((self.path / name).exists() for name in TOKENIZER_FILES)
        stale = (*ALWAYS_REPLACED, *TOKENIZER_FILES) if brings_tokenizer else ALWAYS_REPLACED
        try:
            with replace_files(out, stale=stale) as new:
                yield new
        except BaseException:
            if is_new:
                # A folder that something was put into meanwhile stays.
                with contextlib.suppress(OSError):
                    out.rmdir()
            raise

    def _write_companions(self, new: Path, dtype: torch.dtype | None) -> None:
        """Config, generation settings and tokenizer of this model, beside the weights."""
        for pattern in COMPANIONS:
            for path in self.path.glob(pattern):
                if path.is_file() and path.name not in _NOT_COPIED:
                    place = new / path.relative_to(self.path)
                    place.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, place)
        config = read_json(self.path / "config.json")
        write_json(
            new / "config.json", config if dtype is None else with_dtype(config, str(dtype).removeprefix("torch."))
        )


open_operand.register(str, Folder)
open_operand.register(Path, Folder)


def differing_fields(one: HookedConfig, other: HookedConfig) -> list[str]:
    """The fields in which two networks are not the same, with both values; the longest sequence is free."""
    return [
        f"{field.name} is {getattr(one, field.name)} and {getattr(other, field.name)}"
        for field in dataclasses.fields(HookedConfig)
        if field.compare
        and field.name not in _NO_ARCHITECTURE
        and getattr(one, field.name) != getattr(other, field.name)
    ]
