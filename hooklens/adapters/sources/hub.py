"""From a checkpoint's name to a folder on this machine."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.files.disk import DiskTensors, weight_file
from hooklens.adapters.sources.files import COMPANIONS
from hooklens.errors import CheckpointError
from hooklens.optional import import_package
from hooklens.progress import hub_bars

if TYPE_CHECKING:
    from hooklens.adapters.sources.repository import Repository


def find_local(source: "str | Path | Repository") -> Path | None:
    """The folder on this machine that a source names; None where it is a name on the hub.

    Raises:
        CheckpointError: it is a file, or a path where no folder is.
    """
    path = Path(str(source)).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; expected the folder that holds config.json and the weights")
    if isinstance(source, Path) or _looks_like_path(str(source)):
        raise CheckpointError(
            f"{path}: no such folder; expected a checkpoint folder or a hub name such as 'owner/name'"
        )
    return None


def _looks_like_path(source: str) -> bool:
    """Hub names are `name` or `owner/name`; whatever else has separators or dots in front is a path."""
    return source.startswith((".", "~", "/", os.sep)) or source.count("/") > 1 or "\\" in source


class HubFiles:
    """The files of a repository on the hub, downloaded into its cache as they are needed; never code.

    Args:
        name: `"owner/name"`.
        revision: branch, tag or commit.
        subfolder: folder of the repository that holds the checkpoint.
        variant: of several weights in one folder, which.
        token: None: the one that is logged in; False: none.
        cache_dir: where downloads are kept; None: the hub's own cache.
        local_files_only: take what has been downloaded before and touch no network.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        self._name, self._revision, self._variant = name, revision, variant
        self._subfolder = "" if subfolder is None else subfolder.strip("/")
        self._options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}

    @property
    def where(self) -> str:
        """The name, and the revision."""
        inside = f"/{self._subfolder}" if self._subfolder else ""
        return f"{self._name}{inside}" + (f" at revision {self._revision!r}" if self._revision else "")

    def config_folder(self) -> Path:
        """The folder of the cache, with `config.json`."""
        return self._fetch(["config.json"])

    def folder(self) -> Path:
        """The folder of the cache, with all but the weights."""
        return self._fetch(COMPANIONS)

    def names(self) -> Collection[str]:
        """The names of all files, asked for at the hub; where that cannot be, of those that are in the cache.

        Raises:
            CheckpointError: there is no such repository or revision, or it is not open to you.
        """
        errors = import_package("huggingface_hub.errors")
        token = self._options["token"]
        if self._options["local_files_only"]:
            return self._names_in_cache()
        with self._told():
            try:
                found = (
                    import_package("huggingface_hub")
                    .HfApi()
                    .list_repo_files(self._name, revision=self._revision, token=token)
                )
            except (errors.HfHubHTTPError, errors.HFValidationError):
                raise
            except Exception:
                # No network, whatever the error of its client: what has been downloaded before counts.
                return self._names_in_cache()
        return [name.removeprefix(self._prefix) for name in found if name.startswith(self._prefix)]

    def fetch(self, names: Collection[str]) -> Path:
        """The folder of the cache, with these files."""
        return self._fetch([escape(name) for name in names])

    def companions(self) -> Path:
        """The folder of the cache, with all but the weights."""
        return self.folder()

    def weights(self) -> TensorSource:
        """The tensors: of safetensors files, or of the PyTorch files where there are none.

        Raises:
            CheckpointError: the download failed, or they cannot be read.
        """
        return DiskTensors(self.download_weights(), variant=self._variant)

    def download_weights(self) -> Path:
        """The folder of the cache, with the weights."""
        for name in ("model.safetensors", "pytorch_model.bin"):
            whole, index = weight_file(name, self._variant), weight_file(f"{name}.index.json", self._variant)
            shards = "-*.".join(whole.rsplit(".", 1))
            folder = self._fetch([whole, shards, index])
            if (folder / whole).exists() or any(folder.glob(shards)):
                break
        return folder

    @property
    def _prefix(self) -> str:
        return f"{self._subfolder}/" if self._subfolder else ""

    def _names_in_cache(self) -> list[str]:
        folder = self._fetch(["config.json"], local_files_only=True)
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def _fetch(self, patterns: Collection[str], **options: Any) -> Path:
        hub = import_package("huggingface_hub")
        with self._told():
            folder = Path(
                hub.snapshot_download(
                    self._name,
                    revision=self._revision,
                    allow_patterns=[f"{self._prefix}{pattern}" for pattern in patterns],
                    **{**self._options, **options, **hub_bars()},
                )
            )
        return folder / self._subfolder if self._subfolder else folder

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the hub's client raises, as errors of this package."""
        errors = import_package("huggingface_hub.errors")
        at = f"{self._name!r}" + (f" at revision {self._revision!r}" if self._revision else "")
        try:
            yield
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
