"""Misspelt keywords, each of which would be a TypeError, and keywords that stand elsewhere."""

import hooklens as hl
from hooklens import edits, patching

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
prompt = "When Mary and John went to the store"
metric = patching.LogitDiff(" Mary", " John")
_, cache = model.run_with_cache(prompt)

model(prompt, retrun_type="loss")  # wrong: call-overload reportCallIssue
model(prompt, past_kv_cach=None)  # wrong: call-overload reportCallIssue
model(prompt, names_filter="pattern")  # wrong: call-overload reportCallIssue
model.run_with_cache(prompt, name_filter="pattern")  # wrong: call-overload reportCallIssue
model.run_with_cache(prompt, return_type="loss", stop_at="pattern")  # wrong: call-overload reportCallIssue
model.run_with_hooks(prompt, fwd_hook=[])  # wrong: call-overload reportCallIssue
model.run_with_hooks(prompt, names_filter="pattern")  # wrong: call-overload reportCallIssue
model.prefill(prompt, prepend_bus=True)  # wrong: call-arg reportCallIssue
model.prefill(prompt, return_type="loss")  # wrong: call-arg reportCallIssue
model.hooks(forward_hooks=[])  # wrong: call-arg reportCallIssue
model.capture(name_filter="pattern")  # wrong: call-arg reportCallIssue
model.to_tokens(prompt, prepend_boss=True)  # wrong: call-overload reportCallIssue
model.to_str_tokens(prompt, bos=True)  # wrong: call-overload reportCallIssue
model.generate(prompt, max_tokens=3)  # wrong: call-overload reportCallIssue
model.generate_stream(prompt, names_filter="z")  # wrong: call-arg reportCallIssue
model.process_weights(fold_layernorm=True)  # wrong: call-arg reportCallIssue
model.save_pretrained("folder", shard_size="1GB")  # wrong: call-arg reportCallIssue
hl.HookedCausalLM.from_pretrained("bundled:tiny-llama", torch_dtype="auto")  # wrong: call-arg reportCallIssue
cache.decompose_resid(return_label=True)  # wrong: call-overload reportCallIssue
cache.stack_neuron_results(pos_slice=-1, neurons=[0])  # wrong: call-overload reportCallIssue
edits.Zero("blocks.0.hook_attn_out", position=-1)  # wrong: call-arg reportCallIssue
patching.sweep(model, prompt, prompt, "z", metric, progres=False)  # wrong: call-overload reportCallIssue
patching.path_patch(model, prompt, prompt, source="other")  # wrong: call-overload reportCallIssue
hl.HookedConfig(n_layers=1, d_model=8, n_heads=2, d_vocab=5, n_ctx=4, hidden_size=8)  # wrong: call-arg reportCallIssue
