"""Writing one of a pool's models: its folder, its card, and its upload; the pool's method for it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooklens.adapters import write_checkpoint
from hooklens.adapters.files.folder import replace_files
from hooklens.arguments import optional, read_flag, read_path, reads, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.files import replace_file
from hooklens.optional import import_package
from hooklens.pool.config.document import as_plain
from hooklens.pool.config.dtypes import read_pool_dtype
from hooklens.pool.config.settings import SOURCES, is_special
from hooklens.pool.copying import copy_with
from hooklens.pool.errors import PoolError
from hooklens.tokens import Tokenizer, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What an older checkpoint in the folder may have left, which loaders would read beside the new one.
_STALE = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "generation_config.json", "hooklens.json")


def save(
    model: "HookedCausalLM | PreTrainedModel",
    folder: Path,
    *,
    dtype: torch.dtype | None,
    tokenizer: Tokenizer | None,
    max_shard_size: int | str,
) -> None:
    """Write a checkpoint in one step, and leave the model as it is.

    Args:
        model: a hooked model, or transformers'.
        folder: where to.
        dtype: of the written weights; None: the model's.
        tokenizer: written beside it; None: a hooked model's own.
        max_shard_size: files are split at this size.

    Raises:
        PoolError: no such model.
        HookLensError: what writing a checkpoint raises.
    """
    if isinstance(model, HookedCausalLM):
        if tokenizer is None:
            model.save_pretrained(folder, dtype=dtype, max_shard_size=max_shard_size)
            return
        write_checkpoint(
            folder,
            model.cfg,
            model.named_weights(),
            dtype=dtype,
            max_shard_size=max_shard_size,
            transforms=model.transforms,
            generation_config=model.generation_config,
            tokenizer=tokenizer,
        )
        return
    if not (isinstance(model, nn.Module) and hasattr(model, "save_pretrained")):
        raise refusal(model, "model", "a HookedCausalLM or a transformers model", PoolError)
    # transformers notes the dtype in the config of what it saves, so it gets one of its own.
    copied: PreTrainedModel = copy_with(model, partial(_cast, dtype=dtype))
    with replace_files(folder, stale=_STALE) as new:
        copied.save_pretrained(new, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))  # type: ignore[attr-defined]


def _cast(tensor: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    """The tensor in a dtype: itself, not a copy, where it has it."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class SaveMethods:
    """Writing a model of a pool."""

    if TYPE_CHECKING:

        @property
        def config(self) -> dict[str, Any]:
            """The pool's configuration."""
            ...

        def load_tokenizer(self, **overrides: Any) -> Tokenizer:
            """The pool's tokenizer."""
            ...

    @reads(
        PoolError,
        path=read_path,
        push_to_hub=read_flag,
        model_dtype=read_pool_dtype,
        dtype=read_pool_dtype,
        save_tokenizer=read_flag,
        tokenizer=optional(read_tokenizer),
        base_model_in_modelcard=read_flag,
    )
    def save_model(
        self,
        model: Any,
        path: str | Path,
        *,
        push_to_hub: bool = False,
        model_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        save_tokenizer: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        algorithm_config: Mapping[str, Any] | None = None,
        description: str | None = None,
        base_model_in_modelcard: bool = True,
        max_shard_size: int | str = "5GB",
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; the model stays as it is.

        Args:
            model: a `HookedCausalLM`, or a transformers model.
            path: the folder; `~` is the home folder.
            push_to_hub: upload the folder then.
            model_dtype: of the written weights; None: the model's.
            dtype: another name of that.
            save_tokenizer: write the pool's tokenizer. A `HookedCausalLM` is written with its own where neither this
                nor `tokenizer` says another.
            tokenizer_kwargs: arguments of `load_tokenizer`.
            tokenizer: written in any case.
            algorithm_config: what made the model; with it a model card, `README.md`, is written.
            description: its first paragraph.
            base_model_in_modelcard: name `_pretrained_` in it.
            max_shard_size: files are split at this size.
            repo_id: on the hub; None: the folder's name.
            token: for the hub; None: the one that is logged in.
            private: whether a new repository is.
            commit_message: of the upload.

        Raises:
            PoolError: no such model, two dtypes, arguments that need another one, or the pool has no tokenizer.
            HookLensError: what `HookedCausalLM.save_pretrained` raises.
        """
        if model_dtype is not None and dtype is not None and model_dtype != dtype:
            raise PoolError(f"model_dtype={model_dtype} and dtype={dtype} say one thing in two ways; give one of them")
        upload = Upload(repo_id, token=token, private=private, commit_message=commit_message)
        upload.check(push_to_hub=push_to_hub)
        if algorithm_config is None and description is not None:
            raise PoolError("description goes into the model card, which is written with algorithm_config=; give both")
        if tokenizer_kwargs is not None and (tokenizer is not None or not save_tokenizer):
            raise PoolError("tokenizer_kwargs goes with save_tokenizer=True, and without a tokenizer")
        if save_tokenizer and tokenizer is None:
            tokenizer = self.load_tokenizer(**(tokenizer_kwargs or {}))
        folder = Path(path).expanduser()
        wanted = dtype if model_dtype is None else model_dtype
        save(
            model,
            folder,
            dtype=wanted if isinstance(wanted, torch.dtype) else None,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
        )
        if algorithm_config is not None:
            write_model_card(
                folder,
                config=self.config,
                algorithm_config=as_plain(algorithm_config),
                description=description,
                with_base=base_model_in_modelcard,
            )
        if push_to_hub:
            upload.run(folder)


@dataclass(frozen=True)
class Upload:
    """What an upload to the hub is told.

    Attributes:
        repo_id: the repository; None: the folder's name.
        token: of the hub; None: the one that is logged in.
        private: whether a new repository is.
        commit_message: of the upload.
    """

    repo_id: str | None
    token: str | bool | None
    private: bool | None
    commit_message: str | None

    def check(self, *, push_to_hub: bool) -> None:
        """Refuse what would go into no upload.

        Raises:
            PoolError: something is said of an upload that is not asked for.
        """
        said = [one.name for one in fields(self) if getattr(self, one.name) is not None]
        if said and not push_to_hub:
            raise PoolError(f"{', '.join(said)}: nothing is uploaded; give push_to_hub=True, or leave it out")

    def run(self, folder: Path) -> None:
        """Upload a folder; the repository is made where there is none."""
        hub = import_package("huggingface_hub").HfApi(token=self.token)
        made = hub.create_repo(self.repo_id or folder.name, private=self.private, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message=self.commit_message)


def write_model_card(
    folder: Path,
    *,
    config: Mapping[str, Any],
    algorithm_config: Mapping[str, Any],
    description: str | None,
    with_base: bool,
) -> None:
    """Write `README.md`: what the model was made of and how, with the metadata that the hub reads.

    Args:
        folder: of the checkpoint.
        config: the pool's.
        algorithm_config: what made the model.
        description: the first paragraph.
        with_base: name the model that the others were trained from.
    """
    yaml = import_package("yaml")
    models = {name: _describe(entry) for name, entry in config["models"].items()}
    named = {name: path for name, path in models.items() if with_base or name != "_pretrained_"}
    paths = list(dict.fromkeys(path for name, path in named.items() if name == "_pretrained_" or not is_special(name)))
    head = {"library_name": "transformers", "tags": ["merge", "hooklens"], "base_model": paths}
    shown = {**config, "models": models}
    if not isinstance(shown.get("tokenizer"), str | dict | None):
        shown["tokenizer"] = _describe(shown["tokenizer"])
    dump = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    listed = "\n".join(f"- `{name}`: {path}" for name, path in named.items())
    text = (
        f"---\n{dump(head)}---\n\n# {folder.name}\n\n{description or 'Made by HookLens of the models below.'}\n\n"
        f"## Models\n\n{listed}\n\n## How it was made\n\n```yaml\n{dump(_as_text(algorithm_config))}```\n\n"
        f"## The pool\n\n```yaml\n{dump(_as_text(shown))}```\n"
    )
    try:
        with replace_file(folder / "README.md") as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PoolError(f"{folder / 'README.md'}: cannot be written ({error})") from error


def _describe(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping):
        path = next((entry[key] for key in (*SOURCES, "peft_model_path") if key in entry), entry.get("_target_"))
        return str(path)
    return f"a {type(entry).__name__} in memory"


def _as_text(value: Any) -> Any:
    """Plain values; whatever is none as a text."""
    if isinstance(value, Mapping):
        return {str(key): _as_text(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
