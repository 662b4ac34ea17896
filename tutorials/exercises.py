"""Checks of the exercises in tutorials 01 to 03: each runs a reader's function and says what is right or wrong with it.

The right values are computed here in another way than the exercise asks for: by the library, or by one forward pass per
value. Where an answer is what a typical mistake gives, the verdict names the mistake.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from torch import Tensor

import hooklens as hl
from hooklens import analysis, edits, patching
from hooklens.hooks import HookPoint

PROMPT = "When Mary and John went to the store , John gave a drink to"
OTHER_PROMPT = "When Mary and John went to the store , Mary gave a drink to"

# Of the largest value. Two ways to sum in float32 differ by some 1e-5 of it; mistakes differ by far more.
TOLERANCE = 1e-3

Mistakes = list[tuple[str, Tensor]]
"""What a mistake is, and the values that it gives."""

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Verdict:
    """What a check says.

    Attributes:
        right: whether the exercise is solved.
        text: why, or what is wrong.
    """

    right: bool
    text: str

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.text}"


class NotYet(Exception):  # noqa: N818
    """An answer is wrong; the text says how."""


def _gives_verdict(check: Callable[Arguments, str]) -> Callable[Arguments, Verdict]:
    """A check gives the text for a right answer, and raises for a wrong one."""

    @functools.wraps(check)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Verdict:
        try:
            return Verdict(right=True, text=check(*args, **kwargs))
        except NotYet as wrong:
            return Verdict(right=False, text=str(wrong))

    return run


def _run(attempt: Callable[..., Any], call: Callable[[], Any]) -> Any:
    """What a call that runs a reader's function gives."""
    try:
        return call()
    except NotImplementedError as error:
        raise NotYet(
            f"{attempt.__name__} is not written. Put your own lines in place of the one that raises."
        ) from error
    except Exception as error:
        raise NotYet(f"{attempt.__name__} stopped with {type(error).__name__}: {error}") from error


def _as_number(found: object, name: str) -> Tensor:
    """One real number, as a tensor without axes."""
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, complex):
        raise NotYet(f"{name} gives a complex number. The imaginary parts of a real matrix cancel: take `.real`.")
    if isinstance(found, bool) or not isinstance(found, int | float):
        what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise NotYet(f"{name} gives {what}; one number is asked for.")
    return torch.tensor(float(found), dtype=torch.float64)


def _as_table(found: object, shape: list[int], axes: str, name: str) -> Tensor:
    """A tensor of the shape that is asked for."""
    if not isinstance(found, Tensor):
        raise NotYet(f"{name} gives {found!r}; a tensor {axes} is asked for.")
    if list(found.shape) != shape:
        raise NotYet(f"{name} gives a tensor of shape {list(found.shape)}; {axes} is {shape}.")
    return found.detach().double().cpu()


def _compare(found: Tensor, expected: Tensor, mistakes: Mistakes) -> None:
    """Refuse numbers that are not the right ones, and name the mistake where one gives them."""
    tolerance = TOLERANCE * float(expected.abs().max())
    deviation = (found - expected.double()).abs()
    if float(deviation.max()) <= tolerance:
        return
    for text, value in mistakes:
        if value.shape == found.shape and torch.allclose(found, value.double(), rtol=0, atol=tolerance):
            raise NotYet(text)
    place = tuple(int(index) for index in torch.unravel_index(deviation.argmax(), deviation.shape))
    raise NotYet(
        f"at {list(place)} stands {float(found[place]):.3f}, and {float(expected[place]):.3f} was expected; "
        f"{int((deviation > tolerance).sum())} of {deviation.numel()} numbers are off."
    )


