"""Measuring circuits: groups of pairs by memory, batches of circuits by memory, values out.

The two sizes are chosen one after the other: as many pairs stand on one `Ground` as memory holds (all of them where
the metric cannot be measured for some alone), and as many circuits run at once on it as fit beside it.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.circuits.ablation import Ablation, check_ablation, written_names
from hooklens.patching.circuits.masked_run import Ground, MaskedRun, prepare_ground
from hooklens.patching.graph.nodes import Graph
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.baseline import refuse_nan, unembed
from hooklens.patching.runs.memory import BatchSize, check_batch_size, free_bytes
from hooklens.patching.runs.sources import mean_activations

_SHARE_OF_FREE_MEMORY = 0.25
# Past some thousand tokens a run is no faster per token, and its tensors only leave the caches.
_TOKENS_ON_CPU = 2048


class CircuitRunner:
    """Measures circuits on pairs of prompts.

    Args:
        model: the model.
        prompts: the pairs.
        metric: what is measured.
        ablation: what edges outside a circuit carry.
        batch_size: prompts run at once, circuits times pairs; `"auto"` by memory.

    Attributes:
        graph: the network's nodes.
        forwards: runs of the network so far, the unpatched ones included.
        token_layers: how many tokens went through how many blocks.

    Raises:
        InputError, SiteError: an ablation or a batch size that does not fit.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        metric: Metric,
        *,
        ablation: Ablation,
        batch_size: BatchSize,
    ) -> None:
        check_batch_size(batch_size)
        check_ablation(model, prompts, ablation)
        self.model, self.prompts, self.metric, self.batch_size = model, prompts, metric, batch_size
        self.graph = Graph.of(model.cfg)
        self.forwards, self.token_layers = 0, 0
        self.ablation: Ablation = ablation
        if ablation == "mean":
            size = self._pairs_per_group()
            written, all_real = written_names(model), torch.ones_like(prompts.corrupted)
            self.ablation = mean_activations(
                model, prompts.corrupted, written, batch_size=size, attention_mask=all_real
            )
            self.forwards += -(-len(prompts) // size)
            self.token_layers += prompts.corrupted.numel() * model.cfg.n_layers

    def groups(self) -> Iterator[list[int]]:
        """The pairs that stand on one ground."""
        n_pairs = len(self.prompts)
        size = n_pairs if self.metric.needs_all_pairs else self._pairs_per_group()
        for first in range(0, n_pairs, size):
            yield list(range(first, min(first + size, n_pairs)))

    def prepare(self, pairs: list[int]) -> Ground:
        """The ground for some pairs.

        Raises:
            MetricError: the metric is NaN for an unpatched run.
        """
        ground = prepare_ground(self.model, self.prompts, pairs, self.metric, self.ablation)
        n_runs = 4 if self.ablation == "resample" else 3
        # Both unpatched prompts go through the model as one batch.
        self.forwards += n_runs - 1
        self.token_layers += n_runs * len(pairs) * max(ground.baseline.lengths) * self.model.cfg.n_layers
        refuse_nan(ground.baseline)
        return ground

    def rows_per_batch(self, ground: Ground) -> int:
        """How many circuits to run at once."""
        n_pairs = len(ground.pairs)
        if self.batch_size != "auto":
            return max(1, self.batch_size // n_pairs)
        n_tokens = n_pairs * ground.width
        n_reads = ground.baseline.reads.numel()
        limit = self._budget() // (n_tokens * self._bytes_per_token() + n_reads * self._bytes_per_read())
        if self.model.device.type == "cpu":
            limit = min(limit, _TOKENS_ON_CPU // n_tokens)
        return max(1, limit)

    def measure(self, ground: Ground, masks: Bool[Tensor, "circuit reader writer"]) -> Float[Tensor, "circuit pair"]:
        """The metric of the clean prompts with all edges outside each circuit ablated."""
        run = MaskedRun(self.model, ground, masks)
        logits = run.logits()
        n_layers = self.model.cfg.n_layers - run.start
        self.forwards += n_layers > 0
        self.token_layers += len(masks) * len(ground.pairs) * ground.width * n_layers
        return ground.baseline.metric.measure(logits)

    def measure_ablated(self, ground: Ground) -> Float[Tensor, " pair"]:
        """The metric with all edges ablated."""
        base = ground.bases[self.graph.readers[-1].hook_name]
        logits = unembed(self.model, base.take_along_dim((ground.baseline.reads - ground.first)[..., None], dim=1))
        return ground.baseline.metric.measure(logits[None])[0]

    def _pairs_per_group(self) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        width = max(self.prompts.lengths)
        n_reads = width if self.metric.positions is None else len(self.metric.positions)
        # A ground holds what a run holds: its own changes and ablated outputs, and the captured ones beside them.
        per_pair = 2 * width * self._bytes_per_token() + n_reads * self._bytes_per_read()
        return max(1, self._budget() // per_pair)

    def _budget(self) -> int:
        return int(_SHARE_OF_FREE_MEMORY * free_bytes(self.model.device))

    def _bytes_per_token(self) -> int:
        """What one token of a masked run takes at its peak."""
        cfg = self.model.cfg
        # The inputs of queries, keys and values stand beside each other, each with a copy, a norm and a product.
        per_reader = 4 * (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_model
        of_block = 6 * cfg.d_model + 6 * cfg.n_heads * cfg.d_head + 3 * cfg.d_mlp
        return (len(self.graph.writers) * cfg.d_model + per_reader + of_block) * self.model.dtype.itemsize

    def _bytes_per_read(self) -> int:
        return 4 * self.model.cfg.d_vocab * self.model.dtype.itemsize
