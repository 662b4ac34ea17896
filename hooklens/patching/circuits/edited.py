"""Circuits of edited models: which edits leave a network a sum of what its nodes write.

The graph's nodes compute from what they read, and write to a stream that is the sum of all they have written. An edit
inside a node changes what it computes, one of its output what it writes; a constant added to the stream is there in
every circuit, as biases are. Anything else done to the stream, or to what one node reads of it, would stand between
nodes, on edges, which a circuit has or has not. Such edits belong into a sweep.
"""

from hooklens.axes import find_site, is_below_blocks, is_past_blocks
from hooklens.errors import EditError, join_names
from hooklens.hooks.edits import Add, Edit
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.edits import RunEdits, reach_of

_IN_NODES = ("attn", "mlp", "ln2")
_OUTPUTS = ("hook_mlp_out",)
_IN_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out")


def check_node_edits(edits: RunEdits, prompts: PromptPairs) -> None:
    """Refuse edits under which nothing could be said of single edges, before anything runs.

    Raises:
        EditError: edits between nodes, or of which it is not known what they read; all of them are named. Or edits that
            do not go with the pairs.
    """
    edits.check_pairs(prompts.lengths, prompts.n_pairs)
    unknown, between = [], []
    for edit, points in zip(edits.edits, edits.points, strict=True):
        if (
            reach_of(edit) == "unknown"
            or any(find_site(name) is None for name in points)
            or (reach_of(edit) == "row" and any(map(is_past_blocks, points)))
        ):
            unknown.append(repr(edit))
        between += [name for name in points if not _is_of_node(edit, name)]
    if unknown:
        raise EditError(
            f"edits: {join_names(unknown, limit=5)}: a circuit is run node by node and position by position, and it is "
            "not known what these edits read; give values such as Replace, Add, Scale, Zero or Project, or use "
            "patching.sweep, which runs whole prompts"
        )
    if between:
        raise EditError(
            f"edits at {join_names(list(dict.fromkeys(between)), limit=5)} stand between nodes, so the network is no "
            "sum of what its nodes write; edit inside attention or MLPs, their outputs (hook_result, hook_mlp_out), "
            "the embeddings or what comes behind the blocks, or Add to the stream. patching.sweep takes any edit"
        )


def _is_of_node(edit: Edit, name: str) -> bool:
    """Whether an edit changes a node, or adds a constant to the stream."""
    if is_below_blocks(name) or is_past_blocks(name) or name == "blocks.0.hook_resid_pre":
        return True
    word = name.split(".")[2]
    return word in _IN_NODES or word in _OUTPUTS or (word in _IN_STREAM and type(edit) is Add)
