"""The two unpatched runs of some pairs: as one batch, or prompt by prompt where edits let nothing go on from one."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.axes import find_site, is_past_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.call import NOBODY, Listeners, join_listeners
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.patching.runs.acting import GroupEdits, Places
from hooklens.patching.runs.noised import add_noise
from hooklens.patching.runs.other_model import run_other_model, unembed_other_model
from hooklens.patching.runs.vocabulary import Vocabulary, unembed

Source = Literal["other", "zero"] | Mapping[str, Tensor] | HookedCausalLM

_OVER_TOKENS = ("pos", "query", "key")


class Side(NamedTuple):
    """The prompts of one run of some pairs, and the noise on their embeddings."""

    tokens: Int[Tensor, "pairs pos"]
    noise: Float[Tensor, "pairs pos d_model"] | None = None


class Ran(NamedTuple):
    """Both unpatched runs: activations by hook name, the stream of `into` entering each block and leaving the last,
    the one that left the last block of the run that activations come from, what `into` has cached (before what the
    other run has, where the model made both), and the logits that are read, of `into` and of the other run where the
    model made it, if they were made in the runs.
    """

    into: dict[str, Tensor]
    other: dict[str, Tensor]
    streams: list[Float[Tensor, "pairs pos d_model"]]
    other_last: Float[Tensor, "pairs pos width"]
    cached: list[HookedKeyValueCacheEntry]
    logits: Sequence[Float[Tensor, "pairs read d_vocab"]] = ()


def run_both(
    model: HookedCausalLM,
    source: Source,
    into: Side,
    other: Side,
    lengths: tuple[int, ...],
    names: list[str],
    edits: GroupEdits | None,
) -> Ran:
    """Run both prompts of each pair, as one batch unless another model makes one of the runs."""
    n_layers = model.cfg.n_layers
    last = f"blocks.{n_layers - 1}.hook_resid_post"
    entering = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    watched = [*entering, *names, last]
    mask = None
    if len(set(lengths)) > 1:
        mask = _real_tokens(into.tokens, lengths)
    if isinstance(source, HookedCausalLM):
        captured, cached = run_unpatched(model, into, mask, watched, edits)
        theirs = run_other_model(model, source, other.tokens, mask, names)
        return Ran(captured, theirs.captured, [captured[name] for name in (*entering, last)], theirs.last, cached)
    both = None if mask is None else mask.repeat(2, 1)
    captured, cached = run_unpatched(model, _join(into, other), both, watched, edits)
    own, others = ({name: tensor.chunk(2)[half] for name, tensor in captured.items()} for half in (0, 1))
    return Ran(own, others, [own[name] for name in (*entering, last)], others[last], cached)


def run_both_alone(
    model: HookedCausalLM,
    source: Source,
    into: Side,
    other: Side,
    lengths: tuple[int, ...],
    names: list[str],
    edits: GroupEdits | None,
    reads: Int[Tensor, "pairs read"],
) -> Ran:
    """Run every prompt by itself, from its tokens to its logits."""
    assert edits is not None
    own = _run_alone(model, into, lengths, names, edits, reads)
    if isinstance(source, HookedCausalLM):
        theirs = run_other_model(model, source, other.tokens, _real_tokens(into.tokens, lengths), names)
        return Ran(own.captured, theirs.captured, [], theirs.last, [], [own.logits])
    others = _run_alone(model, other, lengths, names, edits, reads)
    return Ran(own.captured, others.captured, [], others.logits, [], [own.logits, others.logits])


def _real_tokens(tokens: Int[Tensor, "pairs pos"], lengths: Sequence[int]) -> Bool[Tensor, "pairs pos"]:
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return columns < torch.tensor(lengths, device=tokens.device)[:, None]


def _join(into: Side, other: Side) -> Side:
    """Both runs as one batch; what has no noise gets zeros where the other has some."""
    tokens, noises = torch.cat([into.tokens, other.tokens]), (into.noise, other.noise)
    there = next((noise for noise in noises if noise is not None), None)
    if there is None:
        return Side(tokens)
    return Side(tokens, torch.cat([torch.zeros_like(there) if noise is None else noise for noise in noises]))


def run_unpatched(
    model: HookedCausalLM,
    side: Side,
    mask: Bool[Tensor, "rows pos"] | None,
    names: list[str],
    edits: GroupEdits | None,
) -> tuple[dict[str, Tensor], list[HookedKeyValueCacheEntry]]:
    """Run prompts as one batch: the activations at some hook points, and keys and values.

    Args:
        model: the model.
        side: the prompts, one set of the edits' pairs after another.
        mask: real tokens; None: all are.
        names: the hook points.
        edits: what acts.
    """
    cache, tokens = None, side.tokens
    if edits is None or not edits.of_run.needs_whole_rows:
        cache = HookedKeyValueCache.init_cache(model.cfg, model.device, len(tokens), dtype=model.dtype)
    reads_head = any(map(is_past_blocks, names))
    listeners = add_noise(model, side.noise)
    if edits is not None:
        acting = [name for name in edits.acting if reads_head or not is_past_blocks(name)]
        standing = edits.listeners(model, edits.places(len(tokens), tokens.shape[1]), acting)
        listeners = join_listeners([listeners, standing])
    with model.capture(list(dict.fromkeys(names))) as captured:
        plan = model.make_plan(tokens, mask, None, cache)
        model.run(tokens, plan, listeners=listeners, past_kv_cache=cache, unembed=reads_head)
    return captured, [] if cache is None else list(cache.entries)


def read_logits(
    model: HookedCausalLM,
    source: Source,
    ran: Ran,
    reads: Int[Tensor, "pairs read"],
    vocabulary: Vocabulary | None,
    edits: GroupEdits | None,
) -> tuple[Tensor, Tensor]:
    """The logits of both unpatched runs at the positions that the metric reads."""
    if len(ran.logits) == 2:
        return ran.logits[0], ran.logits[1]
    is_own = not isinstance(source, HookedCausalLM)
    streams = [ran.other_last] if ran.logits else [ran.streams[-1], ran.other_last]
    read = [stream.take_along_dim(reads.to(stream.device)[..., None], dim=1) for stream in streams]
    listeners: Listeners = NOBODY
    if edits is not None:
        n_rows = 2 * len(reads) if is_own else len(reads)
        places = Places(torch.arange(n_rows, device=reads.device) % len(reads), reads.repeat(n_rows // len(reads), 1))
        listeners = edits.listeners(model, places, edits.names_in_head)
    if isinstance(source, HookedCausalLM):
        logits = unembed_other_model(source, read[-1], vocabulary).to(model.device, model.dtype)
        if ran.logits:
            return ran.logits[0], logits
        return unembed(model, read[0], listeners=listeners, vocabulary=vocabulary), logits
    into_logits, other_logits = unembed(model, torch.cat(read), listeners=listeners, vocabulary=vocabulary).chunk(2)
    return into_logits, other_logits


class _Alone(NamedTuple):
    """What some prompts did: activations by hook name, padded on the right, and the logits that are read."""

    captured: dict[str, Tensor]
    logits: Float[Tensor, "pairs read d_vocab"]


def _run_alone(
    model: HookedCausalLM,
    side: Side,
    lengths: Sequence[int],
    names: Sequence[str],
    edits: GroupEdits,
    reads: Int[Tensor, "pairs read"],
) -> _Alone:
    """Run each prompt by itself, under edits.

    Args:
        model: the model.
        side: the prompts, padded on the right.
        lengths: tokens of each.
        names: the hook points whose activations are kept.
        edits: what acts; pair `i` of it is prompt `i`.
        reads: columns whose logits are kept; those past a prompt's end stand for its last one.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    logits = []
    for pair, length in enumerate(lengths):
        with model.capture(list(names) or "hook_embed") as captured:
            logits.append(run_one(model, side, pair, length, edits.of_one(model, pair), reads[pair]))
        for name, parts in kept.items():
            parts.append(_pad(name, captured[name], side.tokens.shape[1]))
    return _Alone({name: torch.cat(parts) for name, parts in kept.items()}, torch.stack(logits))


