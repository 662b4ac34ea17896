"""Patching latents: what each one of a corrupted run does when it takes the clean run's value.

`sweep_latents` runs every patch. `attribute_latents` estimates all at once, to first order (Marks et al. 2024), with
`f` the latents and `m` the metric:

    m(f' in the place of f) - m  ~  (f' - f) dm/df
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hooklens.arguments import reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.hooks import HookPoint
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.sae.splice import SAESplice
from hooklens.tokens import is_text

if TYPE_CHECKING:
    import pandas

LatentMetric = Callable[[Tensor], Tensor]


@reads()
def attribute_latents(
    model: HookedCausalLM,
    splice: SAESplice,
    clean: object,
    corrupted: object,
    metric: LatentMetric,
    *,
    by_position: bool = False,
) -> "pandas.DataFrame":
    """The estimated effect of each latent that differs, largest first.

    Args:
        model: the model.
        splice: the autoencoder where it is put.
        clean: text or token ids `[batch pos]`.
        corrupted: the same for the run that is patched, of the same shape.
        metric: from logits `[batch pos d_vocab]` to a value for each row, `[batch]`; a metric of `hooklens.patching` is
            one.
        by_position: an effect for each position, not their sum.

    Returns:
        Columns `latent`, `pos` if by position, `clean` and `corrupted` (the latent's mean values there) and `effect`,
        the mean over rows.

    Raises:
        InputError: prompts of different shapes, or a metric without a value for each row.
    """
    first, second = _ids(model, clean, "clean"), _ids(model, corrupted, "corrupted")
    _check_shapes(first, second)
    name = f"{splice.name_out}.hook_sae_acts"
    with torch.no_grad():
        _, cache = model.run_with_cache(first, names_filter=name, splices=[splice])
    held: list[Tensor] = []

    def keep(acts: Tensor, hook: HookPoint) -> Tensor:
        # A leaf of its own: gradients of nothing before it are wanted.
        held.append(acts.detach().requires_grad_())
        return held[0]

    with torch.enable_grad():
        logits = model.run_with_hooks(second, fwd_hooks=[(name, keep)], splices=[splice])
        [gradient] = torch.autograd.grad(_values(metric, logits).sum(), held)
    acts, patched = held[0].detach(), cache[name]
    effects = (patched - acts) * gradient
    differs = (patched != acts).flatten(0, 1).any(0).nonzero().flatten().tolist()
    return _table(differs, patched, acts, effects, by_position=by_position)


@reads()
def sweep_latents(
    model: HookedCausalLM,
    splice: SAESplice,
    clean: object,
    corrupted: object,
    metric: LatentMetric,
    *,
    latents: Sequence[int] | None = None,
    by_position: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> "pandas.DataFrame":
    """The effect of each latent: the metric with its clean value in the corrupted run, less the metric without.

    Args:
        model, splice, clean, corrupted, metric, by_position: as in `attribute_latents`.
        latents: which; None: all that differ anywhere.
        batch_size: patched prompts run at once.
        progress: show a bar.

    Returns:
        As `attribute_latents`.

    Raises:
        InputError: prompts of different shapes, latents that are not there, or a metric without a value for each row.
    """
    first, second = _ids(model, clean, "clean"), _ids(model, corrupted, "corrupted")
    _check_shapes(first, second)
    name, d_sae = f"{splice.name_out}.hook_sae_acts", splice.sae.cfg.d_sae
    if wrong := [one for one in latents or () if not 0 <= one < d_sae]:
        raise InputError(
            f"latents: {join_names([str(one) for one in wrong])} are not there; the autoencoder has {d_sae}"
        )
    with torch.no_grad():
        _, cache = model.run_with_cache(first, names_filter=name, splices=[splice])
        logits, other = model.run_with_cache(second, names_filter=name, splices=[splice])
        patched, acts = cache[name], other[name]
        before = _values(metric, logits)
        chosen = (patched != acts).flatten(0, 1).any(0).nonzero().flatten().tolist() if latents is None else [*latents]
        places: list[int | None] = [*range(first.shape[1])] if by_position else [None]
        cells = [(latent, place) for latent in chosen for place in places]
        effects = torch.zeros(len(before), first.shape[1] if by_position else 1, d_sae)
        per_run = max(1, batch_size // len(first))
        with progress_bar("latents", total=len(cells), unit="cell", progress=progress) as bar:
            for start in range(0, len(cells), per_run):
                some = cells[start : start + per_run]
                hook = _Patch(some, patched)
                out = model.run_with_hooks(second.repeat(len(some), 1), fwd_hooks=[(name, hook)], splices=[splice])
                values = _values(metric, out).view(len(some), -1) - before
                for (latent, place), value in zip(some, values, strict=True):
                    effects[:, place or 0, latent] = value.to(effects)
                bar.update(len(some))
    return _table(chosen, patched, acts, effects, by_position=by_position)


class _Patch:
    """Puts clean values of some latents into as many copies of the corrupted run."""

    def __init__(self, cells: list[tuple[int, int | None]], clean: Tensor) -> None:
        self._cells, self._clean = cells, clean

    def __call__(self, acts: Tensor, hook: HookPoint) -> Tensor:
        left = acts.clone()
        n_rows = len(self._clean)
        for copy, (latent, place) in enumerate(self._cells):
            rows = slice(copy * n_rows, (copy + 1) * n_rows)
            columns = slice(None) if place is None else slice(place, place + 1)
            left[rows, columns, latent] = self._clean[:, columns, latent]
        return left


def _ids(model: HookedCausalLM, given: object, what: Literal["clean", "corrupted"]) -> Tensor:
    prompt: Any = given
    ids: Tensor = model.to_tokens(prompt) if is_text(prompt) else torch.as_tensor(prompt)
    if is_text(prompt) and not isinstance(prompt, str):
        lengths = {len(model.to_tokens(one)[0]) for one in prompt}
        if len(lengths) > 1:
            raise InputError(f"{what}: the texts have {sorted(lengths)} tokens; give texts of one length")
    return (ids[None] if ids.ndim == 1 else ids).to(model.device)


def _check_shapes(clean: Tensor, corrupted: Tensor) -> None:
    if clean.shape != corrupted.shape:
        raise InputError(
            f"clean is {list(clean.shape)} tokens and corrupted {list(corrupted.shape)}; expected the same rows and "
            "positions"
        )


def _values(metric: LatentMetric, logits: Tensor) -> Tensor:
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != (len(logits),):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"the metric gave {found} for {len(logits)} rows; expected a value for each row")
    return values


def _table(
    latents: Sequence[int], patched: Tensor, acts: Tensor, effects: Tensor, *, by_position: bool
) -> "pandas.DataFrame":
    rows: list[dict[str, float]] = []
    runs = {"clean": patched, "corrupted": acts}
    total = effects.mean(0)
    total = total if by_position else total.sum(0, keepdim=True)
    for latent in latents:
        for place in range(len(total)):
            where = slice(place, place + 1) if by_position else slice(None)
            values = {name: held[:, where, latent].mean().item() for name, held in runs.items()}
            at = {"pos": place} if by_position else {}
            rows.append({"latent": latent, **at, **values, "effect": total[place, latent].item()})
    columns = ["latent", *(["pos"] if by_position else []), "clean", "corrupted", "effect"]
    table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=columns)
    return table.sort_values("effect", key=lambda column: column.abs(), ascending=False, ignore_index=True)
