"""The edits that an experiment runs under: in every run of it, the unpatched ones included.

An experiment on an edited model asks what a patch does to a network in which something has been changed already: name
movers ablated, a direction removed, a steering vector added. So both unpatched runs are run with the edits, what is put
in comes from an edited run, and in each patched run the edits act, too; the patch acts last at its own hook point.

Every prompt is a run of its own, whatever stands beside it in a batch:

- `rows` are pairs of the experiment, and both prompts of a pair are edited. A value with an axis of rows has one for
  each pair that the edit chooses.
- `pos` counts a prompt's real tokens. The position axis of a value is as for a call on all prompts, padded on the right
  to the longest one.
- `Mean` is the mean over the chosen tokens of one prompt.

What a patched run may leave out depends on what the edits do (`Edit.reach`):

- `"token"`: nothing changes. The new value of a token is made of the token's own, so a run goes on from the edited
  unpatched one at any layer and position.
- `"row"` (`Mean`, and edits of scores and patterns, with which a query can see later keys): the columns of a run
  depend on each other, so they all run, from the layer that is patched on. The same goes for keys and values of single
  query heads, which no cache holds.
- `"unknown"` (`Custom`, and kinds that do not say): every patch is one full forward of one prompt, from its tokens on.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from hooklens.axes import find_site, is_below_blocks, is_past_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import ShortformerPositions
from hooklens.errors import EditError, HookNameError, join_names
from hooklens.hooks import HookPoint
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.choice import resolve_choice
from hooklens.hooks.edits import Add, Edit, Project
from hooklens.patching.pairs.prompts import PromptPairs

Reach = Literal["token", "row", "unknown"]
"""What an edit makes new values of, see `Edit.reach`."""

_PER_HEAD = ("hook_k_per_head", "hook_v_per_head")
_IN_NODES = ("attn", "mlp", "ln2", "hook_mlp_out")
_IN_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out")


@dataclass(frozen=True)
class RunEdits:
    """The edits of an experiment, and the hook points at which they act.

    Attributes:
        edits: in the order in which they act at one hook point.
        points: of each edit, its hook points by name.
    """

    edits: tuple[Edit, ...] = ()
    points: tuple[dict[str, HookPoint], ...] = ()

    @classmethod
    def read(cls, model: HookedCausalLM, given: object) -> "RunEdits":
        """The edits that a caller gives.

        Raises:
            InputError: they are no list of edits.
            HookNameError: edits that name no hook point; all of them are named.
            EditError: one that acts in generated text only, or at positions that every layer reads.
        """
        edits = tuple(read_edits(given))
        points, problems = [], []
        for edit in edits:
            try:
                points.append(model.find_edit_points(edit))
            except HookNameError as error:
                problems.append(str(error))
        if problems:
            raise HookNameError("; ".join(dict.fromkeys(problems)))
        idle = [edit for edit in edits if edit.when == "decode"]
        if idle:
            raise EditError(
                f"edits: {idle[0]!r} acts on generated tokens only, and an experiment runs prompts: with when='decode' "
                "it would do nothing; leave `when` out"
            )
        if isinstance(model.cfg.positions, ShortformerPositions) and any("hook_pos_embed" in at for at in points):
            raise EditError(
                "edits: hook_pos_embed: shortformer positions enter the queries and keys of every layer, which an "
                "experiment runs by themselves; edit hook_q or hook_k"
            )
        return cls(edits, tuple(points))

    def __bool__(self) -> bool:
        return bool(self.edits)

    @property
    def names(self) -> list[str]:
        """The hook points at which something acts, each once."""
        return list(dict.fromkeys(name for points in self.points for name in points))

    def is_planned(self, names: Collection[str] = ()) -> bool:
        """Whether runs patched at some hook points can go on from an unpatched one."""
        for edit, points in zip(self.edits, self.points, strict=True):
            reach = reach_of(edit)
            in_head = any(map(is_past_blocks, points))
            is_known = all(find_site(name) is not None for name in points)
            if not is_known or reach == "unknown" or (reach == "row" and in_head):
                return False
        # What is embedded is added to the stream entering the first block, which must be as it was left then.
        return "blocks.0.hook_resid_pre" not in self.names or not any(map(is_below_blocks, names))

    @property
    def is_causal(self) -> bool:
        """Whether a token still reads nothing but itself and earlier ones."""
        kinds = zip(self.edits, self.points, strict=True)
        return not any(reach_of(edit) != "token" or any(map(has_keys, points)) for edit, points in kinds)

    @property
    def needs_whole_rows(self) -> bool:
        """Whether all columns of a patched run have to run."""
        return not self.is_causal or any(name.endswith(_PER_HEAD) for name in self.names)

    def check_pairs(self, lengths: Sequence[int], n_pairs: int | None) -> None:
        """Refuse rows that are no pairs of the experiment, and positions outside their prompts, before anything runs.

        Args:
            lengths: tokens of each pair that is at hand.
            n_pairs: how many pairs there are; None: more may follow.

        Raises:
            EditError: pairs or positions that are not there, or rows where pairs come from a loader.
        """
        for edit, names in zip(self.edits, self.points, strict=True):
            if edit.rows is not None and n_pairs is None:
                raise EditError(
                    f"edits: {edit!r} chooses rows, which are pairs of the experiment, but they come from a loader, so "
                    "their number is not known; give the pairs as a list"
                )
            if isinstance(edit, Project) and len(set(lengths)) > 1 and any(map(has_keys, names)):
                raise EditError(
                    f"edits: {edit!r}: directions among keys, in prompts of {min(lengths)} to {max(lengths)} tokens, "
                    "which have other numbers of keys; use prompts of one length"
                )
            chosen, pos = chosen_pairs(edit, len(lengths) if n_pairs is None else n_pairs), edit._read("pos")
            if pos is None or isinstance(pos, slice):
                continue
            for pair in chosen:
                resolve_choice(
                    pos, lengths[pair], what=f"edits: {edit!r}: pos", noun=f"tokens in pair {pair}", error=EditError
                )


NO_EDITS = RunEdits()


def reach_of(edit: Edit) -> Reach:
    """What an edit's new values are made of; a kind that computes them otherwise than its base has to say so anew."""
    kind = next(kind for kind in type(edit).__mro__ if "compute" in vars(kind) or "apply" in vars(kind))
    says = next(kind for kind in type(edit).__mro__ if "reach" in vars(kind))
    if not issubclass(says, kind):
        return "unknown"
    return "token" if edit.reach == "token" else "row" if edit.reach == "row" else "unknown"


