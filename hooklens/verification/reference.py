"""Logits against transformers: the checkpoint's reference implementation, attending with `sdpa` where it can.

Three dtypes, three questions:

- float64: is it the same function? To 1e-9 where the reference computes in float64 throughout. Some
  architectures in transformers narrow activations to float32 inside their norms; this is observed while the
  reference runs, and the float32 bound is then used.
- float32: 2e-5, or where the network is so deep or its activations so large that transformers itself is
  further from float64, 2.2 times its distance: two computations that are each that far off, ours by at most
  1.2 times as much, can differ by that.
- half precision: the error of our logits against the same weights in float64 is at most 1.2 times that of
  transformers', root mean square over the real positions of many rows: the largest error is a matter of luck, and so
  is the mean of one row, whose positions share their rounding (for the same function it is 0.7 to 1.5 times theirs).
  Where a router sends tokens to experts it is the median over positions: between two experts whose logits are nearly
  equal rounding alone decides, in transformers as here, and the few tokens that it sends elsewhere would outweigh all.

Of quantised weights and of adapters the reference has what they come to, in plain numbers that are rounded once more.
There 2 stands in the place of 1.2, and so 3 in that of 2.2.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens.adapters import choose_attention, open_config
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import MoEConfig
from hooklens.model.parts.adapted import adapted_maps
from hooklens.model.parts.quantised import quantised_maps
from hooklens.optional import import_package
from hooklens.verification.probe import PaddingSide, Probe, as_logits, largest_difference
from hooklens.verification.report import CheckResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = "logits against transformers"
FLOAT64_BOUND = 1e-9
FLOAT32_BOUND = 2e-5
ERROR_RATIO = 1.2
# Kernels of quantised maps round a product before it is scaled, and again after, and the reference rounds the weights.
_QUANTISED_RATIO = 2.0
# Of each length. The ratio of two errors of one row has a standard deviation of about 0.15; a third of it is left.
_ROWS_IN_HALF_PRECISION = 8

LoadReference = Callable[[torch.dtype], "PreTrainedModel"]


@dataclass(frozen=True)
class _Batch:
    """An input, and which of its columns are real."""

    label: str
    tokens: Tensor
    mask: Tensor

    def real(self, logits: Tensor) -> Tensor:
        """The logits at real positions, one after another."""
        return logits[self.mask]


def reference_loader(source: str | Path | HookedCausalLM, device: torch.device) -> LoadReference:
    """A function from a dtype to the transformers model of a checkpoint folder, or of a model in memory.

    The function raises UnsupportedModelError where no transformers architecture can hold a model in memory.
    """

    def load(dtype: torch.dtype) -> "PreTrainedModel":
        if isinstance(source, HookedCausalLM):
            model = cast_model(source, dtype).to_hf()
        else:
            attention = choose_attention(open_config(source))
            model = import_package("transformers").AutoModelForCausalLM.from_pretrained(
                str(source), dtype=dtype, attn_implementation=attention, local_files_only=True
            )
        # The model is asked for float64 later, which the product that runs all experts at once refuses.
        model.set_experts_implementation("eager")
        # transformers' `to` is typed as no method.
        return type(model).to(model.eval(), device=device)

    return load


@contextmanager
def float64_by_default() -> Iterator[None]:
    """PyTorch makes new tensors in float64, without which some networks of transformers refuse that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_model(model: HookedCausalLM, dtype: torch.dtype) -> HookedCausalLM:
    """A copy of the very model, with whatever was put into it, in a dtype.

    A model with quantised weights computes with them in its own dtype; the copy has them dequantised.
    """
    if quantised_maps(model):
        return model.dequantize().to(dtype)
    return copy.deepcopy(model).to(dtype)


def check_logits(probe: Probe, load: LoadReference, dtypes: Sequence[torch.dtype]) -> list[CheckResult]:
    """Rows of each length alone, a left-padded and a right-padded batch in each dtype; only real positions count."""
    results = []
    for dtype in dtypes:
        ours = probe.model if dtype == probe.dtype else cast_model(probe.model, dtype)
        asked = probe.repeat(_ROWS_IN_HALF_PRECISION) if dtype.itemsize < 4 else probe
        batches = list(_batches(asked))
        # Of adapters, too, the reference has the weights that they are merged into, rounded.
        rounds = bool(quantised_maps(ours) or adapted_maps(ours))
        found = {batch.label: batch.real(as_logits(ours(batch.tokens, attention_mask=batch.mask))) for batch in batches}
        del ours
        theirs = load(dtype)
        expected, narrows = _run_reference(theirs, asked, batches)
        # The same weights, widened: what is left is the error of the computation.
        exact = (
            expected
            if dtype == torch.float64
            else _run_reference(type(theirs).to(theirs, dtype=torch.float64), asked, batches)[0]
        )
        del theirs
        for label, logits in found.items():
            subject = f"{str(dtype).removeprefix('torch.')}, {label}"
            references = (expected[label], exact[label])
            results.append(
                _compare(
                    subject,
                    dtype,
                    logits,
                    *references,
                    narrows=narrows,
                    routes=routes(probe.model),
                    ratio=_QUANTISED_RATIO if rounds else ERROR_RATIO,
                )
            )
    return results


