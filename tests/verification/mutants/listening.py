"""Faults of hook points, captures and edits."""

from tests.verification.mutation import Mutant

EDITS = "single edits"
CHOICES = "positions and layers"
VALUES = "edits as values"

LISTENING = (
    Mutant(
        "captures show what was there before an edit",
        "hooks.point:HookPoint._fire",
        (("watcher.keep(current, self, call)", "watcher.keep(tensor, self, call)"),),
        stage=EDITS,
    ),
    Mutant(
        "what a hook returns is dropped",
        "hooks.point:HookPoint._run_hooks",
        (("current = returned.clone() if is_foreign else returned", "current = handed"),),
        stage=EDITS,
    ),
    Mutant(
        "an edit in place of a side tensor is not noticed",
        "hooks.point:HookPoint._run_hooks",
        (("handed._version != version", "handed._version == -1"),),
        stage=EDITS,
    ),
    Mutant(
        "listeners of two `with` blocks replace each other",
        "hooks.call:join_listeners",
        (("listening if earlier is None else earlier.joined(listening)", "listening"),),
        stage=EDITS,
    ),
    Mutant(
        "negative entries count from the start",
        "hooks.choice:resolve_choice",
        (("[number % size for number in numbers]", "[abs(number) % size for number in numbers]"),),
        stage=CHOICES,
    ),
    Mutant(
        "negative positions of padded rows count columns",
        "hooks.region:_choose_by_row",
        (("wanted[None, :] + lengths[:, None]", "wanted[None, :] + n_columns"),),
        stage=VALUES,
    ),
    Mutant(
        "positions behind a cache count from its end",
        "hooks.region:choose_tokens",
        (("place = {position: column for", "place = {position - positions[0]: column for"),),
        stage=VALUES,
    ),
    Mutant(
        "a slice of padded rows is cut as if none were padded",
        "hooks.region:_in_slice",
        (("wanted.indices(int(length))", "wanted.indices(token_index.shape[1])"),),
        stage=VALUES,
    ),
    Mutant(
        "the mean is that of each row",
        "hooks.edits:Mean.compute",
        (('("token", "batch", "pos", "query")', '("token", "pos", "query")'),),
        stage=VALUES,
    ),
    Mutant(
        "Project keeps what it has to remove",
        "hooks.edits:Project.compute",
        (("(inside if self.keep else wide - inside)", "(wide - inside if self.keep else inside)"),),
        stage=VALUES,
    ),
    Mutant("Scale loses the sign", "hooks.edits:Scale.compute", (("self.factor", "abs(self.factor)"),), stage=VALUES),
    Mutant(
        "chosen rows are taken for the first ones",
        "hooks.edit:Edit.find_region",
        (("row=torch.as_tensor(rows, device=tensor.device)[chosen.row]", "row=chosen.row"),),
        stage=VALUES,
    ),
    Mutant(
        "pos_slice cuts the second axis, whatever it is",
        "hooks.capture:Capture._slice_positions",
        (("tensor.index_select(axis,", "tensor.index_select(1,"),),
        stage=CHOICES,
    ),
)
