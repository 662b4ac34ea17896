"""Values of another kind than a method takes, and results taken for what they are not."""

from torch import Tensor

import hooklens as hl
from hooklens import patching

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
prompt = "When Mary and John went to the store"


def needs_head(z: Tensor, hook: hl.HookPoint, head: int) -> Tensor:
    """No hook function: nothing says which head."""
    return z[:, :, head]


def gives_text(z: Tensor, hook: hl.HookPoint) -> str:
    """No hook function: it gives no tensor."""
    return f"{hook.name} {z.shape}"


model(prompt, return_type="logit")  # wrong: call-overload reportArgumentType
model(prompt, padding_side="middle")  # wrong: call-overload reportArgumentType
model.run_with_hooks(prompt, fwd_hooks=[("blocks.0.attn.hook_z", needs_head)])  # wrong: list-item reportArgumentType
model.run_with_hooks(prompt, fwd_hooks=[("blocks.0.attn.hook_z", gives_text)])  # wrong: list-item reportArgumentType
model.add_hook("blocks.0.attn.hook_z", needs_head)  # wrong: arg-type reportArgumentType
model.generate(prompt, return_type="text")  # wrong: call-overload reportArgumentType
print(model(prompt, return_type="both").shape)  # wrong: attr-defined reportAttributeAccessIssue
print(model(prompt, return_type=None).shape)  # wrong: attr-defined reportAttributeAccessIssue
print(model.run_with_cache(prompt).shape)  # wrong: attr-defined reportAttributeAccessIssue
print(model.to_str_tokens(prompt).strip())  # wrong: attr-defined reportAttributeAccessIssue
print(model.to_tokens(prompt, return_attention_mask=True).item())  # wrong: attr-defined reportAttributeAccessIssue
print(model.generate([prompt]).strip())  # wrong: attr-defined reportAttributeAccessIssue
several = patching.sweep(model, prompt, prompt, "z", {"difference": patching.LogitDiff(" Mary", " John")})
print(several.values.shape)  # wrong: attr-defined reportAttributeAccessIssue
