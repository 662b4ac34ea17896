"""Path patching: what senders do through chosen receivers, and through nothing else.

Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching") asks
how much of a sender's effect goes directly to some receivers. In three passes:

1. both prompts are run;
2. the run that is patched is run again with the sender's output taken from the other run and every other head
   held at its own value, so that the change travels only along the stream (and through MLPs, unless these are
   held, too); what the receivers then read is recorded;
3. the run is run once more, with nothing changed but the receivers, which are given what they read in pass 2.

    value(sender) = metric of pass 3

Receivers are queries, keys or values of heads, MLPs, or the logits, for which passes 2 and 3 are one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.patching.graph.nodes import Reader, Writer, check_additive, list_writers, parse_reader, parse_writer
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import Prompt, PromptPairs, read_pairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.runs.baseline import Baseline, Direction, run_baseline, unembed
from hooklens.patching.runs.checks import check_model
from hooklens.patching.runs.progress import keep_partial_result


def path_patch(
    model: HookedCausalLM,
    clean: Prompt,
    corrupted: Prompt,
    senders: Sequence[str] | None,
    receivers: Sequence[str],
    metric: Metric | MetricFunction,
    *,
    through_mlps: bool = True,
    direction: Direction = "denoise",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult:
    """Measure what each sender does through the receivers.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied.
        corrupted: as many prompts of the same lengths.
        senders: names of writers (`"embed"`, `"a3.h5"`, `"m3"`), each patched by itself; None: all.
        receivers: names of readers (`"a9.h6.q"`, `"m7"`, `"logits"`), all of them together.
        metric: as for a sweep.
        through_mlps: let the change pass MLPs between sender and receivers; False: only the direct path.
        direction: which run is patched.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Returns:
        One value per sender.

    Raises:
        SiteError: an unknown sender or receiver.
        InputError: no receiver, or a norm between heads and stream.
        SweepInterruptedError: stopped, or failed on the way; it holds what was measured.
    """
    check_model(model, allow_training=allow_training)
    check_additive(model.cfg)
    cfg = model.cfg
    sending = list_writers(cfg) if senders is None else [parse_writer(name, cfg) for name in senders]
    receiving = [parse_reader(name, cfg) for name in receivers]
    if not sending or not receiving:
        raise InputError("path_patch needs at least one sender and one receiver")
    prompts = read_pairs(model, clean, corrupted, attention_mask)
    with torch.no_grad():
        baseline = run_baseline(
            model, prompts, range(len(prompts)), [], as_metric(metric), direction=direction, source="other"
        )
        run = _PathRun(model, prompts, baseline, receiving, through_mlps=through_mlps, direction=direction)
        values = baseline.clean.new_full((len(sending), len(prompts)), torch.nan)

        def result() -> SweepResult:
            return _result_of(run, sending, prompts, values, direction)

        with keep_partial_result("path patching", "senders", values, result, progress=progress) as bar:
            for row, sender in zip(values, sending, strict=True):
                row.copy_(run.measure(sender))
                bar.update(len(row))
    return result()


def _result_of(
    run: "_PathRun", sending: Sequence[Writer], prompts: PromptPairs, values: Tensor, direction: Direction
) -> SweepResult:
    """The values so far, labelled."""
    baseline, receivers = run.baseline, ", ".join(map(str, run.receivers))
    n_tokens, forwards = sum(prompts.lengths), 1 + run.forwards
    return SweepResult(
        per_pair=values.clone(),
        axes={"sender": tuple(map(str, sending))},
        clean_per_pair=baseline.clean,
        corrupted_per_pair=baseline.corrupted,
        cells=tuple({"sender": str(sender), "receivers": receivers} for sender in sending),
        metric=baseline.metric.name,
        direction=direction,
        stats=SweepStats(
            cells=len(sending),
            pairs=len(prompts),
            unchanged=0,
            forwards=forwards,
            tokens=(1 + forwards) * n_tokens,
            naive_forwards=(2 + 2 * len(sending)) * len(prompts),
            naive_tokens=(2 + 2 * len(sending)) * n_tokens,
        ),
    )


class _PathRun:
    """The runs of an experiment with fixed receivers."""

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        baseline: Baseline,
        receivers: Sequence[Reader],
        *,
        through_mlps: bool,
        direction: Direction,
    ) -> None:
        self.model, self.baseline, self.receivers, self.through_mlps = model, baseline, receivers, through_mlps
        into, other = (
            (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
        )
        columns = torch.arange(into.shape[1], device=into.device)
        self.tokens = into
        self.mask = columns < torch.tensor(prompts.lengths, device=into.device)[:, None]
        self.forwards = 0
        layers = range(model.cfg.n_layers)
        outputs = [_output_of(writer) for writer in list_writers(model.cfg)]
        self.last = f"blocks.{layers[-1]}.hook_resid_post"
        self.own, _ = self._run(into, [], [*outputs, self.last])
        self.others, _ = self._run(other, [], outputs)

    def measure(self, sender: Writer) -> Float[Tensor, " pairs"]:
        """The metric of the run in which only the receivers know of the sender's change."""
        inputs = list(dict.fromkeys(_input_of(receiver) for receiver in self.receivers))
        read, stream = self._run(self.tokens, self._hold_all_but(sender), [*inputs, self.last])
        if any(receiver.kind != "logits" for receiver in self.receivers):
            _, stream = self._run(self.tokens, [(name, self._receive(name, read)) for name in inputs], [])
        reads = self.baseline.reads
        logits = unembed(self.model, stream.take_along_dim(reads[..., None], dim=1))
        return self.baseline.metric.measure(logits[None])[0]

    def _run(self, tokens: Tensor, hooks: list[Any], names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """What passes some hook points, and the last stream."""
        self.forwards += 1
        watched = [*names, self.last]
        with self.model.hooks(hooks), self.model.capture(list(dict.fromkeys(watched))) as captured:
            stream = self.model.run(tokens, self.model.make_plan(tokens, self.mask), unembed=False)
        return captured, stream

    def _hold_all_but(self, sender: Writer) -> list[Any]:
        """Hooks that hold heads, and MLPs where asked, at their own values, and give the sender the other run's."""
        hooks: list[Any] = []
        for writer in list_writers(self.model.cfg):
            name = _output_of(writer)
            is_sender = name == _output_of(sender)
            held = writer.kind == "head" or (writer.kind == "mlp" and not self.through_mlps)
            if (is_sender or held) and not any(name == known for known, _ in hooks):
                hooks.append((name, _Hold(self.own[name], self.others[name], sender if is_sender else None)))
        return hooks

    def _receive(self, name: str, read: dict[str, Tensor]) -> "_Receive":
        heads = [receiver.head for receiver in self.receivers if _input_of(receiver) == name]
        # Logits read what the sender sends them on top of what the other receivers make of it.
        extra = read[name] - self.own[name] if name == self.last else None
        return _Receive(read[name], heads, extra)


class _Hold:
    """A hook that puts a run's own activation in place, with the sender's part from the other run."""

    def __init__(self, own: Tensor, other: Tensor, sender: Writer | None) -> None:
        self.held = own
        if sender is not None:
            self.held = other if sender.kind != "head" else own.clone()
            if sender.kind == "head":
                self.held[:, :, sender.head] = other[:, :, sender.head]

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        return self.held


class _Receive:
    """A hook that gives receivers what they read in the pass before."""

    def __init__(self, read: Tensor, heads: Sequence[int], extra: Tensor | None) -> None:
        self.read, self.heads, self.extra = read, list(heads), extra

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        if self.extra is not None:
            return tensor + self.extra
        if tensor.ndim == 3:
            return self.read
        received = tensor.clone()
        received[:, :, self.heads] = self.read[:, :, self.heads]
        return received


def _output_of(writer: Writer) -> str:
    """Where a writer's output is replaced: a head's before `W_O`, which is the same and cheaper."""
    if writer.kind == "head":
        return f"blocks.{writer.layer}.attn.hook_z"
    return writer.hook_name


def _input_of(reader: Reader) -> str:
    """Where what a reader reads is replaced: for heads after the projection, which is the same and cheaper."""
    if reader.kind in ("q", "k", "v"):
        return f"blocks.{reader.layer}.attn.hook_{reader.kind}"
    return reader.hook_name