@_gives_verdict
def check_read_attention(
    attempt: Callable[[hl.ActivationCache, int, int, int, int], float], model: hl.HookedCausalLM
) -> str:
    """Exercise 1: single entries of patterns, from the cache."""
    _, cache = model.run_with_cache(PROMPT, names_filter=["*hook_pattern", "*hook_attn_scores"])
    places = [(2, 1, 14, 4), (0, 3, 10, 2), (1, 2, 12, 10)]
    answers = [
        _as_number(_run(attempt, functools.partial(attempt, cache, *place)), attempt.__name__) for place in places
    ]

    def collect(read: Callable[[int, int, int, int], Tensor]) -> Tensor:
        return torch.stack([read(*place) for place in places])

    mistakes: Mistakes = [
        (
            "query and key are exchanged. The axes are batch, head, query, key: the position that looks comes before "
            "the one that is looked at.",
            collect(lambda layer, head, query, key: cache["pattern", layer][0, head, key, query]),
        ),
        (
            "layer and head are exchanged: `cache['pattern', layer]` takes the layer, and the head is an axis.",
            collect(lambda layer, head, query, key: cache["pattern", head][0, layer, query, key]),
        ),
        (
            "these are the scores before the softmax; the attention is `cache['pattern', layer]`.",
            collect(lambda layer, head, query, key: cache["attn_scores", layer][0, head, query, key]),
        ),
        (
            "this is the mean over heads; the head is the second axis.",
            collect(lambda layer, head, query, key: cache["pattern", layer][0, :, query, key].mean()),
        ),
    ]
    expected = collect(lambda layer, head, query, key: cache["pattern", layer][0, head, query, key])
    _compare(torch.stack(answers), expected, mistakes)
    return f"at the {len(places)} places that were tried you read what the heads pay."


@_gives_verdict
def check_silence_head(attempt: Callable[[Tensor, HookPoint], Tensor | None], model: hl.HookedCausalLM) -> str:
    """Exercise 2: a hook that sets the `z` of head 3, layer 3, at the last position to zero."""
    seen: list[Tensor] = []

    def note(z: Tensor, hook: HookPoint) -> None:
        seen.append(z.clone())

    name, head = "blocks.3.attn.hook_z", 3
    prompts = [PROMPT, OTHER_PROMPT]
    hooks = [(name, note), (name, attempt), (name, note)]
    logits = _run(attempt, lambda: model.run_with_hooks(prompts, fwd_hooks=hooks))
    before, after = seen
    _say_what_changed(before, after, head)
    edited = model.run_with_hooks(prompts, edits=[edits.Zero(name, head=head, pos=-1)])
    _compare(logits.double(), edited, [])
    return "the head is silent at the last position of every prompt, and the logits are those of `edits.Zero`."


def _say_what_changed(before: Tensor, after: Tensor, head: int) -> None:
    """Refuse a `z` `[batch pos head d_head]` in which something else changed than one head at the last position."""
    batch, n_pos = before.shape[:2]
    wanted = before.clone()
    wanted[:, -1, head] = 0
    if torch.equal(after, wanted):
        return
    changed = (before != after).nonzero().tolist()
    if not changed:
        raise NotYet(
            "z comes out as it went in. A hook that returns nothing must change the tensor in place (`z[...] = 0`); "
            "one that changes a copy must return the copy."
        )
    rows, positions, heads = (sorted({place[axis] for place in changed}) for axis in range(3))
    if rows != list(range(batch)):
        raise NotYet(
            f"only prompt {rows} of {batch} changed: the first axis of z is the batch, as in `z[:, -1, {head}]`."
        )
    if positions != [n_pos - 1]:
        raise NotYet(
            f"heads {heads} changed at positions {positions}; asked for is the last one alone, {n_pos - 1} or -1."
        )
    if heads != [head]:
        raise NotYet(f"heads {heads} changed at the last position; asked for is head {head} alone.")
    raise NotYet("the right entries changed, and not to zero.")


@_gives_verdict
def check_previous_token_score(attempt: Callable[[Tensor], Tensor], model: hl.HookedCausalLM) -> str:
    """Exercise 3: how much of its attention each head pays to the token before."""
    tokens = analysis.heads.repeated_random_tokens(model, n_rows=3, period=8)
    _, cache = model.run_with_cache(tokens, names_filter="*hook_pattern")
    layers = range(model.cfg.n_layers)
    n_heads = model.cfg.n_heads
    found = torch.stack(
        [
            _as_table(_run(attempt, functools.partial(attempt, pattern)), [n_heads], "[head]", attempt.__name__)
            for pattern in [cache["pattern", layer] for layer in layers]
        ]
    )
    patterns = torch.stack([cache["pattern", layer] for layer in layers])
    scores = analysis.heads.score_heads(model, tokens, "previous_token")
    n_queries = patterns.shape[-1]

    def diagonal(offset: int) -> Tensor:
        return patterns.diagonal(offset, -2, -1)

    mistakes: Mistakes = [
        (
            "this is attention to the token itself, the main diagonal; the token before is one column to the left.",
            diagonal(0).mean((1, 3)),
        ),
        (
            "this is attention to the token after, which no head can see: the diagonal on the other side is wanted.",
            diagonal(1).mean((1, 3)),
        ),
        (
            "the first query is averaged over too, and it has no token before it.",
            scores * (n_queries - 1) / n_queries,
        ),
        ("this is a sum over queries, and their mean is asked for.", scores * (n_queries - 1)),
        ("this is the first row of the batch alone.", diagonal(-1)[:, 0].mean(-1)),
    ]
    _compare(found, scores, mistakes)
    layer, head = divmod(int(scores.argmax()), n_heads)
    return f"of all heads {layer}.{head} scores highest, {float(scores.max()):.2f}."


