"""What is asked for by arguments, against the same taken from a whole run: positions, layers, rows, cached columns."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.kv_cache import HookedKeyValueCache
from hooklens.verification.comparing.ways import ragged_mask
from hooklens.verification.probe import Probe, as_logits, largest_difference, same_bits
from hooklens.verification.report import CheckResult

CHOSEN = "chosen positions and layers are those of the whole run"
LOSS = "the loss is the cross-entropy of the next token"
CACHES = "parts of a key-value cache continue as their rows do"
KEPT = "what is made from a cache, or runs on a frozen one, leaves it as it was"

_WANTED: tuple[Any, ...] = (-1, 0, [0, -1], [-2, 1], slice(1, 3))


def check_chosen(probe: Probe) -> Iterator[CheckResult]:
    """`logits_at`, `pos_slice`, `stop_at_layer`, `start_at_layer`, and the logits of a prefill."""
    tokens, whole = probe.tokens, torch.ones_like(probe.tokens, dtype=torch.bool)
    for words, mask in (("unpadded", whole), ("padded", ragged_mask(tokens, probe.n_tokens // 2))):
        logits = as_logits(probe.model(tokens, attention_mask=mask))
        for wanted in _WANTED:
            found = as_logits(probe.model(tokens, attention_mask=mask, logits_at=wanted))
            expected = torch.stack([row[real][_as_list(wanted)] for row, real in zip(logits, mask, strict=True)])
            yield _compare(probe, CHOSEN, f"logits_at={wanted}, {words}", found, expected)
        if not probe.layers or not probe.model.cfg.causal:
            continue
        last = torch.stack([row[real][-1] for row, real in zip(logits, mask, strict=True)])
        prefilled = probe.model.prefill(tokens, attention_mask=mask)
        assert prefilled.last_logits is not None
        yield _compare(probe, CHOSEN, f"prefill's last logits, {words}", prefilled.last_logits, last)
    yield from _check_layers(probe)
    yield from _check_slices(probe)


def _as_list(wanted: Any) -> Any:
    return [wanted] if isinstance(wanted, int) else wanted


def _check_layers(probe: Probe) -> Iterator[CheckResult]:
    """A run that stops below a layer gives the stream entering it, and one from there on the logits."""
    everywhere = torch.ones_like(probe.tokens)
    for layer in probe.layers:
        name = f"blocks.{layer}.hook_resid_pre"
        if name not in probe.clean_captures:
            continue
        stream = as_logits(probe.model(probe.tokens, attention_mask=everywhere, stop_at_layer=layer))
        yield _compare(probe, CHOSEN, f"stop_at_layer={layer}", stream, probe.clean_captures[name])
        logits = as_logits(probe.model(stream, start_at_layer=layer))
        yield _compare(probe, CHOSEN, f"start_at_layer={layer}", logits, probe.clean_logits)


def _check_slices(probe: Probe) -> Iterator[CheckResult]:
    for wanted in _WANTED:
        with probe.model.capture(probe.names, pos_slice=wanted) as captured:
            probe.run()
        worst, offender = 0.0, ""
        for name, tensor in captured.items():
            site = probe.model.hook_points()[name].site
            axis = None if site is None else site.position_axis
            whole = probe.clean_captures[name]
            columns = torch.arange(probe.n_tokens)[_as_list(wanted)].to(whole.device)
            expected = whole if axis is None else whole.index_select(axis, columns)
            off = largest_difference(tensor, expected) if tensor.shape == expected.shape else torch.inf
            worst, offender = (off, name) if off > worst else (worst, offender)
        message = "" if worst == 0 else f"other columns than those chosen are kept, at {offender}"
        yield CheckResult(check=CHOSEN, subject=f"pos_slice={wanted}", measured=worst, bound=0.0, message=message)


def check_loss(probe: Probe) -> Iterator[CheckResult]:
    """The mean loss and the losses per token, of padded and unpadded rows; none where no token is predicted."""
    if probe.model.cfg.d_vocab_out != probe.model.cfg.d_vocab:
        return
    tokens, whole = probe.tokens, torch.ones_like(probe.tokens, dtype=torch.bool)
    for words, mask in (("unpadded", whole), ("padded", ragged_mask(tokens, probe.n_tokens // 2))):
        logits = as_logits(probe.model(tokens, attention_mask=mask)).double()
        losses, expected = [], torch.zeros(len(tokens), probe.n_tokens - 1, dtype=torch.float64, device=tokens.device)
        for row in range(len(tokens)):
            real = mask[row].nonzero()[:, 0].tolist()
            for before, column in pairwise(real):
                scores = logits[row, before]
                loss = scores.logsumexp(-1) - scores[tokens[row, column]]
                losses.append(loss)
                expected[row, column - 1] = loss
        # One rounding of the logits moves a loss by as much.
        bound = probe.rounding + 64 * torch.finfo(probe.dtype).eps
        for per_token, target in ((False, torch.stack(losses).mean()), (True, expected)):
            found = probe.model(tokens, attention_mask=mask, return_type="loss", loss_per_token=per_token)
            measured = largest_difference(as_logits(found), target)
            subject = f"{'each token' if per_token else 'mean'}, {words}"
            yield CheckResult(check=LOSS, subject=subject, measured=measured, bound=bound)


def check_caches(probe: Probe) -> Iterator[CheckResult]:
    """Rows, columns and copies of a cache, each continued, against the logits of whole rows."""
    half = probe.n_tokens // 2
    mask = ragged_mask(probe.tokens, half)
    for words, columns in (("unpadded", torch.ones_like(mask)), ("padded", mask)):
        yield from _check_parts(probe, columns, half, words)
    yield from _check_immutable(probe, mask, half)


def _check_parts(probe: Probe, mask: Tensor, half: int, words: str) -> Iterator[CheckResult]:
    tokens, model = probe.tokens, probe.model
    kept = model.prefill(tokens[:, :half], attention_mask=mask[:, :half])
    order, shorter = [2, 0], half - 2
    parts: dict[str, tuple[Callable[[], HookedKeyValueCache], list[int], int]] = {
        f"select({order})": (lambda: kept.select(order), order, half),
        f"crop({shorter})": (lambda: kept.crop(shorter), [0, 1, 2], shorter),
        "clone()": (kept.clone, [0, 1, 2], half),
        "saved and loaded": (lambda: _save_and_load(kept), [0, 1, 2], half),
        "select(slice(1, 2)).expand(3)": (lambda: kept.select(slice(1, 2)).expand(3), [1, 1, 1], half),
        f"rolled back to {shorter}": (lambda: _roll_back(kept, shorter), [0, 1, 2], shorter),
    }
    for frozen in (True, False):
        for part, (make, rows, start) in parts.items():
            cache = make().freeze() if frozen else make().unfreeze()
            n_rows = len(rows)
            suffix, suffix_mask = tokens[:n_rows, start:], mask[:n_rows, start:]
            found = as_logits(model(suffix, attention_mask=suffix_mask, past_kv_cache=cache))
            whole = torch.cat([tokens[rows, :start], suffix], 1)
            whole_mask = torch.cat([mask[rows, :start], suffix_mask], 1)
            expected = as_logits(model(whole, attention_mask=whole_mask))[:, start:]
            subject = f"{part}, {'frozen' if frozen else 'appended to'}, {words}"
            yield _compare(probe, CACHES, subject, found[suffix_mask], expected[suffix_mask])


def _save_and_load(cache: HookedKeyValueCache) -> HookedKeyValueCache:
    with tempfile.TemporaryDirectory(prefix="hooklens-verify-") as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        return HookedKeyValueCache.load(path, device=cache.device)


def _roll_back(cache: HookedKeyValueCache, n: int) -> HookedKeyValueCache:
    part = cache.clone().unfreeze()
    part.roll_back(n)
    return part


def _check_immutable(probe: Probe, mask: Tensor, half: int) -> Iterator[CheckResult]:
    """A frozen cache is a value: after all that is done with it, it holds the same bits."""
    model, tokens = probe.model, probe.tokens
    cache = model.prefill(tokens[:, :half], attention_mask=mask[:, :half])
    before = _snapshot(cache)
    suffix, suffix_mask = tokens[:, half:], mask[:, half:]
    once = as_logits(model(suffix, attention_mask=suffix_mask, past_kv_cache=cache))
    yield _compare_snapshots("run on it", before, _snapshot(cache))
    for what, part in (("crop", cache.crop(half)), ("select", cache.select(slice(None))), ("clone", cache.clone())):
        model(suffix, attention_mask=suffix_mask, past_kv_cache=part.unfreeze())
        yield _compare_snapshots(f"{what}, appended to", before, _snapshot(cache))
    part = cache.clone().unfreeze()
    # Appended to once, so that its buffers have spare room.
    model(suffix[:, :1], attention_mask=suffix_mask[:, :1] | True, past_kv_cache=part)
    view, held = part.crop(half + 1), _snapshot(part)
    part.roll_back(half)
    model(suffix[:, 1:], attention_mask=suffix_mask[:, 1:], past_kv_cache=part)
    yield _compare_snapshots("rolled back and appended to, seen through crop", held, _snapshot(view))
    again = as_logits(model(suffix, attention_mask=suffix_mask, past_kv_cache=cache))
    measured = 0.0 if same_bits(once, again) else max(largest_difference(once, again), 1e-300)
    yield CheckResult(check=KEPT, subject="run on it twice", measured=measured, bound=0.0)


def _snapshot(cache: HookedKeyValueCache) -> list[Tensor]:
    held = [tensor for entry in cache.entries for tensor in (entry.past_keys, entry.past_values)]
    return [tensor.clone() for tensor in (*held, cache.previous_attention_mask)]


def _compare_snapshots(subject: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> CheckResult:
    changed = sum(not same_bits(one, other) for one, other in zip(before, after, strict=True))
    message = "" if not changed else "so many of the cached tensors have changed"
    return CheckResult(check=KEPT, subject=subject, measured=float(changed), bound=0.0, message=message)


def _compare(probe: Probe, check: str, subject: str, found: Tensor, expected: Tensor) -> CheckResult:
    if found.shape != expected.shape:
        message = f"shape {list(found.shape)}, expected {list(expected.shape)}"
        return CheckResult(check=check, subject=subject, measured=float("inf"), bound=0.0, message=message)
    measured = largest_difference(found, expected)
    # Other numbers of columns take other kernels.
    bound = probe.rounding
    message = "" if measured <= bound else "these are other numbers than those of the whole run"
    return CheckResult(check=check, subject=subject, measured=measured, bound=bound, message=message)
