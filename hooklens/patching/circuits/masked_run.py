"""Masked runs: the clean prompts, with every edge outside a circuit ablated.

In a masked run every reader gets

    input(reader) = base(reader) + sum over the circuit's edges (w -> reader) of (out(w) - ablated(w))

with `out(w)` what the writer writes in this very run, `ablated(w)` its ablated output, and `base(reader)` the
stream that the reader would get if every writer were ablated. The full circuit gives the clean run, the empty one
the ablated run, up to rounding. What no head or MLP writes (`b_O`) stays.

How it is computed: circuits are rows of a batch. The changes `out(w) - ablated(w)` of a batch are kept as
`[circuit writer pair pos d_model]`, filled as the run goes up, and the inputs of a layer's readers are one matrix
product of them with the mask `[circuit reader writer]`. Nothing of the size `[reader writer pos d_model]` is made.

- Nodes that do the same as in a run at hand (the clean one, or that of a larger circuit) and nodes that lead nowhere
  are not run: the batch enters at the lowest node that differs, attention runs where one of its heads has to, and an
  MLP where it has to (`reach`).
- Under `"resample"`, columns before the first token in which two prompts differ change nothing: the batch runs
  behind them on the clean run's keys and values.
- Columns past the last one that the metric reads are not run, the last MLP runs only at those it reads, and only they
  are unembedded.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import Call
from hooklens.hooks.call import NOBODY, Hook, Listeners, Listening, join_listeners, thread_listeners
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.block import Block
from hooklens.model.plan.positions import TokenPlan
from hooklens.patching.circuits.ground import Ground, stream_name
from hooklens.patching.circuits.reach import Masks, Wiring
from hooklens.patching.paths.passes import share_of_mlp
from hooklens.patching.runs.acting import Places
from hooklens.patching.runs.vocabulary import unembed


class MaskedRun:
    """One batch of circuits, run on some pairs.

    Args:
        model: the model.
        wiring: its nodes.
        ground: the pairs.
        masks: the circuits, parts of the ground's reference.

    Attributes:
        nodes: the writers that run, in order.
        token_layers: how many tokens went through how many blocks, in all; attention and MLP alone count by their
            share of the block's weights.
    """

    def __init__(self, model: HookedCausalLM, wiring: Wiring, ground: Ground, masks: Masks) -> None:
        assert bool((masks <= ground.reference).all())
        self.model, self.wiring, self.ground = model, wiring, ground
        self.graph = wiring.graph
        self.nodes = wiring.find_nodes_to_run(masks, ground.reference)
        self.slot = {writer: slot for slot, writer in enumerate(self.nodes)}
        self.token_layers = 0.0
        self._given = masks
        self._begin(masks.to(model.device, ground.changes.dtype))

    def _begin(self, masks: Float[Tensor, "circuit reader writer"]) -> None:
        """Take up the circuits as factors of their edges' changes; `nodes` are those that run."""
        ground = self.ground
        self._masks = masks
        self._shared = self._masks.clone()
        self._shared[:, :, self.nodes] = 0.0
        self.own = ground.changes.new_empty(len(masks), len(self.nodes), *ground.changes.shape[1:])
        self._outside = thread_listeners()
        self._plan: TokenPlan | None = None

    def logits(self) -> Float[Tensor, "circuit pair read d_vocab"]:
        """The logits at the positions that the metric reads."""
        heads: dict[int, list[int]] = {}
        mlps: set[int] = set()
        for node in self.nodes:
            writer = self.graph.writers[node]
            if writer.kind == "mlp":
                mlps.add(writer.layer)
            else:
                heads.setdefault(writer.layer, []).append(node)
        for layer in sorted({*heads, *mlps}):
            if layer in heads:
                self._run_heads(layer, heads[layer])
            if layer in mlps:
                self._run_mlp(layer)
        last = self._inputs([len(self.graph.readers) - 1], at_reads=True)[:, 0]
        acting, edits = NOBODY, self.ground.edits
        if edits is not None:
            acting = edits.listeners(self.model, self._places(at_reads=True), edits.names_in_head)
        logits = unembed(self.model, last.flatten(0, 1), listeners=acting)
        return logits.view(len(self._masks), len(self.ground.pairs), *logits.shape[1:])

    def adopt(self, row: int) -> None:
        """Make one of the circuits the ground's reference; after that only parts of it can be run there."""
        for slot, node in enumerate(self.nodes):
            self.ground.changes[node] = self.own[row, slot]
        self.ground.reference = self._given[row].clone()

    def _run_heads(self, layer: int, nodes: list[int]) -> None:
        """Run a layer's attention, and note what the heads among the nodes write."""
        block, cfg = self._block(layer), self.model.cfg
        readers = sorted({reader for node in nodes for reader in self.wiring.inputs[node]})
        inputs = {
            kind: self._copies(block, kind, [r for r in readers if self.graph.readers[r].kind == kind], n_heads)
            for kind, n_heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads))
        }
        noted: dict[str, Tensor] = {}
        point = block.attn.hook_result
        note = Hook(lambda tensor, hook: noted.__setitem__("result", tensor), point, form="point")
        plan = self._make_plan()
        standing = self._edits_in(layer, at_reads=False)
        call = Call(join_listeners([self._outside, standing, {point: Listening([note])}]), plan)
        block.attn(inputs["q"], inputs["k"], inputs["v"], plan, call, self._past(layer))
        self._count(self.ground.width * (1 - share_of_mlp(block)))
        for node in nodes:
            written = noted["result"][:, :, self.graph.writers[node].head] * cfg.residual_scale
            self._note(node, written.view(len(self._masks), -1, *written.shape[1:]) - self.ground.ablated[node])

    def _copies(
        self, block: Block, kind: str, readers: list[int], n_heads: int
    ) -> Float[Tensor, "row pos head d_model"]:
        """The normed inputs of a layer's heads; those whose output nobody notes get nothing."""
        inputs = self._inputs(readers).permute(0, 2, 3, 1, 4).flatten(0, 1)
        if len(readers) < n_heads:
            some = inputs
            inputs = some.new_zeros(*some.shape[:2], n_heads, some.shape[-1])
            inputs[:, :, [self.graph.readers[reader].head for reader in readers]] = some
        return inputs if block.ln1 is None else block.ln1.apply_weights(inputs)

    def _run_mlp(self, layer: int) -> None:
        """Run a layer's MLP; the last one only where the metric reads, for nothing else reads it."""
        block = self._block(layer)
        is_last = layer == self.model.cfg.n_layers - 1 and not self.ground.needs_whole_rows
        [node] = (n for n in self.nodes if (w := self.graph.writers[n]).kind == "mlp" and w.layer == layer)
        read = self._inputs(list(self.wiring.inputs[node]), at_reads=is_last)[:, 0]
        stream = read.flatten(0, 1)
        plan = TokenPlan(batch=len(stream), n_new=stream.shape[1], device=stream.device)
        call = Call(join_listeners([self._outside, self._edits_in(layer, at_reads=is_last)]), plan)
        written = block.run_mlp(stream, call).view(read.shape)
        self._count(stream.shape[1] * share_of_mlp(block))
        if not is_last:
            self._note(node, written - self.ground.ablated[node])
            return
        index = self.ground.reads[..., None].expand(*self.ground.reads.shape, written.shape[-1])
        change = written - self.ground.ablated[node].gather(1, index)
        at_all = torch.zeros_like(self.ground.ablated[node]).repeat(len(change), 1, 1, 1)
        self._note(node, at_all.scatter_(2, index.expand(len(change), -1, -1, -1), change))

    def _edits_in(self, layer: int, *, at_reads: bool) -> Listeners:
        """What the experiment's edits do inside a layer's nodes; what they add to the stream is in its base."""
        edits = self.ground.edits
        if edits is None:
            return NOBODY
        places = self._places(at_reads=at_reads)
        return edits.listeners(self.model, places, [name for name in edits.acting if layer_of(name) == layer])

    def _places(self, *, at_reads: bool) -> Places:
        return self.ground.places(len(self._masks), at_reads=at_reads)

    def _note(self, node: int, change: Float[Tensor, "circuit pair pos d_model"]) -> None:
        self.own[:, self.slot[node]] = change

    def _inputs(
        self, readers: list[int], *, at_reads: bool = False
    ) -> Float[Tensor, "circuit reader pair some_pos d_model"]:
        """What readers of the same stream get, at all columns or at those that the metric reads."""
        n_writers = self.graph.n_inputs[readers[0]]
        n_own = sum(node < n_writers for node in self.nodes)
        base = self.ground.bases[stream_name(self.graph.readers[readers[0]])]
        shared, index = self.ground.changes[:n_writers], self.ground.reads[..., None] if at_reads else None
        if index is not None:
            base, shared = base.take_along_dim(index, 1), shared.take_along_dim(index[None], 2)
        masks = self._masks[:, readers]
        total = self._shared[:, readers, :n_writers].flatten(0, 1) @ shared.flatten(1)
        total = total.view(len(masks), len(readers), -1) + base.flatten()
        if n_own:
            total = self._add_own(total, masks[:, :, self.nodes[:n_own]], index)
        return total.view(len(masks), len(readers), *base.shape)

    def _add_own(
        self,
        total: Float[Tensor, "circuit reader entry"],
        masks: Float[Tensor, "circuit reader first_node"],
        index: Int[Tensor, "pair read 1"] | None,
    ) -> Float[Tensor, "circuit reader entry"]:
        """The inputs with what the first of the nodes have written in this run."""
        own = self.own[:, : masks.shape[-1]]
        if index is not None:
            own = own.take_along_dim(index[None, None], 3)
        return torch.baddbmm(total, masks, own.flatten(2))

    def _make_plan(self) -> TokenPlan:
        """The tokens of the batch. Without a padded row the mask is left out."""
        if self._plan is None:
            ground, n_circuits = self.ground, len(self._masks)
            whole = bool(ground.mask.all())
            self._plan = TokenPlan(
                batch=n_circuits * len(ground.pairs),
                n_new=ground.width,
                device=self.model.device,
                attention_mask=None if whole else ground.mask.repeat(n_circuits, 1),
                n_past=ground.first,
            )
        return self._plan

    def _past(self, layer: int) -> HookedKeyValueCacheEntry | None:
        if not self.ground.past:
            return None
        keys, values = (tensor.repeat(len(self._masks), 1, 1, 1) for tensor in self.ground.past[layer])
        return HookedKeyValueCacheEntry(keys, values)

    def _count(self, layers_times_columns: float) -> None:
        self.token_layers += len(self._masks) * len(self.ground.pairs) * layers_times_columns

    def _block(self, layer: int) -> Block:
        return self.model.block_list()[layer]
