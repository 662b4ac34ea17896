"""Running a case with the engine: its calls, who listens, and what comes back, told apart by rows and tokens."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooklens import HookedCausalLM, HookedKeyValueCache
from hooklens.axes import layer_of
from tests.combinations.cases import Case, stack_rows
from tests.combinations.edits import Running

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


@dataclass
class Ran:
    """What one call gave.

    Attributes:
        number: which part of the case it ran.
        logits: of the call, or None where it gave a loss.
        loss: where it gave one.
        captured: by hook name.
    """

    number: int
    logits: Tensor | None
    loss: Tensor | None
    captured: dict[str, Tensor] = field(default_factory=dict)


class Runner:
    """A case's calls.

    Args:
        case: what to run.
        model: with what.
        altered: rows that get other tokens.
    """

    def __init__(self, case: Case, model: HookedCausalLM, *, altered: Sequence[int] = ()) -> None:
        self.case, self.model = case, model
        tokens, positions = case.tokens(altered=altered), case.positions()
        self.rows = [
            [token for part in tokens for token in part[0 if len(part) == 1 else row]] for row in range(case.n_rows)
        ]
        self.inputs: list[Tensor] = []
        self.keywords: list[dict[str, Any]] = []
        self.running: list[Running] = []
        before = [0] * case.n_rows
        for part, drawn in zip(case.parts, tokens, strict=True):
            spread = [part.lengths[0 if len(part.mask) == 1 else row] for row in range(case.n_rows)]
            lengths = [n + more for n, more in zip(before, spread, strict=True)]
            mask = torch.tensor(part.mask)
            keywords: dict[str, Any] = {}
            if case.says_mask or not mask.all():
                keywords["attention_mask"] = mask.long() if case.seed % 2 else mask
            if case.spread is not None:
                given = [positions[row][before[row] : lengths[row]] for row in range(len(part.mask))]
                keywords["positions"] = stack_rows(given, part, 0)
            keywords |= self._say_documents(len(self.inputs), before, lengths)
            self.inputs.append(stack_rows(drawn, part, case.seed % 7))
            self.keywords.append(keywords)
            columns = [[c for c, is_token in enumerate(row) if is_token] for row in part.mask]
            self.running.append(
                Running(before, lengths, columns * (case.n_rows if len(part.mask) < case.n_rows else 1), None)
            )
            before = lengths
        if case.logits_at is not None:
            last = self.running[-1]
            chosen = [
                _choose(list(range(a, b)), case.logits_at) for a, b in zip(last.before, last.lengths, strict=True)
            ]
            self.running[-1] = Running(last.before, last.lengths, last.columns, chosen)
            self.keywords[-1]["logits_at"] = case.logits_at
        self.prefix: HookedKeyValueCache | None = None
        if case.n_given:
            with self.mode():
                self.prefix = model.prefill(self.inputs[0], **self.keywords[0])

    def _say_documents(self, number: int, before: list[int], lengths: list[int]) -> dict[str, Any]:
        """The keywords about documents for one part; a part in which none starts may leave them out."""
        case, documents = self.case, self.case.documents()
        if documents is None:
            return {}
        part, starts = case.parts[number], case.starts[number]
        none_starts = not any(flag for row in starts for flag in row)
        if none_starts and (number if case.says_ids else case.seed % 2):
            return {}
        said: dict[str, Any] = {}
        if case.spread is None and (case.seed % 2 or case.restarts != case.cfg.document_mask):
            said["restart_positions"] = case.restarts
        if case.says_ids:
            given = [documents[row][before[row] : lengths[row]] for row in range(len(part.mask))]
            return {**said, "document_ids": stack_rows(given, part, -1 if case.seed % 3 else 5)}
        return {**said, "document_borders": stack_rows([list(row) for row in starts], part, False)}

    def mode(self):
        return MODES[self.case.mode if self.case.gradient is None else "grad"]()

    @property
    def numbers(self) -> list[int]:
        """The parts that edits and captures see."""
        return list(range(self.case.n_given, len(self.case.parts)))

    def edits_of(self, number: int) -> list:
        """The edits that fit a call: a list of positions has to lie in every row."""
        return [edit for edit in self.case.edits if edit.fits(self.running[number])]

    def run(self, *, watches: bool = True) -> list[Ran]:
        """All calls; on a frozen prefix any number of times."""
        case = self.case
        cache = self.prefix
        if case.scheme == "grow":
            cache = HookedKeyValueCache.init_cache(self.model.cfg, None, case.n_rows, dtype=case.dtype)
        ran = []
        with self.mode():
            for number in self.numbers:
                keywords = {**self.keywords[number], "past_kv_cache": cache}
                edits = [edit.as_edit(case.dtype) for edit in self.edits_of(number)]
                hooks = [hook.as_hook() for hook in case.hooks]
                with ExitStack() as stack:
                    if case.delivery == "with":
                        stack.enter_context(self.model.hooks(fwd_hooks=hooks, edits=edits))
                    elif case.delivery == "add":
                        for name, fn in hooks:
                            stack.enter_context(self.model.add_hook(name, fn))
                        for edit in edits:
                            stack.enter_context(self.model.add_edit(edit))
                    given = {"fwd_hooks": hooks, "edits": edits} if case.delivery == "call" else {}
                    ran.append(self._run_part(number, keywords, given, watches=watches))
        return ran

    def _run_part(self, number: int, keywords: dict, given: dict, *, watches: bool) -> Ran:
        case, model, ids = self.case, self.model, self.inputs[number]
        kept: dict[str, Any] = {"dtype": case.kept_dtype, "pos_slice": case.pos_slice}
        kept["device"] = "cpu" if case.seed % 3 == 0 else None
        if watches and case.gradient == "loss":
            loss, cache = model.run_with_cache(
                ids, names_filter=list(case.names), incl_bwd=True, return_type="loss", **kept, **given, **keywords
            )
            return Ran(number, None, loss.detach(), dict(cache.items()))
        if watches and case.gradient is None and case.half is None:
            logits, cache = model.run_with_cache(ids, names_filter=list(case.names), **kept, **given, **keywords)
            return Ran(number, logits.detach(), None, dict(cache.items()))
        if not watches:
            return Ran(number, self._run_halves(ids, keywords, given).detach(), None)
        recorded: dict[str, Tensor] = {}
        if case.gradient == "hooks":
            given = {**given, "bwd_hooks": [(name, _record_in(recorded)) for name in case.names]}
        with model.capture(list(case.names), incl_bwd=case.gradient == "capture", **kept) as captured:
            logits, loss = self._run_halves(ids, keywords, given), None
            if case.gradient is not None:
                loss = own_loss(case, self, number, logits)
                if loss.requires_grad:
                    loss.backward()
        return Ran(number, logits.detach(), None if loss is None else loss.detach(), {**captured, **recorded})

    def _run_halves(self, ids: Tensor, keywords: dict, given: dict) -> Tensor:
        half = self.case.half
        if half is None:
            return self.model.run_with_hooks(ids, **given, **keywords)
        shared = {name: value for name, value in keywords.items() if name != "logits_at"}
        below, above = _split(given, half)
        stream = self.model.run_with_hooks(ids, stop_at_layer=half, **below, **shared)
        return self.model.run_with_hooks(stream, start_at_layer=half, **above, **keywords)


def _split(given: dict, half: int) -> tuple[dict, dict]:
    """Hooks and edits of the blocks below a layer, and the others."""

    def is_below(name: str) -> bool:
        layer = layer_of(name)
        return name.startswith(("hook_embed", "hook_pos_embed", "embed.")) if layer is None else layer < half

    edits = given.get("edits", ())
    return tuple(
        {
            **{
                kind: [(name, fn) for name, fn in given.get(kind, ()) if is_below(name) == side]
                for kind in ("fwd_hooks", "bwd_hooks")
            },
            "edits": [edit for edit in edits if is_below(edit.name) == side],
        }
        for side in (True, False)
    )  # type: ignore[return-value]


def _record_in(recorded: dict[str, Tensor]) -> Callable[..., None]:
    def record(gradient, hook):
        assert f"{hook.name}_grad" not in recorded
        recorded[f"{hook.name}_grad"] = gradient.clone()

    return record


def _choose(positions: list[int], wanted: Any) -> list[int]:
    if isinstance(wanted, slice):
        return positions[wanted]
    return [positions[one] for one in ([wanted] if isinstance(wanted, int) else wanted)]


def own_loss(case: Case, runner: Runner, number: int, logits: Tensor) -> Tensor:
    """A weighted sum of the logits of all tokens."""
    terms = [logits[row, column] @ weight for row, column, _, weight in weighted_logits(case, runner, number)]
    return torch.stack(terms).sum() if terms else logits.sum() * 0.0


def weighted_logits(case: Case, runner: Runner, number: int) -> Iterator[tuple[int, int, int, Tensor]]:
    """Row, column of the logits, position, and the weights of that token's logits."""
    call, generator = runner.running[number], case.generator(1)
    for row in range(case.n_rows):
        if call.chosen is None:
            places = zip(call.columns[row], range(call.before[row], call.lengths[row]), strict=True)
        else:
            places = enumerate(call.chosen[row])  # type: ignore[assignment]
        for column, position in places:
            yield row, column, position, torch.randn(case.cfg.d_vocab_out, generator=generator, dtype=torch.float64)


@contextmanager
def busy_thread(model: HookedCausalLM, *, is_busy: bool) -> Iterator[None]:
    """Another thread that runs the model plainly meanwhile, and must get the same every time."""
    if not is_busy:
        yield
        return
    ids, found, done = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), [], threading.Event()
    with torch.no_grad():
        expected = model(ids)

    def run() -> Any:
        with torch.no_grad():
            while not (done.is_set() and found):
                found.append(model(ids))

    # A future, unlike a thread, tells of what was raised in it.
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(run)
        try:
            yield
        finally:
            done.set()
        future.result()
    assert all(torch.equal(one, expected) for one in found)
