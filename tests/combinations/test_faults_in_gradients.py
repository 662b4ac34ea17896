"""Faults in gradients and losses where they met another feature, each with a test over its whole kind."""

import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.config import AlibiPositions, RotaryPositions
from hooklens.errors import InputError
from hooklens.hooks.edits import Replace, Scale, Zero
from tests.combinations.reference import PlainEdit, Reference
from tests.model.networks import ALL_CONFIGS, activations_of, make_config, make_model, pad_rows, random_tokens
from tests.slow_cases import slow_but

# The same sums in another order, in float64.
CLOSE = {"rtol": 0, "atol": 1e-10}
LEFT = [random_tokens(1, 5, seed=3)[0], random_tokens(1, 3, seed=4)[0]]
PATTERN, Z, V = "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_z", "blocks.0.attn.hook_v"


def parameter_gradients(model: HookedCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_finite(tensors: dict[str, Tensor]) -> None:
    assert tensors
    assert {name for name, tensor in tensors.items() if not tensor.isfinite().all()} == set()


# Gradients where a query sees no key.


@pytest.mark.parametrize(
    "network", slow_but(ALL_CONFIGS, ["grouped", "alibi", "capped", "heads and MLPs apart", "latent attention"])
)
def test_gradients_at_every_point_are_finite_with_padding_on_the_left(network):
    """A captured gradient at the pattern, or a soft cap, gave NaN everywhere as soon as a row was padded on the left.

    The softmax of a row of -inf is NaN, and putting 0 in its place leaves NaN in the backward pass.
    """
    model = make_model(network)
    ids, mask = pad_rows(LEFT, "left")
    single = [model(row[None], return_type="loss", loss_per_token=True).detach()[0] for row in LEFT]
    for name in activations_of(model):
        model.zero_grad()
        loss, cache = model.run_with_cache(
            ids, attention_mask=mask, names_filter=name, return_type="loss", incl_bwd=True
        )
        torch.testing.assert_close(loss.detach(), torch.cat(single).mean(), **CLOSE)
        assert_finite({key: cache[key] for key in cache if key.endswith("_grad")})
        assert_finite(parameter_gradients(model))


@pytest.mark.parametrize("network", ["rotary", "alibi", "capped", "shared norm"])
def test_gradients_behind_an_edited_pattern_are_finite_with_padding(network):
    """An edit of the pattern makes the explicit attention run, whose gradient was NaN at left padding."""
    model = make_model(network)
    ids, mask = pad_rows(LEFT, "left")
    model.run_with_hooks(ids, attention_mask=mask, return_type="loss", edits=[Scale(PATTERN, 0.5)]).backward()
    found = parameter_gradients(model)
    assert_finite(found)
    model.zero_grad()
    losses = [
        model.run_with_hooks(row[None], edits=[Scale(PATTERN, 0.5)], return_type="loss", loss_per_token=True)
        for row in LEFT
    ]
    torch.cat([loss[0] for loss in losses]).mean().backward()
    for name, expected in parameter_gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("positions", [AlibiPositions(), RotaryPositions(dim=4)])
def test_gradients_behind_a_frozen_prefix_out_of_the_windows_reach(softcap, positions):
    """A query whose window has left the prefix behind saw none of its keys: NaN in the gradient of the log-sum."""
    model = make_model(make_config(windows=(2, 2), attn_softcap=softcap, positions=positions))
    prefix, suffixes = random_tokens(1, 4), random_tokens(2, 5, seed=5)
    model.run_with_hooks(suffixes, past_kv_cache=model.prefill(prefix)).square().sum().backward()
    found = parameter_gradients(model)
    assert_finite(found)
    reference = Reference(model)
    rows = [[*prefix[0].tolist(), *suffix] for suffix in suffixes.tolist()]
    loss = sum(row.logits[4:].square().sum() for row in reference.run(rows, n_frozen=[4, 4]))
    (expected,) = torch.autograd.grad(loss, [reference.weights["embed.W_E"]])
    torch.testing.assert_close(found["embed.table.weight"], expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_padded_batch_on_a_frozen_prefix():
    """Padding in the new columns sees neither part of the keys where its window has left the prefix: 0 / 0."""
    model = make_model(make_config(windows=(1, 2)))
    ids, mask = pad_rows(LEFT, "left")
    model.run_with_hooks(ids, attention_mask=mask, past_kv_cache=model.prefill(random_tokens(1, 4))).sum().backward()
    assert_finite(parameter_gradients(model))


# Gradient hooks and captures of gradients.


def test_backward_hooks_of_a_call_fire_in_later_backward_passes():
    """`run_with_hooks(bwd_hooks=...)` removed them on returning, before any backward pass could run."""
    model, ids, seen = make_model("rotary"), random_tokens(2, 4), []
    hooks = [(Z, lambda gradient, hook: seen.append((hook.name, gradient.clone())))]
    loss = model.run_with_hooks(ids, bwd_hooks=hooks, return_type="loss")
    assert not seen
    loss.backward(retain_graph=True)
    loss.backward()
    _, cache = model.run_with_cache(ids, names_filter=Z, return_type="loss", incl_bwd=True)
    assert [name for name, _ in seen] == [Z, Z]
    for _, gradient in seen:
        torch.testing.assert_close(gradient, cache[f"{Z}_grad"], **CLOSE)


@pytest.mark.parametrize("edit", [Zero("blocks.0.hook_resid_post"), Replace("blocks.0.hook_resid_post", 0.5)])
def test_gradients_around_an_edit_that_puts_a_constant(edit):
    """A constant has no graph: the backward pass failed, and what lies before the edit had no entry at all."""
    model, ids = make_model("bare"), random_tokens(2, 4)
    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    _, cache = model.run_with_cache(ids, names_filter=names, edits=[edit], return_type="loss", incl_bwd=True)
    assert not cache["hook_embed_grad"].any()
    assert not cache["blocks.0.attn.hook_z_grad"].any()
    reference, number = Reference(model), 0.5 if isinstance(edit, Replace) else 0.0
    at = [(row, position) for row in range(2) for position in range(4)]
    plain = PlainEdit(edit.name, at, None, lambda cells: {k: torch.zeros_like(v) + number for k, v in cells.items()})
    rows = reference.run(ids.tolist(), edits=[plain])
    losses = [
        -row.logits[position].log_softmax(-1)[tokens[position + 1]]
        for row, tokens in zip(rows, ids.tolist(), strict=True)
        for position in range(3)
    ]
    for row, outcome in enumerate(rows):
        (expected,) = torch.autograd.grad(
            torch.stack(losses).mean(), [outcome.values["blocks.0.hook_resid_post"]], retain_graph=True
        )
        for name in names[2:]:
            torch.testing.assert_close(cache[f"{name}_grad"][row], expected, **CLOSE)


@pytest.mark.parametrize("frozen", ["embedding", "everything"])
def test_gradients_of_activations_do_not_need_trainable_weights(frozen):
    """With a frozen embedding the gradients at `hook_embed` and the first block's points were missing."""
    model, ids = make_model("rotary"), random_tokens(2, 4)
    with torch.no_grad():
        names = activations_of(model)
    _, expected = model.run_with_cache(ids, names_filter=names, return_type="loss", incl_bwd=True)
    for parameter in [model.embed.table.weight] if frozen == "embedding" else model.parameters():
        parameter.requires_grad_(False)
    _, found = model.run_with_cache(ids, names_filter=names, return_type="loss", incl_bwd=True)
    for name in names:
        torch.testing.assert_close(found[f"{name}_grad"], expected[f"{name}_grad"], **CLOSE)


# The loss.


def test_the_loss_of_rows_without_a_next_token_is_refused():
    """The mean over no tokens was NaN."""
    model = make_model("rotary")
    with pytest.raises(InputError, match="next token"):
        model(random_tokens(2, 1), return_type="loss")
    for mask in ([[0, 1], [0, 1]], [[1, 0], [1, 0]], [[1, 0], [0, 1]]):
        with pytest.raises(InputError, match="next token"):
            model(random_tokens(2, 2), attention_mask=torch.tensor(mask), return_type="loss")


def test_the_loss_leaves_out_rows_without_a_next_token_beside_others():
    """A row of one token predicts nothing, and takes nothing from the other row's mean."""
    model = make_model("rotary")
    ids, mask = pad_rows([LEFT[0], LEFT[1][:1]], "left")
    with torch.no_grad():
        found = model(ids, attention_mask=mask, return_type="loss")
        torch.testing.assert_close(found, model(LEFT[0][None], return_type="loss"), **CLOSE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_on_a_prefix_counts_the_first_token(shared, side):
    """The prefix's last logits predict it; it was left out, so the loss of prefix and suffix did not add up."""
    model = make_model("rotary")
    prefix = random_tokens(1 if shared else 2, 4)
    ids, mask = pad_rows(LEFT, side)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, past_kv_cache=model.prefill(prefix), return_type="loss")
        losses = []
        for row, tokens in enumerate(LEFT):
            whole = torch.cat([prefix[row if len(prefix) > 1 else 0], tokens])
            losses.append(model(whole[None], return_type="loss", loss_per_token=True)[0, 3:])
    torch.testing.assert_close(found, torch.cat(losses).mean(), **CLOSE)


def test_the_loss_with_padding_between_tokens_is_that_of_the_tokens():
    """A pair of tokens with padding between them was left out of the mean, though the second follows the first."""
    model, row = make_model("rotary"), LEFT[0]
    ids, mask = torch.zeros(1, 7, dtype=torch.long), torch.tensor([[1, 1, 0, 1, 0, 1, 1]])
    ids[mask.bool()] = row
    with torch.no_grad():
        found = model(ids, attention_mask=mask, return_type="loss")
        torch.testing.assert_close(found, model(row[None], return_type="loss"), **CLOSE)
