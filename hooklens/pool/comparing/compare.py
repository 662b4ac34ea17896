r"""Comparing models: a base and its fine-tunes, checkpoints of one training run, merges and what went into them.

**Method.** All models read the same tokens. At each hook point the activations of two models, `x_t` of the first and
`y_t` of the second for each token `t`, are compared by

    cosine         mean over t of <x_t, y_t> / (|x_t| |y_t|)
    relative_norm  mean over t of |y_t - x_t| / |x_t|
    kl             mean over t of KL(p_t || q_t) in nats, where p_t and q_t are what each model's own final norm and
                   unembedding predict from x_t and y_t (the logit lens of nostalgebraist 2020)
    cka            linear centred kernel alignment (Kornblith et al. 2019, "Similarity of Neural Network Representations
                   Revisited"), HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), with the unbiased estimator of HSIC (Song et
                   al. 2012, "Feature Selection via Dependence Maximization"; Nguyen et al. 2021, "Do Wide and Deep
                   Networks Learn the Same Things?")
    biased_cka     the same as first published, ||X^T Y||^2 / (||X^T X|| ||Y^T Y||) with centred X and Y

and weights by the norm of their difference over that of the first, and by the cosine between the flattened weights.

**How to read it.** `cosine` and `relative_norm` depend on the basis: they ask whether the models say the same in the
same directions, which fine-tunes of one base mostly do. `cka` does not change with a rotation or a common scale of one
model's space, so it also compares models that were trained apart, of any width; with fewer tokens than dimensions the
biased one is near 1 for anything, which is why `cka` is debiased. `kl` counts only what reaches the predictions. First
tokens often have activations a thousand times as large as others and can decide all but `kl`: `pos=slice(1, None)`
leaves them out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from hooklens.arguments import (
    optional,
    read_dtype,
    read_flag,
    read_int,
    read_one_of,
    read_text,
    reads,
    refusal,
)
from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError, TransformError
from hooklens.hooks.choice import Choice, Index, read_choice
from hooklens.optional import import_package
from hooklens.pool.comparing.activations import Trace, are_streams, check_sites, find_sites, trace_model
from hooklens.pool.comparing.measures import Measure, compare_vectors
from hooklens.pool.comparing.prompts import ComparedPrompts
from hooklens.pool.comparing.result import ModelComparison
from hooklens.pool.comparing.weights import WeightSums, compare_weights, sum_by_layer
from hooklens.progress import progress_bar
from hooklens.tokens import Prompt
from hooklens.weights.processing import check_transforms_match

if TYPE_CHECKING:
    import pandas

Models = Mapping[str, HookedCausalLM] | Iterable[tuple[str, HookedCausalLM]]

_USUAL: tuple[Measure, ...] = ("cosine", "relative_norm", "cka")


def _read_measures(given: object, *, what: str, error: type[HookLensError] = InputError) -> tuple[Measure, ...]:
    listed = (given,) if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not listed:
        raise refusal(given, what, f"a list of {', '.join(map(repr, get_args(Measure)))}", error)
    return tuple(dict.fromkeys(read_one_of(one, what=what, options=get_args(Measure), error=error) for one in listed))


@reads(
    base=optional(read_text), every_pair=read_flag, site=read_text, measures=optional(_read_measures), pos=read_choice,
    weights=read_flag, batch_size=partial(read_int, least=1), dtype=optional(read_dtype), progress=read_flag,
)  # fmt: skip
@torch.no_grad()
def compare_models(
    models: Models,
    prompts: Prompt,
    *,
    base: str | None = None,
    every_pair: bool = False,
    site: str = "resid_post",
    measures: Measure | Sequence[Measure] | None = None,
    pos: Choice = None,
    weights: bool = True,
    batch_size: int = 32,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ModelComparison:
    """Compare models layer by layer: their activations on some prompts, and their weights.

    Models are taken one after another. An iterable that loads each when it is asked for has one in memory at a time
    with `weights=False`, and else the base beside it. Of a run `tokens x width` numbers are kept for each hook point,
    on the CPU: those of the base and of the model at hand (with `every_pair` of all models, and with `weights` all
    models, too), and for `"kl"` the base's unembedding. All else is summed up and let go of, so the numbers do not
    depend on `batch_size`, up to rounding.

    Args:
        models: the models by name; or pairs of a name and a model, which may be loaded one by one.
        prompts: text, a list of texts, or token ids. Padding is not compared.
        base: the model that all others are compared with, the `first` of each pair; None: the first one.
        every_pair: compare each model with all before it.
        site: the hook points, one for each layer (`"resid_post"`, `"mlp_out"`, `"z"`, a glob) or a single one.
            Vectors of heads count as one vector.
        measures: what to measure, see the module; None: all but `"biased_cka"`, and `"kl"` where the site is the
            residual stream.
        pos: positions over each prompt's own tokens; None: all.
        weights: compare the weights, too.
        batch_size: prompts run at once.
        attention_mask: real tokens (1) and padding (0), for padded ids.
        dtype: what to keep activations in; None: their own.
        progress: show a progress bar.

    Returns:
        The distances. Those that two models' sizes do not allow are NaN: `cosine` and `relative_norm` for other widths,
        `kl` for other numbers of outputs, a weight's for another shape or where one model has none.

    Raises:
        InputError: fewer than two models, the same name twice, a base that is none of them, models that read the
            prompts differently, have other layers or drop entries at random, or a measure that the site does not have.
        HookNameError: the models have no such hook points.
        TransformError: the weights of two models were processed differently.

    Example:
        >>> result = compare_models({"base": base, "tuned": tuned}, ["When Mary and John went to the store"])
        >>> result.to_dataframe()
        >>> result.plot()
    """
    run = _Run(
        base=base,
        site=site,
        measures=measures,  # type: ignore[arg-type]  # read above
        pos=pos,  # type: ignore[arg-type]
        with_weights=weights,
        batch_size=batch_size,
        dtype=dtype,
        every_pair=every_pair,
        progress=progress,
    )
    if isinstance(models, Mapping):
        run.check_all(_list_models(_order(models, base)), prompts, attention_mask)
    for name, model in _list_models(_order(models, base)):
        run.take(name, model, prompts, attention_mask)
        # Not to be held while the next one is loaded.
        del model
    return run.result()


def _order(models: object, base: str | None) -> object:
    """Names and models, of a mapping the base before all others.

    Raises:
        InputError: the mapping has no model of the base's name.
    """
    if not isinstance(models, Mapping):
        return models
    if base is not None and base not in models:
        raise InputError(f"base is {base!r}; the models are {list(models)}")
    names = [*models] if base is None else [base, *(name for name in models if name != base)]
    return ((name, models[name]) for name in names)


def order_names(names: Sequence[str] | None, base: str | None, there: Sequence[str]) -> list[str]:
    """The names of the models to compare, the base before all others.

    Args:
        names: those that were asked for; None: all but `_merged_`.
        base: the base; None: `_pretrained_` where it is among them, else the first.
        there: the names that there are.

    Raises:
        InputError: these are no names, or the base is not among them.
    """
    if isinstance(names, str) or not (names is None or all(isinstance(name, str) for name in names)):
        raise refusal(names, "names", "a list of names, or None", InputError)
    chosen = [name for name in there if name != "_merged_"] if names is None else list(names)
    first = base if base is not None else next((name for name in chosen if name == "_pretrained_"), None)
    if first is not None and first not in chosen:
        raise InputError(f"base is {first!r}; the models to compare are {chosen}")
    return chosen if first is None else [first, *(name for name in chosen if name != first)]


def _list_models(pairs: object) -> Iterator[tuple[str, HookedCausalLM]]:
    """Names and models.

    Raises:
        InputError: something else.
    """
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise refusal(pairs, "models", "models by name, or pairs of a name and a model", InputError)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise refusal(pair, "models: an entry", "a name and a HookedCausalLM", InputError)
        if not isinstance(pair[1], HookedCausalLM):
            raise refusal(pair[1], f"models[{pair[0]!r}]", "a HookedCausalLM", InputError)
        yield pair
        del pair


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is kept of a model that others are compared with.

    Attributes:
        trace: its activations.
        model: the model, where weights are compared.
    """

    trace: Trace
    model: HookedCausalLM | None


