"""The pool: models by name, each loaded when it is asked for."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from hooklens.arguments import optional, read_flag, read_int, read_path, read_text, reads, refusal, require
from hooklens.display import Displayed, Listing, Summary, one_line
from hooklens.errors import InputError, join_names
from hooklens.optional import import_package
from hooklens.pool.comparing.compare import compare_models, order_names
from hooklens.pool.comparing.result import ModelComparison
from hooklens.pool.config.document import Document, as_plain, read_yaml, write_yaml
from hooklens.pool.config.settings import (
    SOURCES,
    Settings,
    copy_settings,
    entry_problems,
    is_special,
    list_objects,
    read_document,
)
from hooklens.pool.config.targets import find_target, join_problems
from hooklens.pool.copying import KeptModels
from hooklens.pool.errors import PoolError, unknown_model
from hooklens.pool.load_methods import PRETRAINED, LoadMethods
from hooklens.pool.saving import SaveMethods
from hooklens.tokens import Prompt

Pool = TypeVar("Pool", bound="CausalLMPool")

_MERGED = "_merged_"
_BY_TARGET: dict[str, "type[CausalLMPool]"] = {}
"""The classes of pools by the kind of `_target_` that names them."""


class CausalLMPool(Displayed, LoadMethods, SaveMethods):
    """Models by name: a base, its fine-tunes, merges and adapters, each loaded when it is asked for.

    The keys are FusionBench's, so its YAML files load unchanged (`from_yaml`). Names that start and end with `_` are
    special, and left out of `model_names`, `len` and iteration: `_pretrained_` is what the others were trained from.

    Args:
        models: by name, of each a path or hub name, a mapping of arguments (`pretrained_model_name_or_path`, and
            whatever else its loader takes; `_target_` names another loader, see `register_target`), or a model in
            memory. Models of a list are called "0", "1" and so on. None of them is loaded, or changed, here.
        tokenizer: of the pool: a path or hub name, a mapping of arguments, or a tokenizer. Models come with the
            tokenizers of their checkpoints, so that a pool needs none: it goes to models that have none, and is what
            `load_tokenizer` gives.
        model_kwargs: arguments of every load from a checkpoint, such as `{"torch_dtype": "bfloat16"}`. They take the
            place of what a model's own mapping says, as in FusionBench, and the arguments of a call take theirs.
        enable_lazy_loading: `load_model` gives the tensors of a model by name, read when they are asked for
            (`LazyWeights`), in place of a model.
        train_datasets: kept and written back by `to_yaml`; nothing is loaded of it.
        val_datasets: likewise.
        test_datasets: likewise.
        max_loaded: how many of the models that were loaded last the pool keeps, to give the next caller a copy that
            shares their memory until it is written to (PyTorch's copy-on-write). With 2 and more, weights that are
            equal in several of them are in memory once. Kept weights are in memory, also of models whose weights would
            otherwise lie in their files until they are read, and stay there when all others have let go of them. 0:
            none, so that the pool holds no memory.
        _recursive_: Hydra's; kept, and does nothing.
        _usage_: a note; kept.
        _version_: a note; kept.

    Raises:
        PoolError: models, tokenizer or arguments that cannot be; all that is wrong is listed.

    Example:
        >>> pool = CausalLMPool({"_pretrained_": "bundled:tiny-llama", "other": "bundled:tiny-falcon"})
        >>> pool.model_names
        ['other']
        >>> pool.load_model("other", dtype="float32").cfg.n_layers
        4
    """

    def __init_subclass__(cls, *, target: str | None = None, **more: Any) -> None:
        """A class of pools; with a kind of target the one that a configuration asks for by it."""
        super().__init_subclass__(**more)
        if target is not None:
            _BY_TARGET[target] = cls

    @reads(
        PoolError,
        enable_lazy_loading=read_flag,
        max_loaded=partial(read_int, least=0),
        _recursive_=optional(read_flag),
        _usage_=optional(read_text),
        _version_=optional(read_text),
    )
    def __init__(
        self,
        models: Any,
        *,
        tokenizer: Any = None,
        model_kwargs: Any = None,
        enable_lazy_loading: bool = False,
        train_datasets: Any = None,
        val_datasets: Any = None,
        test_datasets: Any = None,
        max_loaded: int = 0,
        _recursive_: bool | None = None,
        _usage_: str | None = None,
        _version_: str | None = None,
    ) -> None:
        given = {
            "models": models,
            "tokenizer": tokenizer,
            "model_kwargs": model_kwargs,
            "enable_lazy_loading": enable_lazy_loading,
            "train_datasets": train_datasets,
            "val_datasets": val_datasets,
            "test_datasets": test_datasets,
            "_recursive_": _recursive_,
            "_usage_": _usage_,
            "_version_": _version_,
        }
        content = {key: as_plain(value) for key, value in given.items() if value is not None or key == "models"}
        settings = read_document(Document(content, type(self).__name__))
        self._begin(settings, max_loaded=max_loaded)

    def _begin(self, settings: Settings, *, max_loaded: int) -> None:
        self._settings = settings
        self._max_loaded = max_loaded
        self._kept = KeptModels(max_loaded)

    @classmethod
    @reads(PoolError, path=read_path, max_loaded=partial(read_int, least=0))
    def from_yaml(cls: type[Pool], path: str | Path, *, resolvers: Collection[str] = (), max_loaded: int = 0) -> Pool:
        """A pool from a YAML file, FusionBench's included; no code that a file names is run.

        References (`${.models._pretrained_}`) need the package OmegaConf. Keys that only references need may stand
        beside the pool's.

        Args:
            path: the file.
            resolvers: functions of OmegaConf that the file may call, as `"oc.env"`, which reads the environment.
            max_loaded: see the class.

        Raises:
            PoolError: the file cannot be read, or holds what cannot be; each problem with its key and line.
            MissingDependencyError: there are references, and OmegaConf is not installed.
        """
        return cls._from_document(read_yaml(Path(path)), resolvers, max_loaded)

    @classmethod
    @reads(
        PoolError,
        config=partial(require, kind=Mapping, expected="a mapping with the key 'models' (a file goes to from_yaml)"),
        max_loaded=partial(read_int, least=0),
    )
    def from_config(
        cls: type[Pool], config: Mapping[str, Any], *, resolvers: Collection[str] = (), max_loaded: int = 0
    ) -> Pool:
        """A pool from what a YAML file would hold, as a dict or OmegaConf's `DictConfig`.

        Args:
            config: the keys of the class, and `_target_`; models and tokenizer also as objects. It is not changed.
            resolvers: see `from_yaml`.
            max_loaded: see the class.

        Raises:
            PoolError: it holds what cannot be; all problems are listed.
            MissingDependencyError: there are references, and OmegaConf is not installed.
        """
        raw: Any = config
        if type(config).__module__.startswith("omegaconf"):
            raw = import_package("omegaconf").OmegaConf.to_container(config, resolve=False)
        return cls._from_document(Document(as_plain(raw), "config"), resolvers, max_loaded)

    @classmethod
    def _from_document(cls: type[Pool], document: Document, resolvers: Collection[str], max_loaded: int) -> Pool:
        settings = read_document(document, resolvers=resolvers)
        named = _class_named(settings.target)
        kind: Any = named if named is not None and issubclass(named, cls) else cls
        pool: Pool = kind.__new__(kind)
        pool._begin(settings, max_loaded=max_loaded)
        return pool

    @property
    def model_names(self) -> list[str]:
        """The names of the models, without special ones."""
        return [name for name in self._settings.models if not is_special(name)]

    @property
    def all_model_names(self) -> list[str]:
        """The names of all models, special ones included."""
        return list(self._settings.models)

    @property
    def has_pretrained(self) -> bool:
        """Whether there is a model that the others were trained from, `_pretrained_`."""
        return PRETRAINED in self._settings.models

    @property
    def has_merged(self) -> bool:
        """Whether there is a merged model, `_merged_`."""
        return _MERGED in self._settings.models

    @property
    def enable_lazy_loading(self) -> bool:
        """Whether `load_model` gives tensors by name in place of a model."""
        return self._settings.enable_lazy_loading

    @property
    def max_loaded(self) -> int:
        """How many models the pool keeps."""
        return self._max_loaded

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """A copy of the arguments of every load."""
        copied: dict[str, Any] = copy_settings(self._settings).model_kwargs
        return copied

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` makes this pool of: a copy, references resolved, dtypes by name, models as they are."""
        kind = next(one for one in type(self).__mro__ if one in _BY_TARGET.values())
        target = self._settings.target
        name = target if _class_named(target) is kind else f"hooklens.pool.{kind.__name__}"
        return {"_target_": name, **copy_settings(self._settings).as_config()}

    def __len__(self) -> int:
        return len(self.model_names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._settings.models

    def __iter__(self) -> Iterator[str]:
        return iter(self.model_names)

    def __repr__(self) -> str:
        return one_line(f"{type(self).__name__}({', '.join(self.all_model_names)})")

    def _summary(self) -> Summary:
        settings = self._settings
        return Summary(
            title=f"{type(self).__name__} of {len(settings.models):,} models",
            facts={
                "tokenizer": None if settings.tokenizer is None else _tell_source(settings.tokenizer),
                "arguments of every load": ", ".join(settings.model_kwargs) or None,
                "loading": "tensors by name, read when asked for" if settings.enable_lazy_loading else None,
            },
            listing=Listing(
                columns=("model", "from"),
                rows=[(name, _tell_source(entry)) for name, entry in settings.models.items()],
                what="models",
                more="pool.all_model_names has all",
            ),
        )

    @reads(PoolError, path=read_path)
    def to_yaml(self, path: str | Path) -> None:
        """Write the pool's configuration, references resolved, to a YAML file that `from_yaml` reads.

        Raises:
            PoolError: models in memory or other objects, which no file can name; all are listed. Or the file cannot be
                written.
        """
        config = self.config
        objects = list(list_objects(config))
        if objects:
            raise PoolError(
                f"{path}: a YAML file cannot hold {', '.join(objects)}; save models (pool.save_model) and give their "
                "folders"
            )
        write_yaml(Path(path), config)

    @reads(PoolError, model_name=read_text)
    def add_model(self, model_name: str, model_or_config: Any) -> None:
        """Add a model: a path or hub name, a mapping of arguments, or a model in memory.

        Raises:
            PoolError: the name is taken, or the model cannot be.
        """
        entry = as_plain(model_or_config)
        problems = list(entry_problems(model_name, entry, Document(None, "add_model")))
        if problems:
            raise PoolError(join_problems(problems))
        if model_name in self._settings.models:
            names = join_names(self.all_model_names)
            raise PoolError(f"the pool has a model {model_name!r} already; choose another name than {names}")
        self._settings.models[model_name] = entry

    def get_model_path(self, model_name: str) -> str:
        """The path or hub name of a model.

        Raises:
            ModelNameError: no model has that name (also a `KeyError`).
            PoolError: the model has no path: it is in memory, or made by a function.
        """
        entry = self._entry(model_name)
        if isinstance(entry, str):
            return entry
        path = next((entry[key] for key in SOURCES if key in entry), None) if isinstance(entry, Mapping) else None
        if not isinstance(path, str):
            what = "is in memory" if isinstance(entry, nn.Module) else f"is made by {entry['_target_']!r}"
            raise PoolError(f"models.{model_name} {what}, and has no path of its own; expected a model of a checkpoint")
        return path

    def _entry(self, name: Any) -> Any:
        if not isinstance(name, str):
            raise refusal(name, "model_name", "the name of a model of the pool", InputError)
        if name not in self._settings.models:
            raise unknown_model(name, self.all_model_names)
        return self._settings.models[name]

    def compare(
        self,
        prompts: Prompt,
        names: Sequence[str] | None = None,
        *,
        base: str | None = None,
        load_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ModelComparison:
        """Compare the pool's models layer by layer, loading one after another; see `hooklens.pool.compare_models`.

        Args:
            prompts: text, a list of texts, or token ids.
            names: which models, special names included; None: all of them but `_merged_`, `_pretrained_` first.
            base: the one that all others are compared with; None: `_pretrained_` where it is among them, else the
                first.
            load_kwargs: arguments of each load, as those of `load_model`.
            **options: other arguments of `compare_models` (`site`, `measures`, `pos`, `every_pair`, `weights`, ...).

        Returns:
            The distances as tables, with `plot()` and `plot_weights()`.

        Raises:
            ModelNameError: the pool has no model of a name (also a `KeyError`).
            InputError: see `compare_models`.

        Example:
            >>> pool.compare(["The capital of France is"], site="resid_post").plot()
        """
        ordered = order_names(names, base, self.all_model_names)
        for name in ordered:
            self._entry(name)
        given = dict(load_kwargs or {})
        loads = ((name, self.load_model(name, **{"lazy": False, **given})) for name in ordered)
        return compare_models(loads, prompts, base=base, **options)


ModelPool = CausalLMPool
"""The same class under the name of what it is."""

_BY_TARGET["pool"] = CausalLMPool


def _class_named(target: str | None) -> type[CausalLMPool] | None:
    """The class of pool that a configuration names."""
    return None if target is None else _BY_TARGET.get(find_target(target, place="_target_").kind, CausalLMPool)


def _tell_source(entry: object) -> str:
    """Where a model comes from; of arguments the path alone, since others may be secrets."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping):
        named = next((entry[key] for key in SOURCES if key in entry), None)
        return f"{named}, with arguments" if isinstance(named, str) else "arguments"
    return f"a {type(entry).__name__} in memory"
