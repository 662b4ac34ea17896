"""Head detection: which heads attend where a named kind of head would.

**Method.** A kind of head is described by a *target*: for each query position the key positions that such a
head attends to. The score of a head is the attention that it pays to them,

    score = mean over queries with a target of  sum over target keys of pattern[query, key]

**Kinds** (Elhage et al. 2021; Olsson et al. 2022, "In-context Learning and Induction Heads"; Wang et al. 2022):

- *previous token*: the position before;
- *duplicate token*: earlier positions of the same token;
- *induction*: positions after earlier ones of the same token, where what came next last time stands.

On a sequence of random tokens that is repeated, only attention to content tells these apart from attention to a
distance, which is what `head_scores` uses unless it is given text.

**How to read it.** 0 to 1: the share of attention. A head that attends evenly scores about
(targets per query) / (keys per query). A score says where a head looks, not what it does with it; ablate the
head to learn whether it matters.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM, Input
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.optional import import_package
from hooklens.precision import widen

if TYPE_CHECKING:
    import pandas

Kind = Literal["previous_token", "duplicate_token", "induction"]
Target = Bool[Tensor, "query key"] | Bool[Tensor, "batch query key"]


def previous_token_target(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """Each query's position before."""
    batch, n = tokens.shape
    return torch.eye(n, dtype=torch.bool, device=tokens.device).roll(-1, 1).tril(-1).expand(batch, n, n)