def has_keys(name: str) -> bool:
    """Whether a hook point carries what queries make of keys."""
    site = find_site(name)
    return site is not None and "key" in site.axes


def chosen_pairs(edit: Edit, n_pairs: int) -> list[int]:
    """The pairs of an experiment that an edit chooses by its rows.

    Raises:
        EditError: pairs that are not there.
    """
    what = f"edits: {type(edit).__name__}({edit.name!r}): rows"
    return resolve_choice(edit._read("rows"), n_pairs, what=what, noun="pairs", error=EditError)


def check_node_edits(edits: RunEdits, prompts: PromptPairs, *, by_paths: bool = False) -> None:
    """Refuse edits under which nothing could be said of single edges, before anything runs.

    Circuits and paths take a network as nodes that write to a stream, which is the sum of all they have written. An
    edit inside a node changes what it computes, one of its output what it writes; a constant added to the stream is
    there in every circuit, as biases are. Anything else done to the stream, or to what one node reads of it, would
    stand between nodes, on edges, which a circuit has or has not.

    Args:
        edits: of the experiment.
        prompts: its pairs.
        by_paths: whole blocks run on streams that are patched, so that nothing may act in the stream, and heads are
            taken before `W_O`.

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
        between += [name for name in points if not _is_of_node(edit, name, by_paths=by_paths)]
    if unknown:
        raise EditError(
            f"edits: {join_names(unknown, limit=5)}: a circuit is run node by node and position by position, and it is "
            "not known what these edits read; give values such as Replace, Add, Scale, Zero or Project, or use "
            "patching.sweep, which runs whole prompts"
        )
    if between:
        raise EditError(
            f"edits at {join_names(list(dict.fromkeys(between)), limit=5)} stand between nodes, so the network is no "
            "sum of what its nodes write; edit inside attention or MLPs, their outputs "
            f"({'hook_z, hook_mlp_out' if by_paths else 'hook_result, hook_mlp_out'}), the embeddings or what comes "
            f"behind the blocks{'' if by_paths else ', or Add to the stream'}. patching.sweep takes any edit"
        )


def _is_of_node(edit: Edit, name: str, *, by_paths: bool) -> bool:
    """Whether an edit changes a node, or adds a constant to the stream."""
    if is_below_blocks(name) or is_past_blocks(name) or name == "blocks.0.hook_resid_pre":
        return True
    if by_paths and name.endswith("attn.hook_result"):
        return False
    word = name.split(".")[2]
    return word in _IN_NODES or (not by_paths and word in _IN_STREAM and type(edit) is Add)