@_gives_verdict
def check_attribute_heads(
    attempt: Callable[[hl.HookedCausalLM, hl.ActivationCache, int, int], Tensor], folded: hl.HookedCausalLM
) -> str:
    """Exercise 4: each head's direct share of a logit difference."""
    answer, wrong = folded.to_single_token(" Mary"), folded.to_single_token(" John")
    _, cache = folded.run_with_cache(PROMPT)
    shape = [folded.cfg.n_layers, folded.cfg.n_heads]
    found = _as_table(
        _run(attempt, lambda: attempt(folded, cache, answer, wrong)), shape, "[layer head]", attempt.__name__
    )

    def attribute(incorrect: int | None = wrong, pos: int = -1) -> Tensor:
        frame = analysis.attribution.attribute_to_heads(folded, cache, answer, incorrect, pos=pos)
        return torch.tensor(frame["value"].tolist()[: shape[0] * shape[1]], dtype=torch.float64).view(shape)

    expected = attribute()
    scale = cache["ln_final.hook_scale"][0, -1].double()
    mistakes: Mistakes = [
        ("the sign is turned round: it is the answer's column of W_U minus the other token's.", -expected),
        (
            "the final norm is left out: divide by `cache['ln_final.hook_scale']` at the last position.",
            expected * scale,
        ),
        ("the final norm divides by its scale, and here it multiplies.", expected * scale * scale),
        ("layers and heads are exchanged in the result.", expected.T),
        ("this is the answer's logit alone: subtract the other token's column of W_U.", attribute(None)),
        ("this is read at the first position; the prediction is made at the last one, -1.", attribute(pos=0)),
    ]
    _compare(found, expected, mistakes)
    return f"the heads' shares sum to {float(expected.sum()):.2f} logits."


