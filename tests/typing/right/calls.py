"""Calls of a model: what `return_type` gives, hooks, edits, prefixes."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import hooklens as hl
from hooklens import edits
from hooklens.causal_lm import LogitsAndLoss

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
assert_type(model, hl.HookedCausalLM)
prompt = "When Mary and John went to the store , John gave a drink to"

logits = model(prompt)
assert_type(logits, Tensor)
assert_type(model(["Mary went", "John"], padding_side="left", prepend_bos=True), Tensor)
assert_type(model(model.to_tokens(prompt), attention_mask=None, logits_at=-1), Tensor)
assert_type(model([1, 2, 3]), Tensor)

loss = model(prompt, return_type="loss")
assert_type(loss, Tensor)
print(loss.item(), model(prompt, return_type="loss", loss_per_token=True).mean().item())

both = model(prompt, return_type="both")
assert_type(both, LogitsAndLoss)
print(both.logits[0, -1].argmax().item(), both.loss.item())

assert_type(model(prompt, return_type=None), None)
stream = model(prompt, stop_at_layer=1)
assert_type(stream, Tensor)
assert_type(model(prompt, return_type=None, stop_at_layer=1), Tensor)
assert_type(model(stream, start_at_layer=1), Tensor)


def ablate(z: Tensor, hook: hl.HookPoint) -> Tensor:
    """Without the first head."""
    z[:, :, 0] = 0
    return z


def look(z: Tensor, *, hook: hl.HookPoint) -> None:
    """Only look."""
    print(hook.name, hook.layer(), z.shape)


def halve(z: Tensor) -> Tensor:
    """A hook function that does not ask where it is."""
    return z / 2


seen: list[Tensor] = []
hooked = model.run_with_hooks(prompt, fwd_hooks=[("blocks.0.attn.hook_z", ablate), ("blocks.*.hook_mlp_out", look)])
model.run_with_hooks(prompt, fwd_hooks=[("blocks.0.attn.hook_z", halve)])
assert_type(hooked, Tensor)
model.run_with_hooks(prompt, fwd_hooks=[(("resid_pre", 1), lambda resid, hook: seen.append(resid))])
listened = model.run_with_hooks(prompt, return_type="loss", bwd_hooks=[("blocks.0.hook_resid_pre", look)])
print(torch.autograd.grad(listened, model.embed.table.weight)[0].shape)
assert_type(
    model.run_with_hooks(prompt, return_type="both", edits=[edits.Zero("blocks.0.hook_attn_out")]), LogitsAndLoss
)
assert_type(
    model.run_with_hooks(prompt, return_type=None, edits=[edits.Scale("blocks.0.attn.hook_z", 0.5, head=1)]), None
)

with model.hooks(edits=[edits.Add("blocks.1.hook_resid_pre", torch.ones(model.cfg.d_model), pos=-1)]) as changed:
    assert_type(changed, hl.HookedCausalLM)
    assert_type(changed(prompt), Tensor)

with model.capture("resid_pre") as kept:
    model(prompt)
assert_type(kept, dict[str, Tensor])

handle = model.add_hook("blocks.0.attn.hook_z", ablate)
with handle:
    model(prompt)
model.reset_hooks()

prefix = model.prefill("When Mary and John", prepend_bos=None)
assert_type(prefix, hl.HookedKeyValueCache)
assert_type(model([" went", " gave"], past_kv_cache=prefix), Tensor)
assert_type(prefix.last_logits, Tensor | None)
