"""From a checkpoint's name to a folder on this machine."""

import os
from pathlib import Path

from hooklens.adapters.folder import finish_replacement
from hooklens.errors import CheckpointError
from hooklens.optional import import_package

_CONFIG_AND_TOKENIZER = [
    "config.json",
    "generation_config.json",
    "hooklens.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def find_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint, downloaded first where `source` is a name on the hub.

    An existing folder is taken as it is, without any network call; a save into it that was interrupted when its files
    were being put in place is finished. From the hub come the config, the tokenizer and
    the safetensors files, or the PyTorch files where there are none; never code.

    Raises:
        CheckpointError: there is no such folder or repository, it is not open to you, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        finish_replacement(path)
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; expected the folder that holds config.json and the weights")
    if isinstance(source, Path) or _looks_like_path(source):
        raise CheckpointError(
            f"{path}: no such folder; expected a checkpoint folder or a hub name such as 'owner/name'"
        )
    return _download(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)


def _looks_like_path(source: str) -> bool:
    """Hub names are `name` or `owner/name`; whatever else has separators or dots in front is a path."""
    return source.startswith((".", "~", "/", os.sep)) or source.count("/") > 1 or "\\" in source


def _download(name: str, *, revision: str | None, cache_dir: str | Path | None, local_files_only: bool) -> Path:
    hub = import_package("huggingface_hub")
    errors = import_package("huggingface_hub.errors")

    def fetch(patterns: list[str]) -> Path:
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )

    at = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = fetch(_CONFIG_AND_TOKENIZER + _SAFETENSORS)
        if not any(folder.glob("model*.safetensors")):
            folder = fetch(_CONFIG_AND_TOKENIZER + _PICKLES)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at}: the repository is gated; accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: neither a local folder nor a repository on the hub (a private one needs `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: the repository has no such revision") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{at}: neither a local folder nor a possible hub name ({error})") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{at}: not a local folder, not downloaded before, and the hub was not asked or cannot be reached "
            f"({error}); check the network, HF_HUB_OFFLINE and local_files_only"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{at}: the download failed ({error}); check the network and try again") from error
    return folder
