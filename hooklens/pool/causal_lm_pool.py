"""The pool: models by name, each loaded when it is asked for."""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hooklens.arguments import optional, read_flag, read_int, read_path, read_text, reads, refusal, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names, warn_caller
from hooklens.optional import import_package
from hooklens.pool.config.document import Document, as_plain, read_yaml, write_yaml
from hooklens.pool.config.dtypes import read_pool_dtype
from hooklens.pool.config.settings import (
    SOURCES,
    Settings,
    copy_settings,
    entry_problems,
    is_special,
    list_objects,
    mapping_problems,
    read_document,
)
from hooklens.pool.config.targets import find_target, join_problems
from hooklens.pool.copying import KeptModels
from hooklens.pool.errors import PoolError, unknown_model
from hooklens.pool.lazy import LazyWeights, lazily_of, open_lazily
from hooklens.pool.loading import Request, load, request
from hooklens.pool.saving import Upload, save, write_model_card
from hooklens.pool.task_vectors import subtract_models
from hooklens.pool.tokenizer import load_tokenizer
from hooklens.tokens import Tokenizer, read_tokenizer

Pool = TypeVar("Pool", bound="CausalLMPool")

_PRETRAINED = "_pretrained_"
_MERGED = "_merged_"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class CausalLMPool:
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
        return _PRETRAINED in self._settings.models

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
        kind = CausalLMBackbonePool if isinstance(self, CausalLMBackbonePool) else CausalLMPool
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
        return f"{type(self).__name__}({', '.join(self.all_model_names)})"

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

    @reads(hooked=read_flag, lazy=optional(read_flag))
    def load_model(
        self, model_name_or_config: Any, *, hooked: bool = True, lazy: bool | None = None, **overrides: Any
    ) -> Any:
        """Load a model: each call gives one of its own, whatever was done with earlier ones.

        Args:
            model_name_or_config: a name of the pool; or else a path or the hub name of a checkpoint (`"owner/name"`),
                or a mapping of arguments, as in `models`.
            hooked: give a `HookedCausalLM`; else what `AutoModelForCausalLM.from_pretrained` gives.
            lazy: give the tensors by name, read when asked for (`LazyWeights`); those of the field, or with
                `hooked=False` those on disk. None: as the pool says (`enable_lazy_loading`).
            **overrides: arguments for this load alone: those of `HookedCausalLM.from_pretrained`, or of transformers
                where `hooked=False`. `torch_dtype` and `dtype` both say the dtype. None leaves out what transformers
                alone understands. A model in memory takes `dtype` and `device`.

        Returns:
            A `HookedCausalLM`, a transformers model, or `LazyWeights`.

        Raises:
            ModelNameError: no model has that name, and it is no path or hub name (also a `KeyError`).
            InputError: arguments that contradict each other, or have no counterpart; before anything is loaded.
            CheckpointError: see `HookedCausalLM.from_pretrained`.
        """
        asked = self._request(model_name_or_config, overrides, hooked=hooked)
        if self.enable_lazy_loading if lazy is None else lazy:
            return self._load_lazily(asked)
        return self._load(asked)

    def _request(self, given: Any, overrides: Mapping[str, Any], *, hooked: bool) -> Request:
        call = {name: as_plain(value) for name, value in overrides.items()}
        pool = self._settings.model_kwargs
        ask = partial(request, pool=pool, call=call, hooked=hooked)
        if isinstance(given, str) and given in self._settings.models:
            return ask(self._settings.models[given], what=f"models.{given}")
        if isinstance(given, str):
            return ask(self._path_of(given), what=given)
        if isinstance(given, Path):
            return ask(str(given), what=str(given))
        if isinstance(given, Mapping):
            entry = as_plain(given)
            problems = list(mapping_problems(entry, Document(None, "load_model"), ()))
            if problems:
                raise PoolError(join_problems(problems))
            return ask(entry, what="the mapping")
        raise refusal(
            given, "model_name_or_config", "a name of the pool, a path, or a mapping of arguments", InputError
        )

    def _path_of(self, text: str) -> str:
        """A text that is no name of the pool, as a path or hub name."""
        if "://" in text or text.startswith("bundled:") or _HUB_NAME.fullmatch(text):
            return text
        if Path(text).expanduser().exists() and text:
            return text
        raise unknown_model(text, self.all_model_names, more=" Nor is it a folder, or a hub name such as 'owner/name'")

    def _load(self, asked: Request) -> Any:
        fallback = partial(self._tokenizer_of_pool, asked.what)
        key = _key_of(asked) if self._max_loaded else None
        if key is None:
            return load(asked, fallback_tokenizer=fallback)
        return self._kept.get(key, partial(load, asked, fallback_tokenizer=fallback))

    def _load_lazily(self, asked: Request) -> LazyWeights:
        if isinstance(asked.entry, nn.Module) or asked.target.kind != "checkpoint":
            model = load(asked, fallback_tokenizer=lambda: None)
            if not isinstance(model, HookedCausalLM):
                raise InputError(f"{asked.what}: hooked=False gives the names on disk, and this model is in no file")
            return lazily_of(model)
        return open_lazily(asked)

    def _tokenizer_of_pool(self, what: str) -> Tokenizer | None:
        if self._settings.tokenizer is None:
            return None
        try:
            return self.load_tokenizer()
        except PoolError as error:
            raise PoolError(
                f"{what}: has no tokenizer, and the pool's fails: {error}. Give tokenizer= to the call, or none to the "
                "pool"
            ) from error

    def load_pretrained_model(self, **overrides: Any) -> Any:
        """Load `_pretrained_`; see `load_model`.

        Raises:
            ModelNameError: there is none.
        """
        if not self.has_pretrained:
            more = "; expected the model that the others were trained from under that name"
            raise unknown_model(_PRETRAINED, self.all_model_names, more=more)
        return self.load_model(_PRETRAINED, **overrides)

    def load_pretrained_or_first_model(self, **overrides: Any) -> Any:
        """Load `_pretrained_`, or without one the first model; see `load_model`.

        Raises:
            ModelNameError: there are no models.
        """
        name = next(iter([_PRETRAINED] if self.has_pretrained else self.model_names), None)
        if name is None:
            raise unknown_model(_PRETRAINED, self.all_model_names, more=" Nor is there another model")
        return self.load_model(name, **overrides)

    def load_pretrained_model_and_task_vectors(self, **overrides: Any) -> tuple[Any, list[dict[str, Tensor]]]:
        """The model that the others were trained from, and what training changed in each, `theta_i - theta_base`.

        One of the others is in memory at a time.

        Returns:
            The model; and in the order of `model_names` differences by name: the field's names, or with `hooked=False`
            those of transformers' `state_dict()`. A tied unembedding is a view of the embedding's difference.

        Raises:
            ModelNameError: there is no `_pretrained_`.
            PoolError: a model has other weights, listed by name and shape.
        """
        base = self.load_pretrained_model(**overrides)
        return base, [subtract_models(self.load_model(name, **overrides), base, name=name) for name in self.model_names]

    def models(self, **overrides: Any) -> Iterator[Any]:
        """The models without special ones, each loaded when its turn comes; see `load_model`.

        The pool lets go of a model when it gives it; one that the caller's variable still holds is in memory beside the
        next, until then: `del model` at the end of a loop's body has one in memory at a time.
        """
        for name in self.model_names:
            yield self.load_model(name, **overrides)

    def named_models(self, **overrides: Any) -> Iterator[tuple[str, Any]]:
        """Names and models; see `models`."""
        for name in self.model_names:
            yield name, self.load_model(name, **overrides)

    def load_tokenizer(self, **overrides: Any) -> Tokenizer:
        """The pool's tokenizer.

        Args:
            **overrides: arguments for `AutoTokenizer.from_pretrained`.

        Raises:
            PoolError: the pool has none, or it cannot be made.
        """
        if self._settings.tokenizer is None:
            raise PoolError("the pool has no tokenizer; give it one (tokenizer=), a path or hub name")
        return load_tokenizer(self._settings.tokenizer, overrides)

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


