"""Reading recorded activations: tokens by number, sites as one long table, batches in any order, statistics."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_seed
from hooklens.datasets.folder import hash_file, open_folder
from hooklens.datasets.hugging_face import make_view
from hooklens.datasets.manifest import COLUMNS, Manifest, Shard
from hooklens.datasets.shuffling import ShuffledBatches
from hooklens.datasets.statistics import SiteStatistics, StatisticsSum
from hooklens.display import Displayed, Listing, Summary, format_bytes, format_shape, merge_layers
from hooklens.errors import CheckpointError, HookNameError, suggest_names
from hooklens.files import read_safetensors
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.optional import import_package

if TYPE_CHECKING:
    import datasets
    import pandas
    from torch.utils.data import DataLoader

_ROWS_AT_ONCE = 2**16


class ActivationDataset(Displayed):
    """Activations that `record` has written; neither the model nor the corpus is needed.

    Files are mapped into memory, so that only what is looked at is read. What a recording that still runs, or was
    interrupted, has written so far can be read, too.

    Args:
        folder: where it was recorded, a path or a URL. Files at a URL are downloaded when they are first looked at.
        storage_options: of a URL, what its file system is made with; see fsspec.
        cache_dir: where files of a URL are kept on this machine, to be found there the next time; several data sets
            may share it. None: the last few are kept until the object is gone.

    Attributes:
        folder: the path or URL.
        manifest: what it holds, and how it was recorded.

    Raises:
        CheckpointError: it holds no activation data set, it cannot be reached, or a file is missing or damaged.
        MissingDependencyError: the package of a URL's file system is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self._folder = open_folder(
            folder, what="ActivationDataset: folder", storage_options=storage_options, cache_dir=cache_dir
        )
        self.folder = str(self._folder)
        self.manifest = Manifest.read(self._folder)
        there = self._list()
        lacking = [shard.name for shard in self.manifest.shards if shard.name not in there]
        if lacking:
            raise CheckpointError(f"{self.folder} lacks {lacking[:10]}, which its manifest lists")
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.manifest.shards)]).tolist()
        self._open: dict[int, Mapping[str, Tensor]] = {}

    def _list(self) -> set[str]:
        try:
            return set(self._folder.names())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder}: {error}") from error

    def __len__(self) -> int:
        """Tokens that were kept."""
        return self.manifest.n_tokens

    @property
    def sites(self) -> list[str]:
        """The hook points that were recorded."""
        return list(self.manifest.sites)

    @property
    def is_complete(self) -> bool:
        """Whether the corpus was read to its end; if not, the same call of `record` goes on."""
        return self.manifest.complete

    @property
    def nbytes(self) -> int:
        """Bytes of all activations."""
        per_token = sum(int(np.prod(shape)) for shape in self.manifest.sites.values())
        return len(self) * per_token * self.manifest.torch_dtype.itemsize

    def _summary(self) -> Summary:
        state = "" if self.is_complete else ", not complete"
        kinds = merge_layers((name, format_shape(shape)) for name, shape in self.manifest.sites.items())
        return Summary(
            title=(
                f"ActivationDataset({len(self):,} tokens, {len(self.sites)} sites, {format_bytes(self.nbytes)}, "
                f"{self.manifest.dtype}{state})"
            ),
            facts={"folder": self.folder, "files": f"{len(self.manifest.shards):,}"},
            listing=Listing(
                columns=("site", "shape of a token's values"),
                rows=[(name, shape) for name, shape, _ in kinds],
                what="kinds of sites",
                more="dataset.sites has all",
            ),
        )

    def __getitem__(self, index: Choice) -> dict[str, Tensor]:
        """What some tokens have at every site, by hook name: `[...]` for one token, `[token ...]` for several.

        Raises:
            InputError: tokens that are not there.
        """
        return {name: self.site(name)[index] for name in self.sites}

    def site(self, name: str) -> "SiteValues":
        """The activations of one hook point, `[token ...]`.

        Raises:
            HookNameError: it was not recorded.
        """
        if name not in self.manifest.sites:
            raise HookNameError(f"{name!r} was not recorded.{suggest_names(str(name), self.sites)}")
        return SiteValues(self, name)

    def tokens(self, index: Choice = None) -> Int[Tensor, "..."]:
        """The ids of some tokens, or of all."""
        return SiteValues(self, "tokens")[index].long()

    def documents(self, index: Choice = None) -> Int[Tensor, "..."]:
        """The documents that some tokens are of, counted in the corpus (those without tokens are not)."""
        return SiteValues(self, "document")[index]

    def positions(self, index: Choice = None) -> Int[Tensor, "..."]:
        """The positions of some tokens in their documents."""
        return SiteValues(self, "position")[index].long()

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per kept token: token, document, position."""
        columns = {"token": self.tokens(), "document": self.documents(), "position": self.positions()}
        table: pandas.DataFrame = import_package("pandas").DataFrame({k: v.numpy() for k, v in columns.items()})
        return table

    def to_hf(self, sites: Sequence[str] | None = None) -> "datasets.Dataset":
        """A view as a data set of Hugging Face's `datasets`, a row for each token.

        Columns are `index`, `token`, `document` and `position`; the activations of the rows that are looked at are
        read from the files then. Filtering, sorting, shuffling and splitting move the columns alone.

        Args:
            sites: hook points; None: all.

        Raises:
            HookNameError: a site that was not recorded.
            MissingDependencyError: `datasets` is not installed.
        """
        chosen = self.sites if sites is None else [self.site(name).name for name in sites]
        view: datasets.Dataset = make_view(self, chosen)
        return view

    def loader(
        self,
        batch_size: int,
        *,
        sites: Sequence[str] | None = None,
        shuffle: bool = True,
        buffer: int = 2**17,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 0,
    ) -> "DataLoader[dict[str, Tensor]]":
        """Batches for training, as a torch `DataLoader`, each a mapping from hook name to `[token ...]`.

        Shards come in random order, and tokens are drawn from a buffer that is filled again as it empties, so that a
        batch mixes tokens of several documents and memory does not grow with the data set. Each time it is iterated
        over the order is another one, which `seed` and the number of the epoch decide.

        Args:
            batch_size: tokens of a batch.
            sites: hook points; None: all.
            shuffle: mix; False: in the order of the corpus.
            buffer: tokens that are mixed at a time.
            seed: of the order.
            drop_last: leave the last batch out where it is smaller; of several workers the last one of each.
            workers: processes that read; each reads shards of its own, and mixes these.

        Raises:
            HookNameError: a site that was not recorded.
            InputError: sizes that are none.
        """
        chosen = self.sites if sites is None else [self.site(name).name for name in sites]
        batches = ShuffledBatches(
            self,
            chosen,
            batch_size=read_int(batch_size, what="loader: batch_size", least=1),
            buffer=read_int(buffer, what="loader: buffer", least=1) if shuffle else None,
            seed=read_seed(seed, what="loader: seed"),
            drop_last=drop_last,
        )
        return torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            num_workers=read_int(workers, what="loader: workers", least=0),
            # Seeds the workers, which are made anew for every epoch and cannot count them.
            generator=torch.Generator().manual_seed(batches.seed),
        )

    def statistics(self, name: str, *, covariance: bool = True) -> SiteStatistics:
        """Mean, norms and covariance of a site over all tokens, in float64, read part by part.

        Args:
            name: the hook point.
            covariance: also the covariance, `[width width]` of the flattened vectors.

        Raises:
            HookNameError: it was not recorded.
            InputError: there are no tokens.
        """
        total = StatisticsSum(covariance=covariance)
        for part in self.site(name).parts():
            total.add(part.flatten(1))
        return total.finish(self.manifest.sites[name])

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            CheckpointError: some are damaged; all are named.
        """
        damaged = [shard.name for shard in self.manifest.shards if hash_file(self._fetch(shard)) != shard.sha256]
        if damaged:
            raise CheckpointError(f"{self.folder}: {damaged[:10]} are not what was written; record them anew")

    def shard(self, number: int) -> Mapping[str, Tensor]:
        """The tensors of one file by name, mapped into memory.

        Raises:
            CheckpointError: it is damaged.
        """
        if number not in self._open:
            self._open[number] = self._map(self.manifest.shards[number])
        return self._open[number]

    def _fetch(self, shard: Shard) -> Path:
        try:
            return self._folder.fetch(shard.name, shard.sha256)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder}/{shard.name}: {error}") from error

    def _map(self, shard: Shard) -> Mapping[str, Tensor]:
        path = self._fetch(shard)
        try:
            found, _ = read_safetensors(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        names = [*self.sites, *COLUMNS]
        if lacking := [name for name in names if name not in found]:
            raise CheckpointError(f"{path} is damaged: it lacks {lacking[:5]}")
        wrong = [name for name in names if len(found[name]) != shard.tokens]
        if wrong:
            raise CheckpointError(f"{path} is damaged: {wrong[:5]} have another number of tokens than {shard.tokens}")
        return found

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        return list(zip(self._starts[:-1], self._starts[1:], strict=True))

    # Open files do not travel to other processes.
    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


class SiteValues:
    """What one hook point has for all tokens of a data set, `[token ...]`, read where it is looked at.

    Attributes:
        name: the hook point.
    """

    def __init__(self, dataset: ActivationDataset, name: str) -> None:
        self._dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def documents(self) -> Int[Tensor, " token"]:
        """The document of each token."""
        return self._dataset.documents()

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens, and the axes of one token's activation."""
        return (len(self), *self._dataset.manifest.sites.get(self.name, ()))

    def __repr__(self) -> str:
        return f"SiteValues({self.name!r}, {list(self.shape)}, {self._dataset.manifest.dtype})"

    def __getitem__(self, index: Choice) -> Tensor:
        """Some tokens' values, a tensor in memory; of a slice within one file a view of the mapped file.

        Raises:
            InputError: tokens that are not there.
        """
        read = read_choice(index, what=f"{self.name}: index", allow_doubles=True)
        if isinstance(read, int):
            [number] = resolve_choice(read, len(self), what=f"{self.name}: index", noun="tokens")
            shard, place = self._find(number)
            return self._dataset.shard(shard)[self.name][place]
        if read is None or isinstance(read, slice):
            return self._slice(range(len(self))[slice(None) if read is None else read])
        numbers = resolve_choice(read, len(self), what=f"{self.name}: index", noun="tokens", allow_doubles=True)
        found = [self._find(number) for number in numbers]
        out = self._empty(len(numbers))
        of_shard = np.array([shard for shard, _ in found])
        places = torch.tensor([place for _, place in found])
        for shard in sorted(set(of_shard.tolist())):
            mine = torch.from_numpy(np.flatnonzero(of_shard == shard))
            out[mine] = self._dataset.shard(shard)[self.name][places[mine]]
        return out

    def parts(self, size: int = _ROWS_AT_ONCE) -> Iterator[Float[Tensor, "token ..."]]:
        """All tokens in order, part by part, each of at most `size`."""
        for number in range(len(self._dataset.manifest.shards)):
            values = self._dataset.shard(number)[self.name]
            for first in range(0, len(values), size):
                yield values[first : first + size]

    def _slice(self, numbers: range) -> Tensor:
        if numbers.step != 1:
            return self[list(numbers)] if len(numbers) else self._empty(0)
        pieces = []
        for shard, (start, stop) in enumerate(self._dataset._bounds):
            low, high = max(start, numbers.start), min(stop, numbers.stop)
            if low < high:
                pieces.append(self._dataset.shard(shard)[self.name][low - start : high - start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else self._empty(0)

    def _empty(self, n: int) -> Tensor:
        shape = self._dataset.manifest.sites.get(self.name, ())
        dtype = {"tokens": torch.int, "position": torch.int, "document": torch.long}.get(
            self.name, self._dataset.manifest.torch_dtype
        )
        return torch.empty(n, *shape, dtype=dtype)

    def _find(self, number: int) -> tuple[int, int]:
        """The shard of a token, and its place there."""
        shard = int(np.searchsorted(self._dataset._starts, number, side="right")) - 1
        return shard, number - self._dataset._starts[shard]
