"""Runs of a model under interchange interventions, which start at the block and the position of the site.

Below that block and before that position a run under intervention is the base prompt's own, so its stream and its keys
and values are taken once, and only the rest runs. They and the source activations are kept for all rows where they fit
into a share of the free memory, and are made anew for each batch where they do not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.alignment.causal.counterfactuals import Counterfactuals
from hooklens.alignment.errors import AlignmentError
from hooklens.alignment.site import Site, find_place
from hooklens.arguments import require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.free import assume_free_bytes
from hooklens.hooks.edits import Edit
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.patching.runs.checks import check_model
from hooklens.patching.runs.memory import BatchSize, tokens_per_pass
from hooklens.precision import widen

_SHARE_OF_FREE_MEMORY = 0.25
# A pass over more tokens is no faster per token on a CPU, and its graph would only take memory.
_GRADED_TOKENS_ON_CPU = 1024

Bases = Mapping[str, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Batch:
    """Some rows, ready to run.

    Attributes:
        entering: the stream that enters the site's block, `[row pos d_model]`, or token ids `[row pos]`; of the
            positions that run.
        past: the base runs' keys and values before these; None: there are none.
        sources: by variable, the source runs' vectors at the site, `[row position d]`.
        labels: `[row]`.
    """

    entering: Tensor
    past: HookedKeyValueCache | None
    sources: Mapping[str, Float[Tensor, "row position d"]]
    labels: Int[Tensor, " row"]


def check_data(model: HookedCausalLM, data: object, *, what: str) -> Counterfactuals:
    """Refuse counterfactuals that a model cannot run, and models whose runs are not the plain ones.

    Raises:
        AlignmentError: no counterfactuals, or tokens, labels or lengths that the model does not have.
        InputError: training mode, hooks attached to the model, or a network that is not causal.
    """
    require(model, kind=HookedCausalLM, what=f"{what}: model", expected="a HookedCausalLM", error=AlignmentError)
    rows: Counterfactuals = require(
        data, kind=Counterfactuals, what=f"{what}: data", expected="alignment.Counterfactuals", error=AlignmentError
    )
    check_model(model, allow_training=False)
    cfg = model.cfg
    ends = [
        (word, int(tokens.min()), int(tokens.max()), size)
        for word, tokens, size in (
            ("base", rows.base, cfg.d_vocab),
            *((f"sources[{name!r}]", tokens, cfg.d_vocab) for name, tokens in rows.sources.items()),
            ("labels", rows.labels, cfg.d_vocab_out),
        )
    ]
    problems = [
        f"{word} go from {low} to {high}, and there are {size}"
        for word, low, high, size in ends
        if low < 0 or high >= size
    ]
    if rows.base.shape[1] > cfg.n_ctx:
        problems.append(f"prompts have {rows.base.shape[1]} tokens, and the model takes {cfg.n_ctx}")
    if problems:
        raise AlignmentError(f"{what}: the data do not fit the model: {'; '.join(problems)}")
    return rows


class InterchangeRuns:
    """Runs of counterfactuals with interchanges at one site.

    Args:
        model: the model.
        data: the rows.
        site: where.
        batch_size: rows that run at once; `"auto"`: by memory.
    """

    def __init__(
        self, model: HookedCausalLM, data: Counterfactuals, site: Site | str, *, batch_size: BatchSize = "auto"
    ) -> None:
        self.model, self.data = model, data
        self.place = find_place(model, site, data.base.shape[1])
        width = data.base.shape[1]
        self.rows_per_pass = (
            batch_size
            if batch_size != "auto"
            else max(1, tokens_per_pass(model, width, 1, watches_pattern=False) // width)
        )
        self._first, self._stop = self._find_columns(width)
        self._keeps = self._bytes_of(len(data)) < _SHARE_OF_FREE_MEMORY * assume_free_bytes(model.device)
        self._kept: Batch | None = None

    @property
    def _read_at(self) -> int:
        """The answer's position, counted from 0."""
        return self.data.pos % self.data.base.shape[1]

    def _find_columns(self, width: int) -> tuple[int, int]:
        """The columns that run: from the first that is changed or read to the last."""
        at = (*self.place.positions, self._read_at)
        if self.place.layer is None or self.model.depends_on_length(width):
            return 0, width
        return min(at), max(at) + 1

    @property
    def rows_per_graded_pass(self) -> int:
        """How many rows run at once with gradients."""
        n_blocks = self.model.cfg.n_layers - (self.place.layer or 0)
        if self.model.device.type == "cpu":
            return max(1, min(self.rows_per_pass, _GRADED_TOKENS_ON_CPU // (self._stop - self._first)))
        return max(1, self.rows_per_pass // (1 + n_blocks))

    def groups(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows in groups that run at once."""
        for first in range(0, len(rows), self.rows_per_pass):
            yield list(rows[first : first + self.rows_per_pass])

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows, ready to run."""
        if not self._keeps:
            return self._make(rows)
        if self._kept is None:
            parts = [self._make(group) for group in self.groups(range(len(self.data)))]
            pasts = [part.past for part in parts if part.past is not None]
            self._kept = Batch(
                torch.cat([part.entering for part in parts]),
                _join(pasts) if pasts else None,
                {name: torch.cat([part.sources[name] for part in parts]) for name in self.data.variables},
                torch.cat([part.labels for part in parts]),
            )
        chosen = torch.tensor(list(rows), device=self.model.device)
        return Batch(
            self._kept.entering[chosen],
            None if self._kept.past is None else self._kept.past.select(list(rows)).freeze(),
            {name: vectors[chosen] for name, vectors in self._kept.sources.items()},
            self._kept.labels[chosen],
        )

    def logits(self, batch: Batch, bases: Bases | None) -> Float[Tensor, "row d_vocab"]:
        """The logits at the answer's position under the interchange; with gradients where these are switched on.

        Args:
            batch: the rows.
            bases: by variable, orthonormal rows and shares; None: whole vectors, of one variable; empty: nothing.
        """
        edits: Sequence[Edit] = self.place.edits(bases, batch.sources)
        logits: Tensor = self.model.run_with_hooks(
            batch.entering,
            edits=edits,
            start_at_layer=self.place.layer,
            attention_mask=torch.ones(batch.entering.shape[:2], dtype=torch.long, device=batch.entering.device),
            past_kv_cache=batch.past,
            logits_at=[self._read_at - self._first],
        )
        return logits[:, 0]

    def margins(self, bases: Bases | None) -> Float[Tensor, " row"]:
        """By how much each label's logit leads the best other one under the interchange, in float32 at least."""
        found = []
        with torch.no_grad():
            for rows in self.groups(range(len(self.data))):
                batch = self.batch(rows)
                found.append(margin_of(self.logits(batch, bases), batch.labels))
        return torch.cat(found)

    def vectors(self) -> tuple[Float[Tensor, "row position d"], dict[str, Float[Tensor, "row position d"]]]:
        """The activations at the site of the base prompts and of the sources of each variable."""
        with torch.no_grad():
            tokens = {"": self.data.base, **self.data.sources}
            found = {
                name: torch.cat([self._read(ids[rows])[1] for rows in self.groups(range(len(ids)))])
                for name, ids in tokens.items()
            }
        return found.pop(""), found

    @torch.no_grad()
    def _make(self, rows: Sequence[int]) -> Batch:
        chosen = list(rows)
        base = self.data.base[chosen].to(self.model.device)
        past = None
        if self._first:
            past = HookedKeyValueCache.init_cache(self.model.cfg, self.model.device, len(base), dtype=self.model.dtype)
        entering = base if self.place.layer is None else self._read(base, past)[0]
        sources = {name: self._read(tokens[chosen])[1] for name, tokens in self.data.sources.items()}
        return Batch(
            entering[:, self._first : self._stop],
            None if past is None else past.crop(self._first).freeze(),
            sources,
            self.data.labels[chosen].to(self.model.device),
        )

    def _read(
        self, tokens: Int[Tensor, "row pos"], past: HookedKeyValueCache | None = None
    ) -> tuple[Tensor, Float[Tensor, "row position d"]]:
        """The stream that enters the site's block (at a site in none: what the site has), and the site's vectors.

        An empty cache is filled with keys and values.
        """
        name, layer = self.place.site.name, self.place.layer
        stream = name if layer is None else f"blocks.{layer}.hook_resid_pre"
        ids = tokens.to(self.model.device)
        with self.model.capture([name, stream]) as captured:
            self.model(
                ids,
                attention_mask=torch.ones_like(ids),
                past_kv_cache=past,
                stop_at_layer=None if layer is None or past is not None else layer + 1,
                return_type="logits" if layer is None or past is None else None,
            )
        return captured[stream], self.place.read(captured[name])

    def _bytes_of(self, n_rows: int) -> int:
        cfg, width = self.model.cfg, self.data.base.shape[1]
        widest = max(cfg.d_model, cfg.mlp_width, cfg.d_head)
        of_row = (
            width * cfg.d_model
            + self._first * cfg.cache_width
            + len(self.data.variables) * len(self.place.positions) * widest
        )
        return n_rows * of_row * self.model.dtype.itemsize


def _join(caches: Sequence[HookedKeyValueCache]) -> HookedKeyValueCache:
    """The rows of several caches of one model, in one."""
    first = caches[0]
    entries = [
        HookedKeyValueCacheEntry(
            torch.cat([one.past_keys for one in layer]), torch.cat([one.past_values for one in layer]), frozen=True
        )
        for layer in zip(*(cache.entries for cache in caches), strict=True)
    ]
    return HookedKeyValueCache(
        entries,
        torch.cat([cache.previous_attention_mask for cache in caches]),
        frozen=True,
        fingerprint=first.fingerprint,
        transforms=first.transforms,
        adapters=first.adapters,
    )


def margin_of(logits: Float[Tensor, "row d_vocab"], labels: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """By how much the label's logit leads the best other one; above 0 where the label is the answer."""
    if logits.shape[1] < 2:
        raise AlignmentError(f"a margin needs two outputs; the logits are {show(logits)}")
    wide = widen(logits)
    own = wide.gather(1, labels[:, None])
    others = wide.scatter(1, labels[:, None], -torch.inf)
    return (own[:, 0] - others.amax(1)).detach()
