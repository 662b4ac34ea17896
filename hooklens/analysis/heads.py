"""Head detection: which heads attend where a named kind of head would.

**Method.** A kind of head is described by a *target*: for each query position the key positions that such a
head attends to. A *measure* says how well a head's pattern fits it:

- `"mean_attention"`, ours: `mean over queries with a target of  sum over target keys of pattern[query, key]`. Queries
  without a target do not count.
- `"mul"` of `detect_head` in TransformerLens 2.x: `sum(pattern * target) / sum(pattern)` over all queries and keys of
  a row, so a row of `n` tokens whose head attends to nothing but targets has `(queries with a target) / n`.
- `"abs"` of the same: `1 - sum(|pattern - target|) / n`, from -1 to 1; not rounded, as it is there.

Those two are taken row by row and their mean is given. `exclude_bos` takes each row's first token out of the keys,
`exclude_current_token` the query's own position, of the pattern for `"mul"` and of the difference for `"abs"`.

**Kinds** (Elhage et al. 2021; Olsson et al. 2022, "In-context Learning and Induction Heads"; Wang et al. 2022):

- *previous token*: the position before;
- *duplicate token*: earlier positions of the same token;
- *induction*: positions after earlier ones of the same token, where what came next last time stands.

Before, after and earlier are meant among a row's tokens: padding is none of them, even where its id is a token's.

On a sequence of random tokens that is repeated, only attention to content tells these apart from attention to a
distance, which is what `head_scores` uses unless it is given text.

**How to read it.** `"mean_attention"` is from 0 to 1: the share of attention. A head that attends evenly scores about
(targets per query) / (keys per query). A score says where a head looks, not what it does with it; ablate the
head to learn whether it matters.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.stream import require
from hooklens.analysis.reading.chosen_heads import Heads, resolve_heads
from hooklens.analysis.reading.connection import connect_cache, read_model
from hooklens.analysis.reading.runs import Run
from hooklens.analysis.targets import duplicate_token_target, induction_target, previous_token_target
from hooklens.arguments import (
    Reader,
    optional,
    read_flag,
    read_int,
    read_number,
    read_one_of,
    read_seed,
    read_tensor,
    reads,
)
from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.hooks import HookPoint
from hooklens.optional import import_package
from hooklens.precision import widen

if TYPE_CHECKING:
    import pandas

MOST_ROWS = 2**20
"""More generated rows or prompts than that are a slip: their tokens alone would fill a machine."""

Kind = Literal["previous_token", "duplicate_token", "induction"]
Measure = Literal["mean_attention", "mul", "abs"]
Target = Bool[Tensor, "query key"] | Bool[Tensor, "batch query key"]
AnyTarget = Target | Float[Tensor, "query key"] | Float[Tensor, "batch query key"]


_TARGETS: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "previous_token": previous_token_target,
    "duplicate_token": duplicate_token_target,
    "induction": induction_target,
}


def _read_target(given: object, *, what: str, error: type[HookLensError] = InputError) -> Any:
    if isinstance(given, str):
        return read_one_of(given, what=what, options=get_args(Kind), error=error)
    kinds = ", ".join(map(repr, get_args(Kind)))
    return read_tensor(given, what=what, expected=f"{kinds}, or a tensor [query, key]", error=error)


_READERS: dict[str, Reader] = {
    "model": read_model,
    "target": _read_target,
    "measure": partial(read_one_of, options=get_args(Measure)),
    "exclude_bos": read_flag,
    "exclude_current_token": read_flag,
}


@reads(
    model=read_model,
    n_rows=partial(read_int, least=1, most=MOST_ROWS),
    period=partial(read_int, least=1),
    seed=read_seed,
)
def repeated_random_tokens(
    model: HookedCausalLM, *, n_rows: int = 16, period: int = 32, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """Rows of random tokens and the same ones again, behind a BOS token where the tokenizer has one.

    Special tokens are not drawn; without a tokenizer all ids are.

    Raises:
        InputError: the sequence is longer than `n_ctx`, or a number is below 1.
    """
    bos = getattr(model.tokenizer, "bos_token_id", None)
    length = 2 * period + (bos is not None)
    if length > model.cfg.n_ctx:
        raise InputError(
            f"repeated_random_tokens: period={period} makes {length} tokens; the model has n_ctx={model.cfg.n_ctx}"
        )
    special = set(getattr(model.tokenizer, "all_special_ids", []))
    ordinary = torch.tensor([token for token in range(_n_ordinary(model)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    block = ordinary[torch.randint(len(ordinary), (n_rows, period), generator=generator)]
    start = torch.full((n_rows, 1), bos) if bos is not None else block[:, :0]
    return torch.cat([start, block, block], dim=1).to(model.device)


def _n_ordinary(model: HookedCausalLM) -> int:
    """Ids below this have text; some embeddings have rows for ids that the tokenizer never gives."""
    return model.cfg.d_vocab if model.tokenizer is None else min(model.cfg.d_vocab, len(model.tokenizer))


@reads(**_READERS)
@torch.no_grad()
def score_heads(
    model: HookedCausalLM,
    input: Run,
    target: Kind | AnyTarget,
    *,
    measure: Measure = "mean_attention",
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    heads: Heads | None = None,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "layer head"]:
    """How well each head's attention fits target positions; NaN in layers without attention.

    Patterns are scored as they pass and not kept; of layers without a head to score none are made.

    Args:
        model: the model.
        input: a run: text or token ids, or a cache with `pattern`, whose own padding counts.
        target: a kind by name, or for each query the keys that count, for all rows or one by one, `torch.bool`; for
            `"mul"` and `"abs"` also attention that is expected, as numbers.
        measure: see the module. With `"mul"`, NaN for a head that pays no attention to what is not excluded.
        exclude_bos: leave out attention to each row's first token; `"mul"` and `"abs"` only.
        exclude_current_token: leave out attention of queries to themselves; `"mul"` and `"abs"` only.
        heads: the heads to score, `{layer: heads}` or pairs `(layer, head)`; the others are NaN. None: all.
        attention_mask: `[batch pos]`; padding neither asks nor is asked. None: what the model infers.

    Raises:
        InputError: the model lacks some of the heads; the target is of another kind or not of the pattern's shape,
            holds keys that no head can see, or nothing; or something is excluded where the measure counts target keys
            alone.
    """
    chosen = resolve_heads(model, heads)
    tokens, mask = _tokenize(model, input, attention_mask)
    if isinstance(target, str):
        target = _TARGETS[target](tokens, mask)
    wanted = _fit_target(target, mask.bool(), measure, causal=model.cfg.causal)
    compare = _make_measure(
        measure, wanted, mask.bool(), exclude_bos=exclude_bos, exclude_current_token=exclude_current_token
    )
    scores = torch.full((model.cfg.n_layers, model.cfg.n_heads), torch.nan)

    def score(pattern: Tensor, hook: HookPoint) -> None:
        layer = layer_of(hook.name or "")
        assert layer is not None
        shown = pattern[:, chosen[layer]].to(wanted.device)
        scores[layer, chosen[layer]] = compare(widen(shown)).to(scores)

    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in chosen]
    if isinstance(input, ActivationCache):
        require(input, patterns, purpose="scoring heads")
        for name in patterns:
            pattern = input[name] if input.has_batch_dim else input[name][None]
            if pattern.shape[-2:] != (tokens.shape[1], tokens.shape[1]):
                raise InputError(
                    f"the cache holds patterns {list(pattern.shape[-2:])} of a run of {tokens.shape[1]} tokens; "
                    "capture all positions (no pos_slice) of a run without past_kv_cache"
                )
            score(pattern, model.hook_points()[name])
        return scores
    model.run_with_hooks(
        tokens, fwd_hooks=[(name, score) for name in patterns], attention_mask=mask, return_type=None,
        stop_at_layer=max(chosen, default=-1) + 1,
    )  # fmt: skip
    return scores


def _make_measure(
    measure: Measure,
    wanted: Shaped[Tensor, "batch query key"],
    real: Bool[Tensor, "batch pos"],
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
) -> Callable[[Float[Tensor, "batch head query key"]], Float[Tensor, " head"]]:
    """The function from patterns to scores; see the module."""
    if measure == "mean_attention":
        if exclude_bos or exclude_current_token:
            raise InputError(
                "exclude_bos and exclude_current_token belong to the measures 'mul' and 'abs'; 'mean_attention' counts "
                "attention to target keys alone, so take these keys out of the target"
            )
        n_asking = wanted.any(-1).sum()
        return lambda pattern: (pattern * wanted[:, None]).sum(dim=(0, 2, 3)) / n_asking
    counts = real[:, :, None] & real[:, None, :]
    if exclude_bos:
        counts = counts & (real.long().cumsum(1) != 1)[:, None, :]
    if exclude_current_token:
        counts = counts & ~torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    counted = counts[:, None]
    if measure == "mul":

        def multiply(pattern: Tensor) -> Tensor:
            pattern = pattern * counted
            return ((pattern * wanted[:, None]).sum(dim=(2, 3)) / pattern.sum(dim=(2, 3))).mean(0)

        return multiply
    lengths = real.sum(1)[:, None]
    return lambda pattern: (
        1 - ((pattern - wanted[:, None].to(pattern)).abs() * counted).sum(dim=(2, 3)) / lengths
    ).mean(0)


def _fit_target(
    target: Tensor, real: Bool[Tensor, "batch pos"], measure: Measure, *, causal: bool
) -> Shaped[Tensor, "batch query key"]:
    """The target of each row, between tokens that are no padding."""
    batch, n = real.shape
    takes_numbers = measure != "mean_attention"
    is_kind = target.dtype == torch.bool or (takes_numbers and target.is_floating_point())
    if list(target.shape) not in ([n, n], [batch, n, n]) or not is_kind:
        kind = "torch.bool, or a floating one" if takes_numbers else "torch.bool"
        raise InputError(
            f"the target has shape {list(target.shape)} and dtype {target.dtype}; expected [query, key] {[n, n]} or "
            f"[batch, query, key] {[batch, n, n]}, as the pattern, and {kind}: which keys count for each query"
        )
    if not bool(target.isfinite().all()):
        raise InputError("the target holds numbers that are not finite; expected the attention to each key, 0 to 1")
    later = target.triu(1).nonzero().tolist() if causal else []
    if later:
        *_, query, key = later[0]
        raise InputError(
            f"the target has {len(later)} keys after their query, such as key {key} for query {query}, which no head "
            "can see; keep the others: target.tril()"
        )
    wanted = target.to(real.device).expand(batch, n, n) * (real[:, :, None] & real[:, None, :])
    if not bool(wanted.any()):
        raise InputError("no query has a target: nothing can be scored; give a longer or a repeating input")
    return wanted


@reads(model=read_model, seed=read_seed)
@torch.no_grad()
def head_scores(
    model: HookedCausalLM, input: Run | None = None, *, attention_mask: Tensor | None = None, seed: int = 0
) -> "pandas.DataFrame":
    """Previous-token, duplicate-token and induction score of every head, by the measure `"mean_attention"`.

    Columns: `layer`, `head`, `previous_token`, `duplicate_token`, `induction`; the index holds labels `"L0H0"`.

    Args:
        model: the model.
        input: a run, as for `score_heads`, with repeated tokens; None: repeated random tokens, as long as `n_ctx`
            allows up to a period of 32.
        attention_mask: `[batch pos]`, for ids with padding; None: what the model infers.
        seed: decides the random tokens.

    Raises:
        InputError: no token of the input is repeated.
    """
    if input is None:
        input = repeated_random_tokens(model, period=min(32, (model.cfg.n_ctx - 1) // 2), seed=seed)
    tokens, mask = _tokenize(model, input, attention_mask)
    is_captured = isinstance(input, ActivationCache)
    run, run_mask = (input, None) if is_captured else (tokens, mask)
    scores = {
        kind: score_heads(model, run, target(tokens, mask), attention_mask=run_mask)
        for kind, target in _TARGETS.items()
    }
    return _tabulate(model, scores)


@reads(**_READERS, min_score=optional(partial(read_number, expected="a finite number")))
@torch.no_grad()
def detect_heads(
    model: HookedCausalLM,
    input: Run,
    target: Kind | AnyTarget,
    *,
    measure: Measure = "mean_attention",
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    heads: Heads | None = None,
    min_score: float | None = None,
    attention_mask: Tensor | None = None,
) -> "pandas.DataFrame":
    """The heads that attend to any target pattern, best first.

    Columns: `layer`, `head`, `score`; the index holds labels `"L0H0"`.

    Args:
        model: the model.
        input: a run: text or token ids, or a cache with `pattern`, whose own padding counts.
        target: a kind by name, or for each query the keys that count, `[query key]` or `[batch query key]`.
        measure, exclude_bos, exclude_current_token: see `score_heads`.
        heads: the heads to list, as for `score_heads`. None: all.
        min_score: leave out heads below it, and those without a score. None: list all.
        attention_mask: `[batch pos]`, for ids with padding; None: what the model infers.

    Raises:
        InputError: an unknown kind, a target of another shape than the pattern, or no query with a target.
    """
    chosen = resolve_heads(model, heads)
    scores = score_heads(
        model, input, target, measure=measure, exclude_bos=exclude_bos, exclude_current_token=exclude_current_token,
        heads=chosen, attention_mask=attention_mask,
    )  # fmt: skip
    table = _tabulate(model, {"score": scores})
    table = table[[head in chosen.get(layer, ()) for layer, head in zip(table.layer, table["head"], strict=True)]]
    kept = table if min_score is None else table[table["score"] >= min_score]
    return kept.sort_values("score", ascending=False)


def _tokenize(
    model: HookedCausalLM, input: Run, attention_mask: Tensor | None
) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """Token ids and mask as the model itself makes them of an input, padding that it finds in ids included."""
    if isinstance(input, ActivationCache):
        if attention_mask is not None:
            raise InputError("attention_mask goes with text or token ids; a cache knows the padding of its run")
        cache = connect_cache(input, model)
        if cache.tokens is None:
            raise InputError("the cache is of a run that did not begin at tokens; capture one of text or token ids")
    else:
        _, cache = model.run_with_cache(
            input, names_filter="hook_embed", stop_at_layer=0, attention_mask=attention_mask
        )
        assert cache.tokens is not None
    # Without a mask of its own a second call would look for padding in the ids again.
    mask = torch.ones_like(cache.tokens) if cache.attention_mask is None else cache.attention_mask
    return cache.tokens, mask


def _tabulate(model: HookedCausalLM, scores: dict[Kind, Tensor] | dict[str, Tensor]) -> "pandas.DataFrame":
    layers = [block.layer for block in model.cfg.blocks if block.attn is not None]
    pairs = [(layer, head) for layer in layers for head in range(model.cfg.n_heads)]
    columns = {
        "layer": [layer for layer, _ in pairs],
        "head": [head for _, head in pairs],
        **{name: values[layers].flatten().tolist() for name, values in scores.items()},
    }
    table: pandas.DataFrame = import_package("pandas").DataFrame(columns, index=model.all_head_labels())
    return table
