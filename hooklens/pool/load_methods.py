"""A pool's methods that load: one model by its name, all of them one after another, task vectors, the tokenizer."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hooklens.arguments import optional, read_flag, reads, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.pool.config.document import Document, as_plain
from hooklens.pool.config.settings import Settings, mapping_problems
from hooklens.pool.config.targets import join_problems
from hooklens.pool.copying import KeptModels
from hooklens.pool.errors import PoolError, unknown_model
from hooklens.pool.lazy import LazyWeights, lazily_of, open_lazily
from hooklens.pool.loading import Request, load, request
from hooklens.pool.task_vectors import subtract_models
from hooklens.pool.tokenizer import load_tokenizer
from hooklens.tokens import Tokenizer

PRETRAINED = "_pretrained_"
"""The name of the model that the others were trained from."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class LoadMethods:
    """Loading a pool's models, each when it is asked for."""

    _settings: Settings
    _kept: KeptModels

    if TYPE_CHECKING:

        @property
        def model_names(self) -> list[str]:
            """The names of the models, without special ones."""
            ...

        @property
        def all_model_names(self) -> list[str]:
            """The names of all models."""
            ...

        @property
        def has_pretrained(self) -> bool:
            """Whether there is a model that the others were trained from."""
            ...

        @property
        def enable_lazy_loading(self) -> bool:
            """Whether tensors are given in place of models."""
            ...

        @property
        def max_loaded(self) -> int:
            """How many models the pool keeps."""
            ...

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
        key = asked.key() if self.max_loaded else None
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
            raise unknown_model(PRETRAINED, self.all_model_names, more=more)
        return self.load_model(PRETRAINED, **overrides)

    def load_pretrained_or_first_model(self, **overrides: Any) -> Any:
        """Load `_pretrained_`, or without one the first model; see `load_model`.

        Raises:
            ModelNameError: there are no models.
        """
        name = next(iter([PRETRAINED] if self.has_pretrained else self.model_names), None)
        if name is None:
            raise unknown_model(PRETRAINED, self.all_model_names, more=" Nor is there another model")
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