def run_one(
    model: HookedCausalLM,
    side: Side,
    pair: int,
    length: int,
    listeners: Listeners,
    reads: Int[Tensor, " read"],
    *,
    last: Listeners | None = None,
) -> Float[Tensor, "read d_vocab"]:
    """The logits of one prompt, from its tokens on.

    Args:
        model: the model.
        side: the prompts, padded on the right.
        pair: which of them is run.
        length: its tokens.
        listeners: what acts.
        reads: columns whose logits are given; those past the prompt's end stand for its last one.
        last: what acts after that, at one hook point.
    """
    rows = side.tokens[pair : pair + 1, :length]
    noise = None if side.noise is None else side.noise[pair : pair + 1, :length]
    heard = join_listeners([add_noise(model, noise), listeners, {} if last is None else last])
    logits = model.run(rows, model.make_plan(rows), listeners=heard)
    return logits[0, reads.clamp(max=length - 1)]


def _pad(name: str, tensor: Tensor, width: int) -> Tensor:
    """An activation of one prompt, with room for the tokens of a longer one."""
    site = find_site(name)
    assert site is not None
    sizes = [width - tensor.shape[axis] if word in _OVER_TOKENS else 0 for axis, word in enumerate(site.axes)]
    return F.pad(tensor, [pad for size in reversed(sizes) for pad in (0, size)])
