"""Batches and sums: padding changes no number, and what is said to add up does."""

import torch
from torch import Tensor

from hooklens.verification.probe import PaddingSide, Probe, as_logits, largest_difference
from hooklens.verification.report import CheckResult

PADDING = "padded rows equal single rows"
STREAM = "residual sums"
HEADS = "per-head results sum to the attention output"
ROWS = "pattern rows"
VALUES = "z is pattern times values"

# Rounding of a sum of a few terms, in units in the last place of its largest term.
_FEW_UNITS = 4.0


def check_padding(probe: Probe) -> list[CheckResult]:
    """Left- and right-padded rows give the logits that they give alone.

    A batch of another shape takes other kernels, so the two agree up to rounding.
    """
    single = [as_logits(probe.model(row))[0] for row in probe.rows()]
    results = []
    sides: tuple[PaddingSide, ...] = ("left", "right")
    for side in sides:
        tokens, mask = probe.pad(side)
        padded = as_logits(probe.model(tokens, attention_mask=mask))
        measured = max(
            largest_difference(row[real], alone) for row, real, alone in zip(padded, mask, single, strict=True)
        )
        message = "" if measured <= probe.rounding else f"logits of real tokens depend on {side} padding"
        results.append(
            CheckResult(
                check=PADDING, subject=f"{side}-padded", measured=measured, bound=probe.rounding, message=message
            )
        )
    return results


def check_sums(probe: Probe) -> list[CheckResult]:
    """The sums that every architecture keeps, from captured activations, in float64."""
    captured = {name: tensor.double() for name, tensor in probe.clean_captures.items()}
    eps = torch.finfo(probe.dtype).eps
    results = []
    for layer in probe.whole_layers:
        block = f"blocks.{layer}."
        parts = {name.removeprefix(block): tensor for name, tensor in captured.items() if name.startswith(block)}
        results += _check_stream(block, parts, eps)
        results += [_check_heads(probe, layer, parts, eps), _check_values(block, parts, eps)]
    return results + _check_patterns(probe, eps)


def _check_stream(block: str, parts: dict[str, Tensor], eps: float) -> list[CheckResult]:
    before_mlp = parts["hook_resid_pre"] + parts["hook_attn_out"]
    sums = {"hook_resid_post": before_mlp + parts["hook_mlp_out"]}
    if "hook_resid_mid" in parts:
        sums["hook_resid_mid"] = before_mlp
    results = []
    for name, total in sums.items():
        # Two additions, each rounded in the model's dtype.
        bound = _FEW_UNITS * eps * max(float(parts[part].abs().max()) for part in (*sums, "hook_resid_pre"))
        message = "resid_pre + attn_out + mlp_out, resid_mid without the last"
        measured = largest_difference(parts[name], total)
        results.append(CheckResult(check=STREAM, subject=block + name, measured=measured, bound=bound, message=message))
    return results


def _check_heads(probe: Probe, layer: int, parts: dict[str, Tensor], eps: float) -> CheckResult:
    """Results and `b_O` sum to what attention gives: to its output or, where a norm follows, to that norm's input."""
    cfg, weights = probe.model.cfg, probe.model.block_list()[layer].attn
    total = parts["attn.hook_result"].sum(2)
    size = float(parts["attn.hook_result"].abs().sum(2).max())
    if weights.b_O is not None:
        total = total + weights.b_O.double()
    if cfg.norm_after:
        output = parts["ln1_post.hook_normalized"] * parts["ln1_post.hook_scale"]
        if cfg.norm.kind == "layer":
            total = total - total.mean(-1, keepdim=True)
    else:
        output = parts["hook_attn_out"]
    # Each head's result is a sum of d_head products, the output one of all of them; both are rounded.
    bound = _FEW_UNITS * eps * max(size, float(output.abs().max())) * cfg.d_head**0.5
    measured = largest_difference(total, output)
    message = "" if measured <= bound else "hook_result summed over heads, plus b_O, is not the attention output"
    subject = f"blocks.{layer}.attn.hook_result"
    return CheckResult(check=HEADS, subject=subject, measured=measured, bound=bound, message=message)


def _check_values(block: str, parts: dict[str, Tensor], eps: float) -> CheckResult:
    pattern, values = parts["attn.hook_pattern"], parts["attn.hook_v"]
    expanded = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, expanded)
    # A weighted mean of values, from weights that were rounded themselves.
    bound = 2 * _FEW_UNITS * eps * float(values.abs().max())
    measured = largest_difference(z, parts["attn.hook_z"])
    message = "" if measured <= bound else "the pattern that is shown is not the one that z was computed with"
    return CheckResult(check=VALUES, subject=f"{block}attn.hook_z", measured=measured, bound=bound, message=message)


def _check_patterns(probe: Probe, eps: float) -> list[CheckResult]:
    """In a left-padded batch: rows of real queries sum to 1, hidden keys have weight 0 and score -inf."""
    tokens, mask = probe.pad("left")
    attention = [name for name in probe.names if name.endswith(("hook_attn_scores", "hook_pattern"))]
    if not probe.whole_layers:
        return []
    with probe.model.capture(attention) as captured:
        probe.model(tokens, attention_mask=mask)
    results = []
    for layer in probe.whole_layers:
        name = f"blocks.{layer}.attn.hook_pattern"
        pattern, scores = captured[name].double(), captured[f"blocks.{layer}.attn.hook_attn_scores"]
        hidden = _hidden_keys(mask, probe.model.cfg.window(layer))
        error = max(
            largest_difference(pattern.sum(-1), mask[:, None, :].expand(pattern.shape[:3]).double()),
            largest_difference(pattern.masked_fill(~hidden, 0), torch.zeros_like(pattern)),
            float(((scores == -torch.inf) != hidden).any()),
        )
        # Every weight is rounded, all together by at most one unit of 1.
        bound = _FEW_UNITS * eps
        message = "" if error <= bound else "rows of real queries must sum to 1, of padding to 0, hidden keys get 0"
        results.append(CheckResult(check=ROWS, subject=name, measured=error, bound=bound, message=message))
    return results


def _hidden_keys(mask: Tensor, window: int | None) -> Tensor:
    """Which keys each query may not see, `[batch 1 query key]`: later ones, padding, and those before its window."""
    column = torch.arange(mask.shape[1], device=mask.device)
    distance = column[:, None] - column[None, :]
    hidden = (distance < 0) | (distance >= (window or mask.shape[1]))
    return hidden[None, None] | ~mask[:, None, None, :]
