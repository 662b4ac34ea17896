"""Unembedding: the logits of a stream, of all tokens or of those alone that a metric reads.

With a vocabulary of 50,000 the unembedding costs as much as several blocks, and a logit difference reads two of its
columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.axes import is_past_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import Call
from hooklens.hooks.call import NOBODY, Listeners, thread_listeners
from hooklens.model.embed import TiedUnembed
from hooklens.model.parts.part import is_plain
from hooklens.model.plan.positions import TokenPlan
from hooklens.patching.metrics.group import MetricGroup
from hooklens.patching.metrics.metric import Runs

# Columns that are picked are copied, so it pays only where most are left out.
_FEW = 0.25


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Some tokens.

    Attributes:
        tokens: their ids, ascending.
        places: `[d_vocab]`, where each token stands among them, -1 where it does not.
    """

    tokens: Int[Tensor, " token"]
    places: Int[Tensor, " d_vocab"]

    def narrow(self, metrics: MetricGroup, runs: Runs) -> tuple[MetricGroup, Runs]:
        """Metrics, and the answers that pairs bring along, for logits of these tokens."""
        answers, wrongs = (None if one is None else one.among(self.places) for one in (runs.answers, runs.wrongs))
        return metrics.among(self.places), replace(runs, answers=answers, wrongs=wrongs)


def find_vocabulary(metrics: MetricGroup, runs: Runs, names: Sequence[str]) -> Vocabulary | None:
    """The tokens that metrics read, where they are few and nothing else is to happen to logits.

    Args:
        metrics: encoded, and not prepared.
        runs: some pairs; their logits are not read.
        names: the hook points to be patched.
    """
    model = runs.model
    unembedding = model.unembed
    changes_logits = any(map(is_past_blocks, names))
    is_own = isinstance(unembedding, TiedUnembed) or is_plain(unembedding.get_submodule("proj"))
    call = Call(thread_listeners(), TokenPlan(batch=1, n_new=1, device=model.device))
    if changes_logits or not is_own or model.listens_past_blocks(call):
        return None
    read = metrics.tokens_read(runs)
    d_vocab = unembedding.W_U.shape[1]
    if read is None or len(read) > _FEW * d_vocab:
        return None
    tokens = torch.tensor(sorted(read), device=model.device)
    places = torch.full((d_vocab,), -1, device=model.device)
    places[tokens] = torch.arange(len(tokens), device=model.device)
    return Vocabulary(tokens, places)


def unembed(
    model: HookedCausalLM,
    stream: Float[Tensor, "rows pos d_model"],
    *,
    listeners: Listeners = NOBODY,
    vocabulary: Vocabulary | None = None,
) -> Float[Tensor, "rows pos tokens"]:
    """The logits of a stream that has left the last block, of some tokens or all.

    With a vocabulary, hook points past the last block do not fire.
    """
    plan = TokenPlan(batch=len(stream), n_new=stream.shape[1], device=stream.device)
    if vocabulary is None:
        return model.run(stream, plan, listeners=listeners, start_at_layer=model.cfg.n_layers)
    normed = stream if model.ln_final is None else model.ln_final(stream, Call(thread_listeners(), plan))
    return model.unembed.final_logits(normed, vocabulary.tokens)
