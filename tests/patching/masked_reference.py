"""The reference for circuits: one full forward per node, with hooks of a few lines, and sums in plain loops.

What a node writes depends on the circuit's edges above it alone, so circuits that agree there share its forward.
"""

import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.hooks.edits import Custom
from hooklens.patching import Circuit
from hooklens.patching.graph.nodes import list_readers, list_writers, reaches


class MaskedReference:
    """Unpadded pairs of one length; `means` by hook name takes the place of the corrupted prompts' outputs."""

    def __init__(self, model: HookedCausalLM, clean: Tensor, corrupted: Tensor, ablation="resample", edits=()) -> None:
        self.model, self.clean, self.cfg = model, clean, model.cfg
        self.writers, self.readers = list_writers(model.cfg), list_readers(model.cfg)
        self.edits = list(edits)
        _, own = model.run_with_cache(clean, names_filter="*", edits=self.edits)
        _, other = model.run_with_cache(corrupted, names_filter="*", edits=self.edits)
        self.streams = {str(reader): self.part(own, reader) for reader in self.readers}
        self.own = {str(writer): self.part(own, writer) for writer in self.writers}
        self.ablated = {}
        self.written: dict[tuple[str, frozenset], Tensor] = {}
        for writer in self.writers:
            resampled = self.part(other, writer)
            self.ablated[str(writer)] = {
                "resample": resampled,
                "mean": resampled.mean(0, keepdim=True).expand_as(resampled),
                "zero": torch.zeros_like(resampled),
            }[ablation]

    @staticmethod
    def part(cache, node) -> Tensor:
        tensor = cache[node.hook_name]
        return tensor[:, :, node.head] if tensor.ndim == 4 else tensor

    @torch.no_grad()
    def logits(self, circuit: Circuit) -> Tensor:
        """`[pairs pos d_vocab]`."""
        written: dict[str, Tensor] = {}
        above: dict[str, frozenset] = {}
        for writer in self.writers:
            if writer.kind == "embed":
                written["embed"], above["embed"] = self.own["embed"], frozenset()
                continue
            group = self.cfg.n_heads // self.cfg.n_kv_heads
            names = {
                "mlp": [f"m{writer.layer}"],
                "head": [
                    f"a{writer.layer}.h{writer.head}.q",
                    f"a{writer.layer}.h{writer.head // group}.k",
                    f"a{writer.layer}.h{writer.head // group}.v",
                ],
            }[writer.kind]
            edges = [(sender, name) for name in names for sender in written if (sender, name) in circuit]
            above[str(writer)] = frozenset(edges).union(*(above[sender] for sender, _ in edges))
            at = str(writer), above[str(writer)]
            if at not in self.written:
                _, cache = self.model.run_with_cache(
                    self.clean, names_filter=writer.hook_name, edits=self.edits + self.give(names, circuit, written)
                )
                self.written[at] = self.part(cache, writer)
            written[str(writer)] = self.written[at]
        return self.model.run_with_hooks(self.clean, edits=self.edits + self.give(["logits"], circuit, written))

    def give(self, names, circuit: Circuit, written: dict[str, Tensor]):
        """What readers get, whatever an edit has left there."""
        given = []
        for reader in self.readers:
            if str(reader) not in names:
                continue
            value = self.streams[str(reader)].clone()
            for writer in self.writers:
                if reaches(writer, reader, self.cfg):
                    name = str(writer)
                    value += self.ablated[name] - self.own[name]
                    if (name, str(reader)) in circuit:
                        value += written[name] - self.ablated[name]

            def put(tensor, value=value, head=reader.head):
                if tensor.ndim == 3:
                    return value
                tensor = tensor.clone()
                tensor[:, :, head] = value
                return tensor

            given.append(Custom(reader.hook_name, put))
        return given
