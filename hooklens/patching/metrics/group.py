"""Several metrics of the same runs: what they read together, and the part of it that each of them is measured from.

Logits are made at the positions that any of the metrics reads, of the tokens that any of them reads. Metrics that read
the same positions share them; each is measured from its own columns, so its values are those that it has alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Cells, Ends, Metric, Runs, Values, prepare_metric

Metrics = Metric | MetricFunction | Mapping[str, Metric | MetricFunction]
"""What an experiment measures: a metric, a function as one, or several by name."""

_Read = tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class MetricGroup:
    """The metrics of an experiment.

    Attributes:
        metrics: by the names that their results have.
        is_single: one metric was given, without a name of its own.
    """

    metrics: Mapping[str, Metric]
    is_single: bool = False

    @classmethod
    def read(cls, given: Metrics) -> "MetricGroup":
        """The metrics that a caller gives.

        Raises:
            MetricError: no metric, a name that is no text, or what is neither metric nor function; all are named.
        """
        if not isinstance(given, Mapping):
            metric = as_metric(given)
            return cls({metric.name: metric}, is_single=True)
        if not given:
            raise MetricError("metric is an empty mapping; expected at least one metric by its name")
        names = [name for name in given if not isinstance(name, str)]
        if names:
            raise MetricError(f"metric: the names {show(names)} are no texts; expected a mapping from name to metric")
        wrong = [
            f"{name!r} is {show(one)}" for name, one in given.items() if not (isinstance(one, Metric) or callable(one))
        ]
        if wrong:
            raise MetricError(f"metric: {', '.join(wrong)}; expected metrics, or functions from logits")
        return cls({name: as_metric(one) for name, one in given.items()})

    @property
    def name(self) -> str:
        """What an error calls the metrics."""
        return ", ".join(metric.name for metric in self.metrics.values())

    @property
    def needs_all_pairs(self) -> bool:
        """Whether one of them cannot be measured for some of the pairs alone."""
        return any(metric.needs_all_pairs for metric in self.metrics.values())

    @property
    def n_positions(self) -> int | None:
        """How many positions are read in each prompt; None: all, and some of them more than once."""
        blocks = self._blocks()
        return None if None in blocks else sum(len(block) for block in blocks if block is not None)

    def find_reads(self, lengths: tuple[int, ...], width: int) -> list[list[int]]:
        """The columns read in each of some prompts, those of one metric after those of another.

        Raises:
            SiteError: a position that a prompt does not have, or that two numbers of one metric name.
        """
        of_blocks = []
        for block in self._blocks():
            metric = next(one for one in self.metrics.values() if _read_by(one) == block)
            of_blocks.append(metric.find_reads(lengths, width))
        return [[column for columns in rows for column in columns] for rows in zip(*of_blocks, strict=True)]

    def encode(self, model: HookedCausalLM) -> "MetricGroup":
        """The metrics with texts replaced by the model's token ids.

        Raises:
            InputError: a text that is no single token, or an id outside the vocabulary.
        """
        return self._of({name: metric.encode(model) for name, metric in self.metrics.items()})

    def tokens_read(self, runs: Runs) -> set[int] | None:
        """The tokens whose logits any of them reads; None: all."""
        read: set[int] = set()
        for metric in self.metrics.values():
            tokens = metric.tokens_read(runs)
            if tokens is None:
                return None
            read |= tokens
        return read

    def among(self, places: Int[Tensor, " d_vocab"]) -> "MetricGroup":
        """The metrics for logits of some tokens only, which stand at these places."""
        return self._of({name: metric.among(places) for name, metric in self.metrics.items()})

    def prepare(self, runs: Runs) -> "MetricGroup":
        """The metrics for some pairs, with token ids, references and padding filled in.

        Raises:
            InputError: see `Metric.prepare`.
        """
        return self._of({name: prepare_metric(metric, own) for name, metric, own in self._own_runs(runs)})

    def measure_ends(self, runs: Runs) -> list[Ends]:
        """Of each metric the values of the unpatched clean and corrupted run."""
        return [metric.measure_ends(own) for _, metric, own in self._own_runs(runs)]

    def measure(self, logits: Cells) -> list[Values]:
        """The values of each, from the logits at the positions that any of them reads. They must be prepared."""
        return [metric.measure(self._own_columns(metric, logits)) for metric in self.metrics.values()]

    def _of(self, metrics: Mapping[str, Metric]) -> "MetricGroup":
        return MetricGroup(metrics, self.is_single)

    def _own_runs(self, runs: Runs) -> Iterator[tuple[str, Metric, Runs]]:
        for name, metric in self.metrics.items():
            clean, corrupted = (self._own_columns(metric, end) for end in (runs.clean_logits, runs.corrupted_logits))
            yield name, metric, replace(runs, clean_logits=clean, corrupted_logits=corrupted)

    def _blocks(self) -> list[_Read]:
        """The positions read, once for all metrics that read the same."""
        return list(dict.fromkeys(_read_by(metric) for metric in self.metrics.values()))

    def _own_columns(self, metric: Metric, logits: Float[Tensor, "*rows read d_vocab"]) -> Tensor:
        """The logits that one metric reads."""
        blocks = self._blocks()
        if len(blocks) == 1:
            return logits
        known = sum(len(block) for block in blocks if block is not None)
        sizes = [logits.shape[-2] - known if block is None else len(block) for block in blocks]
        return torch.split(logits, sizes, dim=-2)[blocks.index(_read_by(metric))]


def _read_by(metric: Metric) -> _Read:
    return None if metric.positions is None else tuple(metric.positions)