ModelPool = CausalLMPool
"""The same class under the name of what it is."""


class CausalLMBackbonePool(CausalLMPool):
    """A pool whose models are only their blocks: an `nn.ModuleList`, without embedding, final norm and unembedding."""

    @reads(hooked=read_flag, lazy=optional(read_flag))
    def load_model(
        self, model_name_or_config: Any, *, hooked: bool = True, lazy: bool | None = None, **overrides: Any
    ) -> nn.ModuleList:
        """Load the blocks of a model, whatever its family.

        Args:
            model_name_or_config: see `CausalLMPool.load_model`.
            hooked: give the blocks of a `HookedCausalLM`, `model.blocks`; else those of transformers' model.
            lazy: blocks are modules and not read lazily: True is refused, and `enable_lazy_loading` of the pool gives a
                warning.
            **overrides: see there.

        Raises:
            HookLensError: see there.
        """
        if lazy:
            raise InputError("lazy=True: blocks are modules, which hold their weights; leave it out")
        if self.enable_lazy_loading and lazy is None:
            warn_caller("enable_lazy_loading: blocks are modules, which hold their weights; they are loaded with them")
        model = self._load(self._request(model_name_or_config, overrides, hooked=hooked))
        if isinstance(model, HookedCausalLM):
            return model.blocks
        return _find_blocks(model)


def _class_named(target: str | None) -> type[CausalLMPool] | None:
    """The class of pool that a configuration names."""
    if target is None:
        return None
    is_backbone = find_target(target, place="_target_").kind == "backbone_pool"
    return CausalLMBackbonePool if is_backbone else CausalLMPool


def _find_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformers model: of the lists of modules the one with an entry for each layer."""
    config: Any = model.config
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    found = {
        name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == n_layers
    }
    outermost = {name: one for name, one in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    if len(outermost) != 1:
        raise PoolError(
            f"{type(model).__name__} has {len(outermost)} lists of {n_layers} modules: {join_names(list(outermost))}; "
            "expected one, its blocks. hooked=True gives the blocks of any family"
        )
    return next(iter(outermost.values()))


def _key_of(asked: Request) -> str | None:
    """What tells one model that was asked for from another; None: nothing does, and it is loaded anew."""
    if isinstance(asked.entry, nn.Module) or asked.target.kind == "registered":
        return None
    if not _is_simple(asked.arguments):
        return None
    said = json.dumps(asked.arguments, default=str, sort_keys=True)
    texts = [value for value in asked.arguments.values() if isinstance(value, str)]
    return f"{asked.target.name} {asked.hooked} {said} {[_stamp(text) for text in texts]}"


def _is_simple(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_simple, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | bool | int | float | torch.dtype | torch.device)


def _stamp(path: str) -> list[tuple[str, int, int]]:
    """The files in a folder with their times and sizes, so that a folder that was written anew is loaded anew."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return []
    return sorted((entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(folder))
