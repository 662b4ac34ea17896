"""Circuit discovery: edges are taken away one after another as long as the behaviour stays (ACDC).

Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability". From the logits
backwards, reader by reader and for each the writers from the last to the first, every edge is ablated for a try;
with `C` the circuit so far,

    removed for good  where  damage(C without the edge) - damage(C) < threshold

    damage(C) = mean over pairs of | m(C) - m(clean run) |

For `KL()`, the default, the clean run has 0, so the damage is the divergence itself. For `LogitDiff` and the other
metrics a circuit that overshoots is as damaged as one that falls short, and what pairs lose and gain does not
cancel. A node from which no edge leads on does nothing: its incoming edges are removed without a run.

A search follows the chance of its prompts, too, so a part of the pairs is held out, and the damage is told for these as
well (`holdout`).

The threshold is in the metric's units, and counts for each edge: many small losses may add up. What is found
depends on it, on the order, and on the ablation; it is a circuit that suffices, not the only one.

The search is sequential, but its outcome can be guessed. A batch holds one row for each of the next candidates, in
which all candidates before it are as guessed: removed, or what an earlier batch has shown. Rows are read in order
up to the first wrong guess, which is decided, too, and the next batch goes on behind it; what the rows behind it
showed are the next guesses. So the decisions are those of one run per edge, wherever an increase is not within
rounding of the threshold. Rows behind a wrong guess are run in vain, so a batch ends where one is to be expected, by
how often guesses of its kind were wrong of late; and where the search goes down to another layer, since all rows run
the nodes of any.

Where memory cannot hold what all pairs go on from, they are run without a patch anew for each batch, which costs as
much as many rows; so where few pairs are held, the guesses of a batch are first made by these.

The run of the circuit so far is kept. A candidate differs from it in one reader, so only that node is run, and those
that its change reaches over edges still in the circuit (`masked_run`): few, once most edges are gone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.arguments import read_seed, reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.discovery import Decision, Discovery, DiscoveryInterruptedError, DiscoveryStats, Verdict
from hooklens.patching.circuits.ground import Ground
from hooklens.patching.circuits.held_out import draw_held_out, read_holdout
from hooklens.patching.circuits.masked_run import MaskedRun
from hooklens.patching.circuits.reach import Masks
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.errors import MetricError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import check_additive, check_heads_apart
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.metrics.of_runs import KL
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions
from hooklens.patching.runs.tally import finish_or_keep
from hooklens.progress import progress_bar

# Fewer tokens take as long: what a pass costs beside them.
_TOKENS_OF_A_PASS = 32
# Where the unpatched prompts are run anew for each batch, they cost about as much as so many of its rows.
_ROWS_OF_A_GROUND = 16
# A batch ends where so many of its guesses are expected to be wrong: an eighth of the rows is then run in vain.
_WRONG_GUESSES = 0.25
# Edges that are kept lie beside each other, so only the last decisions tell how often the next guess is wrong.
_MEMORY = 0.9


@reads()
def discover_circuit(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    threshold: float,
    ablation: Ablation = "resample",
    holdout: float = 0.25,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> Discovery:
    """Find a circuit by taking edges away.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths for removed edges to take outputs from; or `patching.Noise`.
        metric: what must not change; None: `KL()` to the clean run's predictions at the last position.
        threshold: an edge is removed where that raises the damage by less than this, in the metric's units. At 0
            every edge stays that can be told from nothing, at infinity none.
        ablation: what removed edges carry, as for `evaluate_circuits`.
        holdout: the share of pairs, at least one, that the search does not see and its circuit is measured on. Of a
            single pair nothing is held out.
        seed: draws them. The global random state is neither read nor moved.
        batch_size: prompts run at once, circuits times pairs; `"auto"` by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        edits: values from `hooklens.edits` that act in every run: inside nodes, at their outputs, at the embeddings or
            behind the blocks; `Add` also in the stream. `hooklens.patching.runs.edits` says what their rows and
            positions are.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: a threshold below 0, a share that is none, leaves no pair to search on, or is of a metric that sees
            all pairs at once; prompts that do not go together, or a norm between heads and stream.
        EditError: an edit that does not fit the model or the prompts, or stands between nodes.
        MetricError: the metric gives another shape than one value per row, or NaN; or an unpatched run's is infinite.
        DiscoveryInterruptedError: stopped, or failed on the way; it holds what was decided.

    Example:
        >>> found = discover_circuit(model, clean, corrupted, threshold=0.05)
        >>> found.circuit.heads(), found.damage, found.held_out_damage
    """
    options = RunOptions.read(
        model, batch_size=batch_size, progress=progress, allow_training=allow_training, edits=edits
    )
    check_additive(model.cfg)
    check_heads_apart(model.cfg)
    is_number = isinstance(threshold, int | float | np.integer | np.floating) and not isinstance(threshold, bool)
    if not is_number or math.isnan(threshold) or threshold < 0:
        raise InputError(f"discover_circuit: threshold={show(threshold)}; expected a number >= 0 in the metric's units")
    share, drawn_by = read_holdout(holdout, what="discover_circuit"), read_seed(seed, what="discover_circuit: seed")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    if isinstance(metric, Mapping):
        raise MetricError(
            "discover_circuit decides every edge by one number; give one metric, and measure what it finds by several: "
            "evaluate_circuits(..., metric={...})"
        )
    measured = KL() if metric is None else as_metric(metric).encode(model)
    if len(prompts.apart) == 1:
        share = 0.0
    held_out = draw_held_out(prompts, measured, share, drawn_by, what="discover_circuit")
    with torch.no_grad():
        runner = CircuitRunner(
            model, prompts, measured, ablation=ablation, batch_size=options.batch_size, edits=options.edits
        )
        return _Search(runner, float(threshold), held_out).finish(progress=options.progress)


@dataclass(frozen=True)
class _Try:
    """An edge to decide: its row of the batch, where it has one, and the guess that later rows are built on.

    An earlier batch has `shown` the guess, or nothing has.
    """

    reader: int
    writer: int
    row: int | None
    removed: bool
    shown: bool = False


class _Search:
    """A search in progress: the edges still in the circuit, and those to come."""

    def __init__(self, runner: CircuitRunner, threshold: float, held_out: Bool[Tensor, " pair"]) -> None:
        self.runner, self.threshold, self.held_out = runner, threshold, held_out
        self.pairs, self.held_out_numbers = (part.nonzero()[:, 0].tolist() for part in (~held_out, held_out))
        self.held_out_damage: float | None = None
        graph = runner.graph
        self.kept = graph.exists()
        self.candidates = [
            (reader, writer)
            for reader in reversed(range(len(graph.readers)))
            for writer in reversed(range(graph.n_inputs[reader]))
        ]
        self.fed_by = runner.wiring.fed_by
        self.groups = list(runner.groups(self.pairs))
        self.held: dict[int, Ground] = {}
        self.runs: dict[int, MaskedRun] = {}
        # How often guesses were wrong of late: those that nothing had shown, and those that an earlier batch had.
        self.wrong = {False: 0.05, True: 0.05}
        self.decisions: list[Decision] = []
        self.guesses: dict[tuple[int, int], bool] = {}
        self.circuits_run = 0
        self.has_begun = False

    def finish(self, *, progress: bool) -> Discovery:
        """Decide all edges.

        Raises:
            DiscoveryInterruptedError: stopped on the way.
        """

        def work() -> None:
            most = self._prepare()
            # Before the first edge is tried, a failure is a mistake in the call and not an interruption.
            self.has_begun = True
            self._search(most, progress=progress)
            self.held.clear()
            self._measure_held_out()

        def stopped(why: str, partial: Discovery) -> Exception:
            return DiscoveryInterruptedError(
                f"the search stopped after {partial.stats.decided} of {len(self.candidates)} edges ({why}); this "
                "error's .result holds the decisions and, as its circuit, the edges kept and those not tried yet",
                partial,
            )

        return finish_or_keep(work, self.result, has_begun=lambda: self.has_begun, stopped=stopped)

    @property
    def damage(self) -> float:
        """The damage of the circuit so far."""
        removed = (each.damage for each in reversed(self.decisions) if each.verdict == "removed")
        return next((damage for damage in removed if damage is not None), 0.0)

    def _prepare(self) -> int:
        """Run the pairs without a patch, and hold as many of them as memory has room for; gives the rows of a batch."""
        # A held-out pair that cannot be measured is told before the search.
        for group in self.runner.groups(self.held_out_numbers):
            self.runner.prepare(group)
        first = self.held[0] = self.runner.prepare(self.groups[0])
        most = self.runner.rows_per_batch(first)
        n_held = self.runner.grounds_to_hold(first, most)
        for number in range(1, len(self.groups)):
            ground = self.runner.prepare(self.groups[number])
            if number < n_held:
                self.held[number] = ground
            most = min(most, self.runner.rows_per_batch(ground))
        return most

    def _search(self, most: int, *, progress: bool) -> None:
        with progress_bar("edges", total=len(self.candidates), unit="edge", progress=progress) as bar:
            while len(self.decisions) < len(self.candidates):
                before = len(self.decisions)
                plan, masks = self._plan(most)
                unshown = any(each.row is not None and not each.shown for each in plan)
                # A single row is decided, whatever the guess; and guesses by most pairs cost as much as decisions.
                if unshown and len(masks) > 1 and 2 * len(self.held) <= len(self.groups):
                    self._scout(plan, masks)
                    plan, masks = self._plan(most)
                self._decide(plan, self._measure(masks, range(len(self.groups))) if len(masks) else [])
                self.circuits_run += len(masks)
                bar.update(len(self.decisions) - before)
                bar.set_postfix(kept=sum(each.verdict == "kept" for each in self.decisions), refresh=False)

    def _plan(self, most: int) -> tuple[list[_Try], Masks]:
        """The next edges with their guesses, and the circuits to run."""
        fewest = -(-_TOKENS_OF_A_PASS // (len(self.pairs) * self.held[0].width))
        if len(self.held) < len(self.groups):
            fewest = _ROWS_OF_A_GROUND
        n_wrong, top = 0.0, None
        guessed = self.kept.clone()
        plan: list[_Try] = []
        masks: list[Tensor] = []
        for reader, writer in self.candidates[len(self.decisions) :]:
            feeds = self.fed_by[reader]
            if feeds and not bool(guessed[:, feeds].any()):
                guessed[reader, writer] = False
                plan.append(_Try(reader, writer, None, removed=True))
                continue
            shown = self.guesses.get((reader, writer))
            n_wrong += self.wrong[shown is not None]
            top = reader if top is None else top
            is_cheap = n_wrong <= _WRONG_GUESSES and self._stand_together(top, reader)
            if len(masks) == most or (len(masks) >= fewest and not is_cheap):
                break
            without = guessed.clone()
            without[reader, writer] = False
            removed = True if shown is None else shown
            plan.append(_Try(reader, writer, len(masks), removed, shown is not None))
            masks.append(without)
            guessed = without if removed else guessed
        return plan, torch.stack(masks) if masks else guessed[None][:0]

    def _stand_together(self, one: int, other: int) -> bool:
        """Whether two readers belong to the same layer's attention, or the same MLP."""
        first, second = self.runner.graph.readers[one], self.runner.graph.readers[other]
        return first.layer == second.layer and (first.kind == "mlp") == (second.kind == "mlp")

    def _scout(self, plan: list[_Try], masks: Masks) -> None:
        """Guess by the pairs that are held, which cost no run without a patch."""
        damage, *damages = self._measure(torch.cat([self.kept[None], masks]), sorted(self.held))
        self.runs.clear()
        for each in plan:
            if each.row is not None:
                self.guesses[each.reader, each.writer] = damages[each.row] - damage < self.threshold
                damage = damages[each.row] if each.removed else damage

    def _measure(self, masks: Masks, numbers: Sequence[int]) -> list[float]:
        """The damage of each circuit, on some of the groups."""
        total = torch.zeros(len(masks), dtype=torch.float64, device=self.runner.model.device)
        for number in numbers:
            ground, group = self.held.get(number), self.groups[number]
            values, run = self.runner.run(self.runner.prepare(group) if ground is None else ground, masks)
            if ground is not None:
                self.runs[number] = run
            total += (values[0] - run.ground.clean).abs().double().sum(1)
        n_pairs = sum(len(self.groups[number]) for number in numbers)
        return (total / n_pairs).tolist()

    def _measure_held_out(self) -> None:
        """The damage of what was found, on the pairs that the search has not seen."""
        pairs, total = self.held_out_numbers, 0.0
        for group in self.runner.groups(pairs):
            ground = self.runner.prepare(group)
            values = self.runner.measure(ground, self.kept[None])
            total += float((values[0] - ground.clean).abs().double().sum())
        self.held_out_damage = total / len(pairs) if pairs else None

    def _decide(self, plan: list[_Try], damages: list[float]) -> None:
        """Read a batch up to the first wrong guess, and keep the run of the circuit that is left."""
        damage, astray, last_removed = self.damage, False, None
        for each in plan:
            if each.row is None:
                if not astray:
                    self._note(each, "unreachable")
                continue
            increase = damages[each.row] - damage
            removed = increase < self.threshold
            if astray:
                # This row has edges before it that were decided otherwise: its verdict is only the next guess.
                self.guesses[each.reader, each.writer] = removed
            elif math.isnan(increase):
                edge = f"{self.runner.graph.writers[each.writer]} -> {self.runner.graph.readers[each.reader]}"
                raise MetricError(f"metric {self.runner.metrics.name} is NaN without the edge {edge}")
            else:
                self._note(each, "removed" if removed else "kept", damages[each.row], increase)
                last_removed = each.row if removed else last_removed
                astray = removed != each.removed
                self.wrong[each.shown] = _MEMORY * self.wrong[each.shown] + (1 - _MEMORY) * astray
            if each.removed:
                damage = damages[each.row]
        if last_removed is not None:
            for run in self.runs.values():
                run.adopt(last_removed)
        self.runs.clear()

    def _note(self, each: _Try, verdict: Verdict, damage: float | None = None, increase: float | None = None) -> None:
        """Write a decision down."""
        graph = self.runner.graph
        writer, reader = str(graph.writers[each.writer]), str(graph.readers[each.reader])
        # The result is made of the decisions alone, so that an interrupt on the next line changes nothing in it.
        self.decisions.append(Decision(writer=writer, reader=reader, verdict=verdict, damage=damage, increase=increase))
        if verdict != "kept":
            self.kept[each.reader, each.writer] = False

    def result(self) -> Discovery:
        """What is decided so far."""
        runner, graph = self.runner, self.runner.graph
        lengths = torch.tensor(runner.prompts.lengths)
        n_pairs, n_tokens = len(self.pairs), int(lengths[~self.held_out].sum())
        n_others, n_other_tokens = int(self.held_out.sum()), int(lengths[self.held_out].sum())
        n_unreachable = sum(each.verdict == "unreachable" for each in self.decisions)
        n_naive = len(self.decisions) - n_unreachable + 2
        gone = {(each.writer, each.reader) for each in self.decisions if each.verdict != "kept"}
        edges = [(str(graph.writers[writer]), str(graph.readers[reader])) for reader, writer in self.candidates]
        return Discovery(
            circuit=Circuit(edge for edge in edges if edge not in gone),
            decisions=tuple(self.decisions),
            damage=self.damage,
            threshold=self.threshold,
            metric=runner.metrics.name,
            stats=DiscoveryStats(
                edges=len(self.candidates),
                decided=len(self.decisions),
                unreachable=n_unreachable,
                circuits_run=self.circuits_run,
                forwards=runner.forwards,
                tokens=runner.token_layers / runner.model.cfg.n_layers,
                naive_forwards=n_naive * n_pairs + 3 * n_others,
                naive_tokens=n_naive * n_tokens + 3 * n_other_tokens,
            ),
            held_out_damage=self.held_out_damage,
            held_out_pairs=self.held_out,
        )
