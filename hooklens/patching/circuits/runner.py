"""Measuring circuits: groups of pairs by memory, batches of circuits by memory, values out.

The two sizes are chosen one after the other: as many pairs stand on one `Ground` as memory holds (all of them where
the metric cannot be measured for some alone), and as many circuits run at once on it as fit beside it.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.free import assume_free_bytes
from hooklens.hooks.call import NOBODY
from hooklens.patching.circuits.ablation import Ablation, average_edited, check_ablation, written_names
from hooklens.patching.circuits.ground import Ground, prepare_ground
from hooklens.patching.circuits.masked_run import MaskedRun
from hooklens.patching.circuits.reach import Masks, Wiring
from hooklens.patching.metrics.group import MetricGroup
from hooklens.patching.metrics.metric import Metric, Values
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.edits import NO_EDITS, RunEdits, check_node_edits
from hooklens.patching.runs.memory import BatchSize, check_batch_size
from hooklens.patching.runs.sources import mean_activations
from hooklens.patching.runs.vocabulary import unembed

_SHARE_OF_FREE_MEMORY = 0.25
# Past some thousand tokens a run is no faster per token, and its tensors only leave the caches.
_TOKENS_ON_CPU = 2048
# So many tokens of a large network have a ground of several times this size, which brings nothing.
_BYTES_ON_CPU = 2**30


class CircuitRunner:
    """Measures circuits on pairs of prompts.

    Args:
        model: the model.
        prompts: the pairs.
        metric: what is measured; several metrics are a group.
        ablation: what edges outside a circuit carry.
        batch_size: prompts run at once, circuits times pairs; `"auto"` by memory.
        edits: what acts in every run.

    Attributes:
        metrics: what is measured.
        wiring: the network's nodes, and which feed which.
        graph: the nodes.
        ablation_name: what `ablation` was: its word, the name that it brings along, or `"given"`.
        forwards: runs of the network so far, the unpatched ones included.
        token_layers: how many tokens went through how many blocks.

    Raises:
        InputError, SiteError: an ablation or a batch size that does not fit.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        metric: Metric | MetricGroup,
        *,
        ablation: Ablation,
        batch_size: BatchSize,
        edits: RunEdits = NO_EDITS,
    ) -> None:
        check_batch_size(batch_size)
        check_ablation(model, prompts, ablation)
        check_node_edits(edits, prompts)
        self.model, self.prompts, self.edits = model, prompts, edits
        self.batch_size: BatchSize = batch_size
        self.metrics = metric if isinstance(metric, MetricGroup) else MetricGroup.read(metric)
        self.wiring = Wiring.of(model.cfg)
        self.graph = self.wiring.graph
        self.forwards, self.token_layers = 0, 0.0
        self.ablation: Ablation = ablation
        self.ablation_name = ablation if isinstance(ablation, str) else str(getattr(ablation, "name", "given"))
        if ablation == "mean":
            size = self._pairs_per_group()
            written, all_real = written_names(model), torch.ones_like(prompts.corrupted)
            self.ablation = (
                average_edited(model, prompts, written, edits, batch_size=size)
                if edits or prompts.noise is not None
                else mean_activations(model, prompts.corrupted, written, batch_size=size, attention_mask=all_real)
            )
            self.forwards += -(-len(prompts) // size)
            self.token_layers += prompts.corrupted.numel() * model.cfg.n_layers

    @property
    def metric(self) -> Metric:
        """The metric, of several the first."""
        return next(iter(self.metrics.metrics.values()))

    def groups(self, among: Sequence[int] | None = None) -> Iterator[list[int]]:
        """The pairs that stand on one ground, of all pairs or of some."""
        return self.prompts.split(None if self.metrics.needs_all_pairs else self._pairs_per_group(), among)

    def prepare(self, pairs: list[int]) -> Ground:
        """The ground for some pairs.

        Raises:
            MetricError: the metric is NaN or infinite for an unpatched run.
        """
        ground = prepare_ground(self.model, self.prompts, pairs, self.metrics, self.ablation, self.edits)
        # Both unpatched prompts go through the model as one batch.
        self.forwards += 1
        self.token_layers += 2 * len(pairs) * max(ground.lengths) * self.model.cfg.n_layers
        return ground

    def rows_per_batch(self, ground: Ground) -> int:
        """How many circuits to run at once."""
        n_pairs = len(ground.pairs)
        if self.batch_size != "auto":
            return max(1, self.batch_size // n_pairs)
        n_tokens = n_pairs * ground.width
        limit = self._budget() // (n_tokens * self._bytes_per_token() + ground.reads.numel() * self._bytes_per_read())
        if self.model.device.type == "cpu":
            limit = min(limit, _TOKENS_ON_CPU // n_tokens)
        return max(1, limit)

    def grounds_to_hold(self, ground: Ground, n_circuits: int) -> int:
        """How many grounds like this may be held, each with its last batch of circuits."""
        of_batch = n_circuits * len(ground.pairs) * ground.width * self._bytes_per_token()
        return max(1, self._budget() // (ground.nbytes + of_batch))

    def run(self, ground: Ground, masks: Masks) -> tuple[list[Values], MaskedRun]:
        """Each metric of the clean prompts with all edges outside each circuit ablated, and the run."""
        run = MaskedRun(self.model, self.wiring, ground, masks)
        logits = run.logits()
        self.forwards += run.token_layers > 0
        self.token_layers += run.token_layers
        return ground.metrics.measure(logits), run

    def measure(self, ground: Ground, masks: Masks) -> Float[Tensor, "circuit pair"]:
        """The metric of the clean prompts with all edges outside each circuit ablated, of several metrics the first."""
        return self.run(ground, masks)[0][0]

    def measure_ablated(self, ground: Ground) -> Float[Tensor, " pair"]:
        """The metric with all edges ablated, of several metrics the first."""
        return self.measure_each_ablated(ground)[0]

    def measure_each_ablated(self, ground: Ground) -> list[Float[Tensor, " pair"]]:
        """Each metric with all edges ablated."""
        base = ground.bases[self.graph.readers[-1].hook_name]
        stream, edits = base.take_along_dim(ground.reads[..., None], dim=1), ground.edits
        acting = NOBODY
        if edits is not None:
            acting = edits.listeners(self.model, ground.places(1, at_reads=True), edits.names_in_head)
        logits = unembed(self.model, stream, listeners=acting)
        return [values[0] for values in ground.metrics.measure(logits[None])]

    def _pairs_per_group(self) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        width = max(self.prompts.lengths)
        n_reads = self.metrics.n_positions or width
        # Captured outputs of both runs stand beside the ablated ones and the changes.
        per_token = 4 * len(self.graph.writers) * self.model.cfg.d_model * self.model.dtype.itemsize
        return max(1, self._budget() // (width * per_token + n_reads * self._bytes_per_read()))

    def _budget(self) -> int:
        budget = int(_SHARE_OF_FREE_MEMORY * assume_free_bytes(self.model.device))
        return min(budget, _BYTES_ON_CPU) if self.model.device.type == "cpu" else budget

    def _bytes_per_token(self) -> int:
        """What one token of a masked run takes at its peak."""
        cfg = self.model.cfg
        # The inputs of queries, keys and values stand beside each other, each with a copy, a norm and a product.
        per_reader = 4 * (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_model
        of_block = 6 * cfg.d_model + 6 * cfg.n_heads * cfg.d_head + 3 * cfg.mlp_width
        return (len(self.graph.writers) * cfg.d_model + per_reader + of_block) * self.model.dtype.itemsize

    def _bytes_per_read(self) -> int:
        return 4 * self.model.cfg.d_vocab * self.model.dtype.itemsize