def _batches(probe: Probe) -> Iterator[_Batch]:
    # Shortest first: transformers' frequencies that depend on length keep the longest seen so far.
    for length, rows in sorted(_rows_by_length(probe).items()):
        label = f"single row of {length}" if len(rows) == 1 else f"{len(rows)} rows of {length}"
        tokens = probe.tokens[rows, :length]
        yield _Batch(label, tokens, torch.ones_like(tokens, dtype=torch.bool))
    sides: tuple[PaddingSide, ...] = ("left", "right")
    for side in sides:
        yield _Batch(f"{side}-padded", *probe.pad(side))


def _rows_by_length(probe: Probe) -> dict[int, list[int]]:
    """Which rows of the padded batches have a length, by length."""
    return {length: [i for i, one in enumerate(probe.lengths) if one == length] for length in set(probe.lengths)}


def _run_reference(model: "PreTrainedModel", probe: Probe, batches: Sequence[_Batch]) -> tuple[dict[str, Tensor], bool]:
    """Logits of each batch at real positions, and whether float64 activations were narrowed on the way.

    Where rotary frequencies depend on the sequence's length transformers takes the longest row's for the whole
    batch; there the padded batches are held against the rows run without padding, which must not change them. So are
    they where transformers' own are not numbers: some architectures mask with the lowest float64 before a softmax in
    float32, where that is minus infinity. And where queries have a temperature, for which some count padding as
    positions, whatever positions they are given.
    """
    narrowing = _NarrowingWatch(probe.n_tokens)
    with narrowing if model.dtype == torch.float64 else nullcontext():
        logits = {batch.label: batch.real(_call(model, batch.tokens, batch.mask)) for batch in batches}
    padded = [label for label in logits if label.endswith("padded")]
    overflown = model.dtype == torch.float64 and any(logits[label].isnan().any() for label in padded)
    is_tuned = probe.model.cfg.query_temperature is not None
    if overflown or is_tuned or probe.model.depends_on_length(probe.n_tokens):
        alone: dict[int, Tensor] = {}
        for (length, rows), batch in zip(sorted(_rows_by_length(probe).items()), batches, strict=False):
            alone |= dict(zip(rows, torch.split(logits[batch.label], length), strict=True))
        in_order = torch.cat([alone[row] for row in range(len(probe.lengths))])
        logits |= dict.fromkeys(padded, in_order)
    return logits, narrowing.seen


def _call(model: "PreTrainedModel", tokens: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with float64_by_default() if model.dtype == torch.float64 else nullcontext():
        output = model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _compare(
    subject: str,
    dtype: torch.dtype,
    found: Tensor,
    expected: Tensor,
    exact: Tensor,
    *,
    narrows: bool,
    routes: bool,
    ratio: float,
) -> CheckResult:
    if dtype.itemsize < 4:
        measured = typical_error(found, exact, routes=routes)
        bound = ratio * typical_error(expected, exact, routes=routes)
        over = "root mean square error" if not routes else "median over positions of the root mean square error"
        message = f"{over} against float64, ours and {ratio} times that of transformers"
        return CheckResult(check=LOGITS, subject=subject, measured=measured, bound=bound, message=message)
    measured = largest_difference(found, expected)
    bound, message = FLOAT64_BOUND, ""
    if dtype == torch.float32:
        # Triangle inequality: |ours - theirs| <= |ours - exact| + |theirs - exact|.
        bound = max(FLOAT32_BOUND, (1 + ratio) * largest_difference(expected, exact))
    elif narrows:
        bound = FLOAT32_BOUND * max(1.0, float(expected.abs().max()) / 16)
        message = "transformers narrows activations to float32 inside this network, so the float32 bound holds"
    if not measured <= bound:
        message = "the logits are not those of the reference: compare config.json, weights and positions. " + message
    return CheckResult(check=LOGITS, subject=subject, measured=measured, bound=bound, message=message)


def routes(model: HookedCausalLM) -> bool:
    """Whether a router sends tokens to experts in any layer."""
    return any(isinstance(block.mlp, MoEConfig) for block in model.cfg.blocks)


def typical_error(found: Tensor, exact: Tensor, *, routes: bool) -> float:
    """The root mean square error of logits `[... d_vocab]`; with `routes`, the median of those of each position."""
    of_positions = (found.double() - exact.double()).square().mean(-1)
    return float((of_positions.median() if routes else of_positions.mean()).sqrt())


class _NarrowingWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices when an activation, `[batch pos ...]` or `[batch head pos ...]`, goes from float64 to float32.

    Constants such as rotary tables are narrower on purpose, and have no such axes.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._n_tokens = n_tokens
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if (
            isinstance(source, Tensor)
            and isinstance(output, Tensor)
            and (source.dtype, output.dtype) == (torch.float64, torch.float32)
            and source.ndim >= 3
            and self._n_tokens in source.shape[1:3]
        ):
            self.seen = True
        return output