class _Run:
    """A comparison in progress: the models so far, and the lines of the tables."""

    def __init__(
        self,
        *,
        base: str | None,
        site: str,
        measures: tuple[Measure, ...] | None,
        pos: Index,
        with_weights: bool,
        batch_size: int,
        dtype: torch.dtype | None,
        every_pair: bool,
        progress: bool,
    ) -> None:
        self._base = base
        self._site, self._wanted, self._pos, self._with_weights = site, measures, pos, with_weights
        self._batch_size, self._dtype, self._every_pair, self._progress = batch_size, dtype, every_pair, progress
        self._kept: dict[str, _Kept] = {}
        self._transforms: tuple[str, ...] = ()
        self._names: list[str] = []
        self._lines: list[dict[str, Any]] = []
        self._weight_lines: list[dict[str, Any]] = []

    def check_all(
        self, models: Iterable[tuple[str, HookedCausalLM]], prompts: Prompt, attention_mask: Tensor | None
    ) -> None:
        """Refuse models that are at hand before any of them runs.

        Raises:
            HookLensError: as `compare_models`.
        """
        for name, model in models:
            self._check(name, model, prompts, attention_mask)
        self._check_number()
        self._names = []

    def take(self, name: str, model: HookedCausalLM, prompts: Prompt, attention_mask: Tensor | None) -> None:
        """Run a model, and compare it with those that were kept.

        Raises:
            HookLensError: as `compare_models`.
        """
        self._check(name, model, prompts, attention_mask)
        n_steps = len(self._prompts.rows) + len(self._kept) * (len(self._points) + self._with_weights)
        with progress_bar(f"comparing {name}", total=n_steps, progress=self._progress) as bar:
            trace = trace_model(
                model,
                self._prompts,
                self._points,
                batch_size=self._batch_size,
                dtype=self._dtype,
                advance=bar.update,
            )
            for other, kept in self._kept.items():
                sums = self._compare_weights(other, name, kept.model, model)
                bar.update(self._with_weights)
                self._compare_traces(other, name, kept.trace, trace, sums, bar.update)
        if self._every_pair or not self._kept:
            self._kept[name] = _Kept(trace=trace, model=model if self._with_weights else None)

    def result(self) -> ModelComparison:
        """The tables.

        Raises:
            InputError: there was one model, or none.
        """
        self._check_number()
        return ModelComparison(
            frame=_tabulate(self._lines),
            weights=_tabulate(self._weight_lines) if self._with_weights else None,
            names=tuple(self._names),
            n_prompts=len(self._prompts.rows),
            n_tokens=self._prompts.n_tokens,
        )

    def _check(self, name: str, model: HookedCausalLM, prompts: Prompt, attention_mask: Tensor | None) -> None:
        if not self._names and self._base not in (None, name):
            raise InputError(
                f"base is {self._base!r}, but the models begin with {name!r}; models that come one after another begin "
                "with the base"
            )
        if name in self._names:
            raise InputError(f"models: the name {name!r} comes twice; give each model a name of its own")
        if model.drops:
            raise InputError(
                f"model {name!r} is in training mode with dropout, so no two runs are alike; call model.eval() first"
            )
        if not self._names:
            self._prompts = ComparedPrompts.read(name, model, prompts, pos=self._pos, attention_mask=attention_mask)
            self._points = find_sites(model, self._site)
            self._measures = self._find_measures()
            self._transforms = model.transforms
        else:
            self._prompts.check_reader(name, model)
            check_sites(self._names[0], self._points, name, find_sites(model, self._site))
            try:
                check_transforms_match(self._transforms, model.transforms)
            except TransformError as error:
                raise TransformError(f"models {self._names[0]!r} (first) and {name!r} (second): {error}") from error
        self._names.append(name)

    def _check_number(self) -> None:
        if len(self._names) < 2:
            raise InputError(f"models: {self._names or 'none'}; expected at least two to compare")

    def _find_measures(self) -> tuple[Measure, ...]:
        streams = are_streams(self._points)
        if self._wanted is None:
            return (*_USUAL[:2], "kl", *_USUAL[2:]) if streams else _USUAL
        if "kl" in self._wanted and not streams:
            raise InputError(
                f"measure 'kl' reads the residual stream by the unembedding, and site {self._site!r} is none; take "
                "'resid_pre', 'resid_mid' or 'resid_post', or other measures"
            )
        return self._wanted

    def _compare_weights(
        self, first: str, second: str, one: HookedCausalLM | None, other: HookedCausalLM
    ) -> dict[int | None, WeightSums]:
        if one is None:
            return {}
        sums = compare_weights(one, other)
        for weight, found in sums.items():
            line = {"first": first, "second": second, "layer": layer_of(weight), "weight": weight}
            self._weight_lines.append({**line, "relative_norm": found.relative_norm, "cosine": found.cosine})
        return sum_by_layer(sums)

    def _compare_traces(
        self,
        first: str,
        second: str,
        one: Trace,
        other: Trace,
        sums: Mapping[int | None, WeightSums],
        advance: Callable[[int], object],
    ) -> None:
        for name in self._points:
            layer = layer_of(name)
            line: dict[str, Any] = {"first": first, "second": second, "site": name, "layer": layer}
            line |= {measure: compare_vectors(measure, one, other, name) for measure in self._measures}
            if layer is not None and layer in sums:
                own = sums[layer]
                line |= {"weight_relative_norm": own.relative_norm, "weight_cosine": own.cosine}
            self._lines.append(line)
            advance(1)


def _tabulate(lines: list[dict[str, Any]]) -> "pandas.DataFrame":
    table: pandas.DataFrame = import_package("pandas").DataFrame(lines)
    if table["layer"].isna().any():
        table["layer"] = table["layer"].astype("Int64")
    return table
