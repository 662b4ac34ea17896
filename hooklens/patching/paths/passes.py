"""One pass: senders as rows of a batch, which enters where they write and grows on its way up.

A row is a sender and a pair. Two streams go up, see the page of `hooklens.patching.paths`. The *change* is the direct
stream minus the later one; below the receivers only MLPs run, on the change, for the later stream is the unpatched
run's there. From the first receiver on blocks run on the later stream, and above the last one nothing reads the change
any more.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.hooks import Call, HookPoint
from hooklens.hooks.call import NOBODY, Hook, Listeners, Listening, join_listeners, thread_listeners
from hooklens.kv_cache import HookedKeyValueCacheEntry
from hooklens.model.block import Block
from hooklens.model.plan.positions import TokenPlan
from hooklens.patching.graph.nodes import Writer
from hooklens.patching.paths.ground import Ground
from hooklens.patching.paths.route import BEFORE_ATTENTION, BEFORE_MLP, Place, Route
from hooklens.patching.runs.vocabulary import unembed

Stream = Float[Tensor, "row pos d_model"]


class PathPass:
    """Some senders, run as one growing batch.

    Args:
        ground: the pairs.
        route: where the patch goes.
        senders: in the order in which they enter; a path leads from each to a receiver.

    Attributes:
        token_layers: how many tokens went through how many blocks, in all; an MLP and attention by themselves count
            by their share of the block's weights.
    """

    def __init__(self, ground: Ground, route: Route, senders: Sequence[Writer]) -> None:
        self.ground, self.model, self.route = ground, ground.model, route
        self.senders = list(senders)
        self.token_layers = 0.0
        self._outside = thread_listeners()
        self._n_entered = 0
        self._change: Stream | None = None
        self._later: Stream | None = None

    def run(self) -> Float[Tensor, "sender pair read d_vocab"]:
        """The logits of every sender's run at the positions that the metric reads."""
        ground, n_layers = self.ground, self.model.cfg.n_layers
        first = self.route.entry(self.senders[0])
        attends_from, narrowed = self.route.attends_from(first), None
        for layer in range(first[0], n_layers):
            self._enter((layer, BEFORE_ATTENTION))
            if layer < attends_from:
                self._enter((layer, BEFORE_MLP))
                self._run_mlp(layer)
                continue
            if self._later is None and self._change is not None and self.route.attends_alone(layer):
                self._run_attention(layer)
                self._drop_change(layer)
                continue
            # Where attention runs anyway, heads of this layer enter below it, and are added behind it.
            behind = self._enter_later((layer, BEFORE_MLP))
            narrowed = self._run_block(layer, behind)
            self._drop_change(layer)
        self._enter((n_layers, BEFORE_ATTENTION))
        stream = self._read_later() if narrowed is None else narrowed
        if self.route.logits_receive and self._change is not None:
            stream = stream + self._at_reads(self._change)
        acting, edits = NOBODY, ground.baseline.edits
        if edits is not None:
            places = ground.places(len(self.senders), at_reads=True)
            acting = edits.listeners(self.model, places, edits.names_in_head)
        logits = unembed(self.model, stream, listeners=acting)
        return logits.view(len(self.senders), ground.n_pairs, *logits.shape[1:])

    @property
    def n_rows(self) -> int:
        """Rows that have entered."""
        return self._n_entered * self.ground.n_pairs

    def _take(self, place: Place) -> list[Writer]:
        """The senders that enter at a place, which so count as entered."""
        entering = [one for one in self.senders[self._n_entered :] if self.route.entry(one) == place]
        self._n_entered += len(entering)
        return entering

    def _enter(self, place: Place) -> None:
        """Join the changes of the senders that enter here; the later stream is as yet the unpatched run's."""
        entering = self._take(place)
        if not entering:
            return
        written = torch.cat([self.ground.change(sender) for sender in entering])
        self._change = written if self._change is None else torch.cat([self._change, written])
        if self._later is not None:
            layer, _ = place
            self._later = torch.cat([self._later, self._unpatched(layer, len(entering))])

    def _enter_later(self, place: Place) -> Stream | None:
        """Join rows without a change; gives, for all rows, the change that is added behind attention."""
        entering = self._take(place)
        if not entering:
            return None
        layer, _ = place
        written = torch.cat([self.ground.change(sender) for sender in entering])
        n_before = self.n_rows - len(written)
        none = torch.zeros_like(written)
        self._change = none if self._change is None else torch.cat([self._change, none])
        if self._later is not None:
            self._later = torch.cat([self._later, self._unpatched(layer, len(entering))])
        return torch.cat([written.new_zeros(n_before, *written.shape[1:]), written])

    def _unpatched(self, layer: int, n_senders: int) -> Stream:
        return self.ground.stream(layer).repeat(n_senders, 1, 1)

    def _run_mlp(self, layer: int) -> None:
        """Where the later stream's MLP has nothing new to read, it runs on the direct stream only."""
        if self._change is None or not self.route.runs_mlp(layer):
            return
        read = self._over_pairs(self.ground.read_by_mlp(layer), self._change)
        made = self._over_pairs(self.ground.written_by_mlp(layer), self._make_of(layer, read), sign=-1)
        if self.route.mlp_receives(layer):
            # It writes the same to both streams, so the change stays.
            self._later = self._over_pairs(self.ground.stream(layer + 1), made)
        else:
            self._change = self._change + made

    def _run_attention(self, layer: int) -> None:
        """The later stream is the unpatched run's up to here, so what the MLP beside this attention makes of it is."""
        block, later, plan = self._block(layer), self._unpatched(layer, self._n_entered), self._plan()
        assert self._change is not None
        listeners = self._give_to_heads(layer, later + self._change)
        call = Call(join_listeners([self._outside, self._edits_in(layer), listeners]), plan)
        normed = later if block.ln1 is None else block.ln1(later, call)
        written = block.hook_attn_out(block.attn(normed, normed, normed, plan, call, self._past(layer)), call)
        self.token_layers += self.n_rows * self.ground.width * (1 - share_of_mlp(block))
        beside = self.ground.stream(layer + 1) - self.ground.written_by_attention(layer)
        self._later = self._over_pairs(beside, written)
        self._run_mlp(layer)

    def _make_of(self, layer: int, stream: Stream) -> Stream:
        """What an MLP makes of a stream."""
        block = self._block(layer)
        self.token_layers += stream.shape[0] * stream.shape[1] * share_of_mlp(block)
        made: Tensor = block.run_mlp(stream, self._open_call(layer))
        return made

    def _run_block(self, layer: int, behind: Stream | None) -> Stream | None:
        """Run a block on the later stream; gives the stream at the positions read, where it makes no others."""
        if self._n_entered == 0:
            return None
        block = self._block(layer)
        later = self._unpatched(layer, self._n_entered) if self._later is None else self._later
        change = self._change
        listeners: dict[HookPoint, Listening] = {}
        if change is not None and self.route.has_heads(layer):
            listeners |= self._give_to_heads(layer, later + change)
        if behind is not None:
            assert change is not None
            change = change + behind
        noted: dict[str, Tensor] = {}
        passes_on = change is not None and self.route.runs_mlp(layer)
        if change is not None and self.route.mlp_receives(layer):
            listeners |= _listen(block.hook_mlp_in, partial(torch.add, change))
        elif passes_on:
            listeners |= _listen(block.hook_mlp_in, partial(noted.__setitem__, "read"))
            listeners |= _listen(block.hook_mlp_out, partial(noted.__setitem__, "written"))
        wanted = self._wanted() if self._may_narrow(layer) else None
        plan = self._plan()
        call = Call(join_listeners([self._outside, self._edits_in(layer), listeners]), plan)
        n_after = self.ground.reads.shape[1] if wanted is not None else self.ground.width
        share = share_of_mlp(block)
        self.token_layers += self.n_rows * (self.ground.width * (1 - share) + n_after * share)
        out: Tensor = block(later, plan, call, self._past(layer), wanted=wanted)
        if wanted is not None:
            return out.view(self.n_rows, -1, out.shape[-1])
        self._later = out
        if change is not None and "read" in noted:
            change = change + self._make_of(layer, noted["read"] + change) - noted["written"]
        self._change = change
        return None

    def _may_narrow(self, layer: int) -> bool:
        """Whether, behind this block's attention, only tokens that are read go on."""
        edits = self.ground.baseline.edits
        if edits is not None and (edits.of_run.needs_whole_rows or edits.acts_behind_attention(layer)):
            return False
        if layer < self.model.cfg.n_layers - 1 or self.route.mlp_receives(layer):
            return False
        return self.route.last < (layer, BEFORE_MLP)

    def _give_to_heads(self, layer: int, direct: Stream) -> dict[HookPoint, Listening]:
        """Listeners that give the heads that receive what they make of the direct stream."""
        block = self._block(layer)
        plan = self._plan()
        attn, call = block.attn, self._open_call(layer)
        normed = direct if block.ln1 is None else block.ln1(direct, call)
        listeners: dict[HookPoint, Listening] = {}
        for heads, letter, point in (
            (self.route.heads(layer, "q"), "q", attn.hook_q),
            (self.route.heads(layer, "k"), "k", attn.hook_k),
            (self.route.heads(layer, "v"), "v", attn.hook_v),
        ):
            if heads:
                received = point(attn.project(letter, normed, plan, call), call)[:, :, heads]
                listeners |= _listen(point, partial(_put_in, heads, received))
        return listeners

    def _edits_in(self, layer: int) -> Listeners:
        """What the experiment's edits do inside the nodes of a block."""
        edits = self.ground.baseline.edits
        if edits is None:
            return NOBODY
        return edits.in_layer(self.model, layer, self.ground.places(self._n_entered), 0)

    def _open_call(self, layer: int) -> Call:
        return Call(join_listeners([self._outside, self._edits_in(layer)]), self._plan())

    def _drop_change(self, layer: int) -> None:
        """Above its last reader the change is not carried on."""
        if self.route.last < (layer + 1, BEFORE_ATTENTION):
            self._change = None

    def _past(self, layer: int) -> HookedKeyValueCacheEntry | None:
        if self.ground.n_past == 0:
            return None
        keys, values = (tensor.repeat(self._n_entered, 1, 1, 1) for tensor in self.ground.past(layer))
        return HookedKeyValueCacheEntry(keys, values)

    def _plan(self) -> TokenPlan:
        # Padding stands on the right, where no real token sees it.
        return TokenPlan(
            batch=self.n_rows, n_new=self.ground.width, device=self.model.device, n_past=self.ground.n_past
        )

    def _wanted(self) -> tuple[Tensor, Tensor]:
        """Row and place of each token that the metric reads."""
        places = self.ground.reads.repeat(self._n_entered, 1)
        rows = torch.arange(len(places), device=places.device)[:, None].expand_as(places)
        return rows.flatten(), places.flatten()

    def _read_later(self) -> Float[Tensor, "row read d_model"]:
        if self._later is None:
            return self._at_reads(self._unpatched(self.model.cfg.n_layers, len(self.senders)))
        return self._at_reads(self._later)

    def _at_reads(self, stream: Stream) -> Float[Tensor, "row read d_model"]:
        return stream.take_along_dim(self.ground.reads.repeat(len(self.senders), 1)[..., None], dim=1)

    def _over_pairs(self, of_pairs: Tensor, of_rows: Stream, *, sign: int = 1) -> Stream:
        """What rows have, and on top of it (or below: -1) what the unpatched run has of their pairs."""
        by_sender = of_rows.view(-1, *of_pairs.shape)
        return torch.add(by_sender, of_pairs, alpha=sign).view(of_rows.shape)

    def _block(self, layer: int) -> Block:
        return self.model.block_list()[layer]


def share_of_mlp(block: Block) -> float:
    """The MLP's part of a block's weights; 0 where the block has none at all."""
    sizes = dict.fromkeys(("attn", "mlp"), 0)
    for name in sizes:
        part = block._modules.get(name)
        sizes[name] = 0 if part is None else sum(weight.numel() for weight in part.parameters())
    return sizes["mlp"] / max(1, sum(sizes.values()))


def _listen(point: HookPoint, fn: Callable[[Tensor], Tensor | None]) -> dict[HookPoint, Listening]:
    return {point: Listening([Hook(lambda tensor, hook: fn(tensor), point, form="point")])}


def _put_in(heads: list[int], received: Tensor, tensor: Tensor) -> Tensor:
    patched = tensor.clone()
    patched[:, :, heads] = received
    return patched
