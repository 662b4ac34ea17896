"""Scores of candidate directions on held-out prompts: what ablating and adding each of them does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, reads, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError
from hooklens.evaluation.batching import BatchSize, plan_batches
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Add, Edit, Project
from hooklens.progress import progress_bar
from hooklens.steering.activations import Padded, Prompts
from hooklens.steering.errors import SteeringError
from hooklens.steering.vectors import SteeringVector

_STREAM = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")


@reads()
def ablate_everywhere(model: HookedCausalLM, vector: SteeringVector | Float[Tensor, " d_model"]) -> list[Edit]:
    """The edits after which nothing in the residual stream lies along a direction (Arditi et al. 2024, section 2.4).

    The stream that enters each block and what attention and MLPs add to it lose their part along the direction.

    Args:
        model: says which points there are.
        vector: of the stream; its length is of no account.

    Raises:
        SteeringError: it is no direction of the stream.
    """
    if isinstance(vector, SteeringVector):
        vector.check(model)
    direction = vector.direction if isinstance(vector, SteeringVector) else vector
    if not isinstance(direction, Tensor) or direction.shape != (model.cfg.d_model,):
        raise refusal(direction, "vector", f"a direction of the stream, [{model.cfg.d_model}]", SteeringError)
    points = [name for name in model.cfg.description.points if name.split(".")[-1] in _STREAM]
    # What the last block has added is in no block's input, but has lost its part already.
    return [Project(points, direction)]


def read_tokens_of_behaviour(model: HookedCausalLM, given: object) -> Int[Tensor, " tokens"]:
    """The ids of tokens that show a behaviour.

    Raises:
        SteeringError: no tokens, a text that is no single token, an id outside the vocabulary, or one named twice.
    """
    listed = [given] if isinstance(given, str | int) else given
    listed = listed.tolist() if isinstance(listed, Tensor) else listed
    if not isinstance(listed, Sequence) or not listed:
        raise refusal(given, "tokens", "token ids, or texts of one token each", SteeringError)
    n_outputs, ids = model.cfg.size("d_vocab_out"), []
    for one in listed:
        try:
            if isinstance(one, str):
                ids.append(model.to_single_token(one))
            else:
                ids.append(read_int(one, what="an id", least=0, most=n_outputs - 1))
        except HookLensError as error:
            raise SteeringError(f"tokens: {error}") from error
    if len(set(ids)) < len(ids) or len(ids) == n_outputs:
        raise SteeringError(
            f"tokens name {len(ids)} tokens, {len(set(ids))} of them different, in a vocabulary of {n_outputs}; "
            "expected each once, and not all of them"
        )
    return torch.tensor(ids)


def log_odds(logits: Float[Tensor, "batch d_vocab"], tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " batch"]:
    """The log-odds that one of some tokens comes next, in nats, in float64."""
    wide = logits.double()
    others = torch.ones(wide.shape[-1], dtype=torch.bool, device=wide.device)
    others[tokens.to(wide.device)] = False
    return wide[:, ~others].logsumexp(-1) - wide[:, others].logsumexp(-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class CandidateScores:
    """Scores of candidates, over held-out prompts; log-odds and divergences in nats.

    Attributes:
        bypass: the mean log-odds of the behaviour on positive prompts while the candidate is ablated everywhere.
        induce: the mean log-odds on negative prompts while it is added at its layer.
        kl: the mean divergence of the last token's predictions on negative prompts, from the plain model's to those
            while the candidate is ablated everywhere.
        positive, negative: the mean log-odds without any edit.
    """

    bypass: Float[Tensor, " candidates"]
    induce: Float[Tensor, " candidates"]
    kl: Float[Tensor, " candidates"]
    positive: float
    negative: float


class CandidateRuns:
    """Runs held-out prompts with each candidate.

    Args:
        model: runs.
        directions: the candidates.
        layers: of each candidate, the block whose input it is of.
        tokens: those that show the behaviour.
        add_at: the positions that a candidate is added at; None: all.
        batch_size: prompts at once.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        directions: Float[Tensor, "candidates d_model"],
        layers: Sequence[int],
        tokens: Int[Tensor, " tokens"],
        *,
        add_at: Choice,
        batch_size: BatchSize,
        progress: bool,
    ) -> None:
        self._model, self._directions, self._layers = model, directions, list(layers)
        self._tokens, self._add_at = tokens, add_at
        self._batch_size: BatchSize = batch_size
        self._progress = progress

    @torch.no_grad()
    def score(self, positive: Prompts, negative: Prompts) -> CandidateScores:
        """The scores of all candidates."""
        n = len(self._layers)
        bypass, induce, kl = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        plain = {"positive": 0.0, "negative": 0.0}
        total = n * (len(positive) + 2 * len(negative))
        with progress_bar("candidates", total=total, unit="run", progress=self._progress) as bar:
            for batch in self._batches(positive):
                plain["positive"] += float(self._odds(self._run(batch, [])).sum())
                for candidate in range(n):
                    bypass[candidate] += self._odds(self._run(batch, self._ablate(candidate))).sum().cpu()
                    bar.update(len(batch.ids))
            for batch in self._batches(negative):
                logits, streams = self._run_plain(batch)
                logprobs = logits.double().log_softmax(-1)
                plain["negative"] += float(self._odds(logits).sum())
                for candidate in range(n):
                    ablated = self._run(batch, self._ablate(candidate)).double().log_softmax(-1)
                    kl[candidate] += (logprobs.exp() * (logprobs - ablated)).sum().cpu()
                    induce[candidate] += self._odds(self._add(batch, candidate, streams)).sum().cpu()
                    bar.update(2 * len(batch.ids))
        n_positive, n_negative = len(positive), len(negative)
        return CandidateScores(
            bypass=bypass / n_positive,
            induce=induce / n_negative,
            kl=kl / n_negative,
            positive=plain["positive"] / n_positive,
            negative=plain["negative"] / n_negative,
        )

    def _batches(self, prompts: Prompts) -> list[Padded]:
        plan = plan_batches(self._model, prompts.lengths, n_prefix=0, batch_size=self._batch_size)
        return [prompts.take(indices).pad(self._model.device) for indices in plan]

    def _odds(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        return log_odds(logits, self._tokens)

    def _ablate(self, candidate: int) -> list[Edit]:
        return ablate_everywhere(self._model, self._directions[candidate])

    def _run(self, batch: Padded, edits: list[Edit]) -> Float[Tensor, "batch d_vocab"]:
        """Logits at each prompt's last token."""
        logits: Tensor = self._model.run_with_hooks(batch.ids, attention_mask=batch.mask, edits=edits, logits_at=-1)
        return logits[:, 0]

    def _run_plain(
        self, batch: Padded
    ) -> tuple[Float[Tensor, "batch d_vocab"], dict[int, Float[Tensor, "batch pos d_model"]]]:
        names = {layer: f"blocks.{layer}.hook_resid_pre" for layer in set(self._layers)}
        logits, cache = self._model.run_with_cache(
            batch.ids, attention_mask=batch.mask, names_filter=list(names.values()), logits_at=-1
        )
        return logits[:, 0], {layer: cache[name] for layer, name in names.items()}

    def _add(
        self, batch: Padded, candidate: int, streams: dict[int, Float[Tensor, "batch pos d_model"]]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Blocks below the candidate's run as without it, so their result is taken over."""
        layer = self._layers[candidate]
        direction = self._directions[candidate].to(streams[layer])
        logits: Tensor = self._model.run_with_hooks(
            streams[layer],
            attention_mask=batch.mask,
            start_at_layer=layer,
            logits_at=-1,
            edits=[Add(f"blocks.{layer}.hook_resid_pre", direction, pos=self._add_at)],
        )
        return logits[:, 0]
