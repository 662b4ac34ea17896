"""Activations: captured, looked up, taken apart."""

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import assert_type

import hooklens as hl
from hooklens.causal_lm import LogitsAndLoss

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
prompt = "When Mary and John went to the store , John gave a drink to"

logits, cache = model.run_with_cache(prompt)
assert_type(logits, Tensor)
assert_type(cache, hl.ActivationCache)
assert_type(cache["pattern", 1], Tensor)
assert_type(cache["blocks.0.hook_resid_pre"], Tensor)
print(cache["scale", 0, "ln1"].shape, cache["resid_post", -1].shape, cache["k0"].shape)
for name, activation in cache.items():
    print(name.upper(), activation.shape)

both, kept = model.run_with_cache(prompt, return_type="both", names_filter=["resid_pre", ("z", 1)], pos_slice=-1)
assert_type(both, LogitsAndLoss)
loss, gradients = model.run_with_cache(
    prompt, return_type="loss", incl_bwd=True, names_filter=lambda name: "hook_z" in name
)
assert_type(loss, Tensor)
print(loss.item(), gradients["z_grad", 0].shape)
nothing, _ = model.run_with_cache(prompt, return_type=None, names_filter="pattern", device="cpu")
assert_type(nothing, None)
stream, _ = model.run_with_cache(prompt, stop_at_layer=1, remove_batch_dim=True)
assert_type(stream, Tensor)

assert_type(cache.accumulated_resid(1, incl_mid=True), Tensor)
assert_type(cache.decompose_resid(mode="mlp", apply_ln=True), Tensor)
assert_type(cache.stack_head_results(pos_slice=-1), Tensor)
stack, labels = cache.stack_head_results(pos_slice=-1, return_labels=True, incl_remainder=True)
assert_type(stack, Tensor)
assert_type(labels, list[str])
assert_type(
    cache.stack_neuron_results(1, pos_slice=-1, neuron_slice=[0, 1], return_labels=True), tuple[Tensor, list[str]]
)
assert_type(cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True), tuple[Tensor, list[str]])
whole = cache.accumulated_resid(pos_slice=-1)
assert_type(cache.logit_attrs(whole, 5, pos_slice=-1), Tensor)
assert_type(cache.remove_batch_dim(), hl.ActivationCache)
assert_type(cache.compute_head_results(), hl.ActivationCache)
assert_type(cache.nbytes, int)


class Toy(hl.HookedModule):
    """A module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_in = hl.HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        """Twice what comes in."""
        return self.hook_in(x) * 2


toy = Toy()
toy.name_hook_points()
_, activations = toy.run_with_cache(logits)
assert_type(activations, Mapping[str, Tensor])
with toy.hooks(fwd_hooks=[("hook_in", lambda x, hook: x + 1)]) as same:
    assert_type(same, Toy)