@_gives_verdict
def check_patch_heads(
    attempt: Callable[[hl.HookedCausalLM, Tensor, hl.ActivationCache, int, int], Tensor], model: hl.HookedCausalLM
) -> str:
    """Exercise 5: the logit difference of the corrupted run with one clean head at a time."""
    answer, wrong = model.to_single_token(" Mary"), model.to_single_token(" John")
    clean, corrupted = model.to_tokens(PROMPT), model.to_tokens(OTHER_PROMPT)
    logits, cache = model.run_with_cache(clean)
    n_layers, n_heads = shape = [model.cfg.n_layers, model.cfg.n_heads]
    found = _as_table(
        _run(attempt, lambda: attempt(model, corrupted, cache, answer, wrong)), shape, "[layer head]", attempt.__name__
    )
    metric = patching.LogitDiff(answer, wrong)
    expected = patching.sweep(model, clean, corrupted, "z", metric, progress=False).values

    def difference(out: Tensor, pos: int = -1) -> Tensor:
        return out[0, pos, answer] - out[0, pos, wrong]

    def run(edit: edits.Replace) -> Tensor:
        return difference(model.run_with_hooks(corrupted, edits=[edit]))

    whole = [run(edits.Replace(("z", layer), cache["z", layer])) for layer in range(n_layers)]
    at_end = [
        run(edits.Replace(("z", layer), cache["z", layer][:, -1, head], head=head, pos=-1))
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    start, end = difference(model(corrupted)), difference(logits)
    mistakes: Mistakes = [
        ("the sign is turned round: it is the answer's logit minus the other token's.", -expected),
        (
            "all entries are those of the corrupted run without a patch. Does the edit reach the call, and does its "
            "value come from the clean run's cache?",
            start.expand(shape),
        ),
        ("all entries are those of the clean run; it is the corrupted one that is patched.", end.expand(shape)),
        (
            "all heads of a layer are patched together. Take one: `cache['z', layer][:, :, head]` and `head=head`.",
            torch.stack(whole)[:, None].expand(shape),
        ),
        ("layers and heads are exchanged in the result.", expected.T),
        (
            "the logits are read at the first position, where no patch shows: read them at -1.",
            difference(logits, 0).expand(shape),
        ),
        ("this is on the scale from 0 to 1, and logits are asked for.", (expected - start) / (end - start)),
        (
            "heads are patched at the last position alone; without `pos` it is all of them.",
            torch.stack(at_end).view(shape),
        ),
    ]
    _compare(found, expected, mistakes)
    layer, head = divmod(int(expected.argmax()), n_heads)
    return f"head {layer}.{head} takes the difference from {float(start):.2f} to {float(expected.max()):.2f}."


@_gives_verdict
def check_copying_score(attempt: Callable[[hl.HookedCausalLM, int, int], float], folded: hl.HookedCausalLM) -> str:
    """Exercise 6: the eigenvalue score of a head's OV circuit from token to logit."""
    heads = [(3, 3), (3, 2), (1, 0)]
    answers = [
        _as_number(_run(attempt, functools.partial(attempt, folded, *place)), attempt.__name__) for place in heads
    ]
    scores = analysis.copying.copying_scores(folded)["eigenvalue_score"].tolist()
    expected = torch.tensor([scores[layer * folded.cfg.n_heads + head] for layer, head in heads], dtype=torch.float64)
    around = folded.W_U @ folded.W_E

    def collect(build: Callable[[int, int], Tensor], *, as_share: bool) -> Tensor:
        every = [torch.linalg.eigvals(build(*place).double()) for place in heads]
        sums = torch.stack([one.sum().real for one in every])
        return sums / torch.stack([one.abs().sum() for one in every]) if as_share else sums

    mistakes: Mistakes = [
        ("the sign is turned round.", -expected),
        (
            "W_E and W_U are missing: this is W_V W_O, from stream to stream.",
            collect(lambda layer, head: folded.W_O[layer, head] @ folded.W_V[layer, head], as_share=True),
        ),
        (
            "this is the sum of the eigenvalues: divide it by the sum of their sizes, `.abs().sum()`.",
            collect(lambda layer, head: folded.W_O[layer, head] @ around @ folded.W_V[layer, head], as_share=False),
        ),
        (
            "layer and head are exchanged: `W_V[layer, head]`.",
            collect(lambda layer, head: folded.W_O[head, layer] @ around @ folded.W_V[head, layer], as_share=True),
        ),
    ]
    _compare(torch.stack(answers), expected, mistakes)
    return f"head 3.3 has {float(expected[0]):.2f}: against what it reads. Head 3.2: {float(expected[1]):.2f}."


@_gives_verdict
def check_enough_and_needed(
    attempt: Callable[[hl.HookedCausalLM, Tensor, Tensor, int, int], tuple[float, float]], model: hl.HookedCausalLM
) -> str:
    """Exercise 7: what one head's clean output restores, and what its corrupted output takes."""
    clean, corrupted = model.to_tokens(PROMPT), model.to_tokens(OTHER_PROMPT)
    layer, head = 2, 0
    found = _run(attempt, lambda: attempt(model, clean, corrupted, layer, head))
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise NotYet(f"{attempt.__name__} gives {found!r}; two numbers are asked for, (enough, needed).")
    pair = torch.stack([_as_number(one, attempt.__name__) for one in found])
    metric = patching.LogitDiff(" Mary", " John")
    denoised = patching.sweep(model, clean, corrupted, "z", metric, progress=False)
    noised = patching.sweep(model, clean, corrupted, "z", metric, direction="noise", progress=False)
    enough, needed = (result.normalized[layer, head] for result in (denoised, noised))
    expected = torch.stack([enough, needed])
    mistakes: Mistakes = [
        (
            "the two are exchanged: (clean head into the corrupted run, corrupted head into the clean run).",
            expected.flip(0),
        ),
        (
            "these are logits. Put each on its scale: 0 is the patched run, 1 the run that the head comes from.",
            torch.stack([denoised.values[layer, head], noised.values[layer, head]]),
        ),
        (
            "the second is what is left of the difference; asked for is what is lost of it.",
            torch.stack([enough, 1 - needed]),
        ),
        ("the sign of the second is turned round: what is lost counts as positive.", torch.stack([enough, -needed])),
        ("both are what denoising restores; for the second the clean run is patched.", torch.stack([enough, enough])),
    ]
    _compare(pair, expected, mistakes)
    return f"head {layer}.{head} restores {float(enough):.3f}, and without it {float(needed):.3f} is lost."
