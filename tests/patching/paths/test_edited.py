"""Path patching on edited models, against the tree of all paths, in which every copy of a node is edited by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import patching
from hooklens.errors import EditError
from hooklens.hooks import edits
from hooklens.patching import KL, LogitDiff
from hooklens.patching.graph.nodes import list_writers
from tests.patching.path_reference import PathTree
from tests.patching.paths.test_path import RECEIVERS, small_model, two_prompts
from tests.patching.test_edited_models import seed_of

METRIC = LogitDiff(3, 5)
WIRINGS = ("grouped", "rotary", "shared norm", "learned, tied")
IN_HEADS, IN_MLPS = ("hook_q", "hook_k", "hook_v", "hook_pattern", "hook_z"), ("mlp.hook_post", "hook_mlp_out")


class EditedTree(PathTree):
    """The tree of a network whose nodes are changed inside: `changes` are functions by hook name."""

    def __init__(self, model, into, other, changes) -> None:
        self.changes = changes
        super().__init__(model, into, other)

    def change(self, name, tensor, head=None):
        for fn in self.changes.get(name, ()):
            tensor = fn(tensor, head)
        return tensor

    def embed(self, tokens):
        return self.change("blocks.0.hook_resid_pre", super().embed(tokens))

    def unembed(self, stream):
        normed = self.change("unembed.hook_in", self.norm(self.model.ln_final, stream))
        return normed @ self.model.W_U + self.model.b_U

    def evaluate(self, writer, inputs):
        self.layer = writer.layer
        made = super().evaluate(writer, inputs)
        return self.change(f"blocks.{writer.layer}.hook_mlp_out", made) if writer.kind == "mlp" else made

    def mlp(self, mlp, x):
        linear = x @ mlp.W_in + (mlp.b_in if self.cfg.mlp_bias else 0.0)
        if self.cfg.gated_mlp:
            neurons = torch.nn.functional.silu(x @ mlp.W_gate) * linear
        else:
            neurons = torch.nn.functional.gelu(linear)
        neurons = self.change(f"blocks.{self.layer}.mlp.hook_post", neurons)
        return neurons @ mlp.W_out + (mlp.b_out if self.cfg.mlp_bias else 0.0)

    def head(self, attn, head, normed):
        place = f"blocks.{self.layer}.attn"
        kv_head = head // (self.cfg.n_heads // self.cfg.n_kv_heads)
        vectors = {}
        for kind, index in (("q", head), ("k", kv_head), ("v", kv_head)):
            bias = getattr(attn, f"b_{kind.upper()}")[index] if self.cfg.qkv_bias else 0.0
            vector = normed[kind] @ getattr(attn, f"W_{kind.upper()}")[index] + bias
            vectors[kind] = self.change(f"{place}.hook_{kind}", vector, index)
        scores = self.rotate(vectors["q"]) @ self.rotate(vectors["k"]).transpose(1, 2) / math.sqrt(self.cfg.d_head)
        n = scores.shape[-1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        pattern = self.change(f"{place}.hook_pattern", scores.masked_fill(future, -math.inf).softmax(-1), head)
        return self.change(f"{place}.hook_z", pattern @ vectors["v"], head) @ attn.W_O[head]


@st.composite
def drawn_edits(draw, model):
    """Edits, and the same as functions of one copy of a node."""
    names = [f"blocks.{layer}.attn.{word}" for layer in range(model.cfg.n_layers) for word in IN_HEADS]
    names += [f"blocks.{layer}.{word}" for layer in range(model.cfg.n_layers) for word in IN_MLPS]
    names += ["blocks.0.hook_resid_pre", "unembed.hook_in"]
    made, changes = [], {}
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(names))
        in_heads = name.startswith("blocks") and ".attn." in name
        pos = draw(st.sampled_from([None, -1, [1, 3]]))
        head = draw(st.sampled_from([None, 0])) if in_heads else None
        kinds = ["scale", "add", "replace", *(["mean"] if name != "unembed.hook_in" else [])]
        kind = draw(st.sampled_from(kinds))
        value = {"scale": [0.5], "add": [0.3], "replace": [0.2], "mean": []}[kind]
        made.append(getattr(edits, kind.capitalize())(name, *value, pos=pos, head=head))

        def change(tensor, at, kind=kind, pos=pos, head=head):
            if head is not None and at != head:
                return tensor
            chosen = slice(None) if pos is None else [pos] if isinstance(pos, int) else pos
            part = tensor[:, chosen]
            new = {
                "scale": lambda: part * 0.5,
                "add": lambda: part + 0.3,
                "replace": lambda: torch.full_like(part, 0.2),
                "mean": lambda: part.mean(1, keepdim=True).expand_as(part),
            }[kind]()
            changed = tensor.clone()
            changed[:, chosen] = new
            return changed

        changes.setdefault(name, []).append(change)
    return made, changes


@pytest.mark.parametrize("n_examples", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", WIRINGS)
def test_every_sender_equals_the_tree_of_paths(network, n_examples):
    model = small_model(network)

    @seed_of(network)
    @settings(max_examples=n_examples)
    @given(st.data())
    def check(data):
        made, changes = data.draw(drawn_edits(model))
        receivers = RECEIVERS[data.draw(st.sampled_from(list(RECEIVERS)))]
        through_mlps = data.draw(st.booleans())
        clean, corrupted = two_prompts(model, shared=data.draw(st.integers(0, 2)))
        senders = [str(writer) for writer in list_writers(model.cfg)]
        result = patching.path_patch(
            model,
            clean,
            corrupted,
            senders,
            receivers,
            METRIC,
            through_mlps=through_mlps,
            edits=made,
            batch_size=data.draw(st.sampled_from(["auto", 1])),
            progress=False,
        )
        tree = EditedTree(model, corrupted, clean, changes)
        for sender, value in list(zip(senders, result.per_pair, strict=True))[:: data.draw(st.sampled_from([1, 2]))]:
            expected = METRIC(tree.logits(sender, receivers, through_mlps=through_mlps))
            # The tree's sums are in another order, in float64; rotary angles are float32 in both.
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)

    check()


def test_several_metrics_are_those_measured_alone():
    model = small_model("grouped")
    clean, corrupted = two_prompts(model)
    metrics = {"difference": METRIC, "shift": KL(), "earlier": LogitDiff(3, 5, pos=1)}
    together = patching.path_patch(model, clean, corrupted, receivers=["m1", "logits"], metric=metrics, progress=False)
    for name, metric in metrics.items():
        alone = patching.path_patch(model, clean, corrupted, receivers=["m1", "logits"], metric=metric, progress=False)
        # float64 rounding: columns before the last one run, too.
        torch.testing.assert_close(together[name].per_pair, alone.per_pair, rtol=0, atol=1e-11)
        torch.testing.assert_close(together[name].clean_per_pair, alone.clean_per_pair, rtol=0, atol=1e-11)


def test_edits_in_the_stream_and_functions_are_refused():
    model = small_model("grouped")
    clean, corrupted = two_prompts(model)
    for edit, text in (
        (edits.Add("blocks.1.hook_resid_pre", 0.5), "'blocks.1.hook_resid_pre' stand between nodes"),
        (edits.Zero("blocks.0.attn.hook_result"), "edit inside attention or MLPs, their outputs .hook_z, hook_mlp_out"),
        (edits.Custom("blocks.1.attn.hook_z", torch.sin), "not known what these edits read"),
    ):
        with pytest.raises(EditError, match=text):
            patching.path_patch(
                model, clean, corrupted, receivers=["logits"], metric=METRIC, edits=[edit], progress=False
            )