def duplicate_token_target(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """Earlier positions of each query's token."""
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def induction_target(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """Positions after earlier ones of each query's token, the query's own left out."""
    return duplicate_token_target(tokens).roll(1, -1).tril(-1)


_TARGETS: dict[Kind, Callable[[Tensor], Tensor]] = {
    "previous_token": previous_token_target,
    "duplicate_token": duplicate_token_target,
    "induction": induction_target,
}


def repeated_random_tokens(
    model: HookedCausalLM, *, n_rows: int = 16, period: int = 32, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """Rows of random tokens and the same ones again, behind a BOS token where the tokenizer has one.

    Special tokens are not drawn; without a tokenizer all ids are.

    Raises:
        InputError: the sequence is longer than `n_ctx`, or a number is below 1.
    """
    if n_rows < 1 or period < 1:
        raise InputError(f"repeated_random_tokens: n_rows={n_rows}, period={period}; expected numbers from 1 on")
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


@torch.no_grad()
def score_heads(
    model: HookedCausalLM, input: Input, target: Target, *, attention_mask: Tensor | None = None
) -> Float[Tensor, "layer head"]:
    """Each head's mean attention to target positions, over the queries that have any.

    Patterns are scored as they pass and not kept.

    Args:
        model: the model.
        input: text or token ids.
        target: for each query the keys that count, for all rows or one by one.
        attention_mask: `[batch pos]`; padding neither asks nor is asked. None: what the model infers.

    Raises:
        InputError: the target is not boolean or not of the pattern's shape, holds keys that no head can see, or
            nothing.
    """
    tokens, mask = _tokenize(model, input, attention_mask)
    wanted = _fit_target(target, mask.bool())
    n_asking = wanted.any(-1).sum()
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def score(pattern: Tensor, hook: HookPoint) -> None:
        layer = layer_of(hook.name or "")
        assert layer is not None
        attention = (widen(pattern) * wanted[:, None]).sum(dim=(0, 2, 3))
        scores[layer] = (attention / n_asking).cpu()

    model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.*.attn.hook_pattern", score)], attention_mask=mask, return_type=None
    )
    return scores


def _fit_target(target: Tensor, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """The target of each row, between tokens that are no padding."""
    batch, n = real.shape
    if list(target.shape) not in ([n, n], [batch, n, n]) or target.dtype != torch.bool:
        raise InputError(
            f"the target has shape {list(target.shape)} and dtype {target.dtype}; expected [query, key] {[n, n]} or "
            f"[batch, query, key] {[batch, n, n]}, as the pattern, and torch.bool: which keys count for each query"
        )
    later = target.triu(1).nonzero().tolist()
    if later:
        *_, query, key = later[0]
        raise InputError(
            f"the target has {len(later)} keys after their query, such as key {key} for query {query}, which no head "
            "can see; keep the others: target.tril()"
        )
    wanted = target.to(real.device).expand(batch, n, n) & real[:, :, None] & real[:, None, :]
    if not bool(wanted.any()):
        raise InputError("no query has a target: nothing can be scored; give a longer or a repeating input")
    return wanted


@torch.no_grad()
def head_scores(
    model: HookedCausalLM, input: Input | None = None, *, attention_mask: Tensor | None = None, seed: int = 0
) -> "pandas.DataFrame":
    """Previous-token, duplicate-token and induction score of every head.

    Columns: `layer`, `head`, `previous_token`, `duplicate_token`, `induction`; the index holds labels `"L0H0"`.

    Args:
        model: the model.
        input: text or token ids, with repeated tokens; None: repeated random tokens, as long as `n_ctx` allows
            up to a period of 32.
        attention_mask: `[batch pos]`, for ids with padding; None: what the model infers.
        seed: decides the random tokens.

    Raises:
        InputError: no token of the input is repeated.
    """
    if input is None:
        input = repeated_random_tokens(model, period=min(32, (model.cfg.n_ctx - 1) // 2), seed=seed)
    tokens, mask = _tokenize(model, input, attention_mask)
    scores = {
        kind: score_heads(model, tokens, target(tokens), attention_mask=mask) for kind, target in _TARGETS.items()
    }
    return _tabulate(model, scores)


@torch.no_grad()
def detect_heads(
    model: HookedCausalLM,
    input: Input,
    target: Kind | Target,
    *,
    min_score: float = 0.0,
    attention_mask: Tensor | None = None,
) -> "pandas.DataFrame":
    """The heads that attend to any target pattern, best first.

    Columns: `layer`, `head`, `score`; the index holds labels `"L0H0"`.

    Args:
        model: the model.
        input: text or token ids.
        target: a kind by name, or for each query the keys that count, `[query key]` or `[batch query key]`.
        min_score: leave out heads below it.
        attention_mask: `[batch pos]`, for ids with padding; None: what the model infers.

    Raises:
        InputError: an unknown kind, a target of another shape than the pattern, or no query with a target.
    """
    tokens, mask = _tokenize(model, input, attention_mask)
    if isinstance(target, str):
        if target not in _TARGETS:
            raise InputError(
                f"detect_heads: target is {target!r}; expected {', '.join(map(repr, get_args(Kind)))}, or a tensor"
            )
        target = _TARGETS[target](tokens)
    table = _tabulate(model, {"score": score_heads(model, tokens, target, attention_mask=mask)})
    return table[table["score"] >= min_score].sort_values("score", ascending=False)


def _tokenize(
    model: HookedCausalLM, input: Input, attention_mask: Tensor | None
) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """Token ids and mask as the model itself makes them of an input, padding that it finds in ids included."""
    _, cache = model.run_with_cache(input, names_filter="hook_embed", stop_at_layer=0, attention_mask=attention_mask)
    assert cache.tokens is not None
    # Without a mask of its own a second call would look for padding in the ids again.
    mask = torch.ones_like(cache.tokens) if cache.attention_mask is None else cache.attention_mask
    return cache.tokens, mask


def _tabulate(model: HookedCausalLM, scores: dict[Kind, Tensor] | dict[str, Tensor]) -> "pandas.DataFrame":
    pairs = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    columns = {
        "layer": [layer for layer, _ in pairs],
        "head": [head for _, head in pairs],
        **{name: values.flatten().tolist() for name, values in scores.items()},
    }
    table: pandas.DataFrame = import_package("pandas").DataFrame(columns, index=model.all_head_labels())
    return table
