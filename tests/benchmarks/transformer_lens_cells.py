"""Cells as notebooks have them, written for TransformerLens 2.x: they are given `tl` (the package) and `model`.

Each is run twice, with TransformerLens and with the import layer, and what it prints is compared. They take turns with
what such notebooks do: look at tokens, caches and heads, attribute, patch, ablate, read weights, train, generate.
"""

TEXT = "When Mary and John went to the store , John gave a drink to"

CELLS: dict[str, str] = {
    "tokens": """
text = "When Mary and John went to the store"
print(model.to_tokens(text), model.to_tokens(text, prepend_bos=False).shape)
print(model.to_str_tokens(text))
print(model.to_str_tokens(model.to_tokens(text)))
print(model.to_string(model.to_tokens(text)[0]), "|", model.to_string(model.to_tokens([text, "Tom ran"])))
print(model.to_single_token(" Mary"), model.to_single_str_token(model.to_single_token(" Mary")))
print(model.get_token_position(" John", text), model.get_token_position(" John", text, mode="last"))
for bad in (" Mary John", " notaword"):
    try:
        print(model.to_single_token(bad))
    except AssertionError:
        print("no single token")
""",
    "padding": """
batch = ["When Mary and John went", "Tom ran to the store and"]
for side in ("right", "left"):
    tokens = model.to_tokens(batch, padding_side=side)
    print(tokens.tolist())
    mask = tl.utils.get_attention_mask(model.tokenizer, tokens, True)
    print(mask.tolist())
    logits = model(batch, padding_side=side)
    print(logits.shape, logits.softmax(-1).max(-1).values[0])
""",
    "logits and loss": """
logits = model(TEXT)
print(logits.shape, logits[0, -1].topk(5))
print(model(TEXT, return_type="loss"))
print(model(TEXT, "loss", loss_per_token=True))
both = model(TEXT, return_type="both")
print(both.loss, both.logits.shape, both[1])
print(model(TEXT, return_type=None))
log_probs = logits.log_softmax(-1)
tokens = model.to_tokens(TEXT)
print(log_probs[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0])
print(tl.utils.lm_accuracy(logits, tokens), tl.utils.lm_cross_entropy_loss(logits, tokens))
""",
    "config": """
cfg = model.cfg
print(cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx, cfg.act_fn)
print(cfg.normalization_type, cfg.positional_embedding_type, cfg.parallel_attn_mlp, cfg.attn_scale, cfg.rotary_dim)
print(cfg.default_prepend_bos, cfg.use_attn_result, cfg.use_split_qkv_input, cfg.n_params)
small = tl.HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=4, d_head=4, d_vocab=5, act_fn="relu")
print(small.n_heads, small.d_mlp, small.initializer_range, small.normalization_type)
print(tl.HookedTransformerConfig.unwrap(small.to_dict()).d_model)
""",
    "names of hooks": """
print(sorted(name for name in model.hook_dict if "unembed" not in name))
print([tl.utils.get_act_name(*one) for one in [("k", 6, "a"), ("pre", 2), ("embed",), ("scale", 1, "ln1"), ("scale",)]])
print(tl.utils.get_act_name("blocks.0.hook_resid_pre"), tl.utils.get_act_name("k6a"))
print(type(model.hook_dict["blocks.0.hook_resid_pre"]).__name__, model.hook_dict["blocks.1.attn.hook_z"].layer())
""",
    "a cache": """
logits, cache = model.run_with_cache(TEXT, remove_batch_dim=True)
print(cache["pattern", 0].shape, cache["blocks.1.hook_resid_post"].shape, cache["k", 2].shape, cache["embed"].shape)
print("hook_embed" in cache, list(cache.keys())[:18], cache.has_batch_dim)
print(cache["pattern", 1][0, -1])
_, some = model.run_with_cache(TEXT, names_filter=lambda name: name.endswith("hook_z"))
print({name: tuple(value.shape) for name, value in some.items()})
_, one = model.run_with_cache(TEXT, names_filter="blocks.0.hook_resid_pre", return_cache_object=False)
print(type(one).__name__, one["blocks.0.hook_resid_pre"].shape)
_, late = model.run_with_cache(TEXT, pos_slice=-1)
print(late["resid_post", 0].shape, late["pattern", 0].shape)
_, stopped = model.run_with_cache(TEXT, stop_at_layer=1)
print(sorted(stopped)[-3:])
""",
    "from pattern to scores": """
_, cache = model.run_with_cache(TEXT, remove_batch_dim=True)
scores = cache["attn_scores", 1]
print(scores.softmax(-1).sub(cache["pattern", 1]).abs().max() < 1e-5)
q, k = cache["rot_q", 1], cache["rot_k", 1]
mine = torch.einsum("qnh,knh->nqk", q, k) / model.cfg.d_head**0.5
seen = torch.tril(torch.ones_like(mine)).bool()
print((mine - scores)[seen].abs().max() < 1e-4)
z = torch.einsum("nqk,knh->qnh", cache["pattern", 1], cache["v", 1])
print((z - cache["z", 1]).abs().max() < 1e-4)
out = torch.einsum("qnh,nhd->qd", z, model.W_O[1]) + model.b_O[1]
print((out - cache["attn_out", 1]).abs().max() < 1e-4)
""",
    "direct logit attribution": """
logits, cache = model.run_with_cache(TEXT)
stack, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
print(stack.shape, labels)
print(cache.logit_attrs(stack, " Mary", " John", pos_slice=-1)[:, 0])
direction = model.tokens_to_residual_directions(model.to_single_token(" Mary"))
direction = direction - model.tokens_to_residual_directions(model.to_single_token(" John"))
scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
print((scaled @ direction)[:, 0])
accumulated, labels = cache.accumulated_resid(layer=-1, incl_mid=False, pos_slice=-1, return_labels=True)
print(labels, cache.logit_attrs(accumulated, " Mary", " John", pos_slice=-1)[:, 0])
model.set_use_attn_result(True)
_, cache = model.run_with_cache(TEXT)
model.set_use_attn_result(False)
heads, labels = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
print(heads.shape, labels[:5], cache.logit_attrs(heads, " Mary", " John", pos_slice=-1)[:, 0])
neurons, labels = cache.stack_neuron_results(layer=2, pos_slice=-1, return_labels=True)
print(neurons.shape, labels[-2:], neurons.norm(dim=-1).sum())
full, labels = cache.get_full_resid_decomposition(layer=-1, expand_neurons=False, pos_slice=-1, return_labels=True)
print(labels[-6:], (full.sum(0) - cache["resid_post", -1][:, -1]).abs().max() < 1e-3)
""",
    "logit lens": """
_, cache = model.run_with_cache(TEXT)
for layer in range(model.cfg.n_layers):
    stream = cache["resid_post", layer]
    logits = model.unembed(model.ln_final(stream))
    best = logits[0, -1].argmax()
    print(layer, model.to_string(best), logits[0, -1].softmax(-1)[best])
""",
    "previous tokens": """
_, cache = model.run_with_cache(TEXT, remove_batch_dim=True)
for layer in range(model.cfg.n_layers):
    print([round(cache["pattern", layer][head].diagonal(-1).mean().item(), 3) for head in range(model.cfg.n_heads)])
""",
    "induction by hooks": """
torch.manual_seed(0)
half = torch.randint(5, model.cfg.d_vocab, (2, 12))
tokens = torch.cat([torch.full((2, 1), model.tokenizer.bos_token_id), half, half], 1)
scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

def keep(pattern, hook):
    scores[hook.layer()] = pattern.diagonal(-11, dim1=-2, dim2=-1).mean((0, 2))

result = model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(lambda name: name.endswith("pattern"), keep)])
print(result, scores)
""",
    "head detector": """
from_package = tl.head_detector
for kind in ("previous_token_head", "duplicate_token_head", "induction_head"):
    for error in ("mul", "abs"):
        print(kind, from_package.detect_head(model, TEXT, kind, error_measure=error))
print(from_package.detect_head(model, TEXT, "previous_token_head", heads=[(0, 0), (1, 2)], exclude_bos=True))
""",
    "ablation": """
def ablate(z, hook, head):
    z[:, :, head] = 0.0
    return z

clean = model(TEXT, return_type="loss")
for layer in range(model.cfg.n_layers):
    row = []
    for head in range(model.cfg.n_heads):
        name = tl.utils.get_act_name("z", layer)
        loss = model.run_with_hooks(TEXT, return_type="loss", fwd_hooks=[(name, functools.partial(ablate, head=head))])
        row.append(round((loss - clean).item(), 3))
    print(row)
print(model(TEXT, return_type="loss") - clean)
""",
    "patching": """
corrupted = TEXT.replace(", John", ", Mary")
clean_logits, clean_cache = model.run_with_cache(TEXT)
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
metric = lambda logits: logits[0, -1, mary] - logits[0, -1, john]
tokens = model.to_tokens(corrupted)
print(metric(clean_logits), metric(model(tokens)))
print(tl.patching.get_act_patch_resid_pre(model, tokens, clean_cache, metric))
print(tl.patching.get_act_patch_attn_head_out_all_pos(model, tokens, clean_cache, metric))
print(tl.patching.get_act_patch_mlp_out(model, tokens, clean_cache, metric).sum())
print(tl.patching.get_act_patch_block_every(model, tokens, clean_cache, metric).shape)
values, table = tl.patching.generic_activation_patch(
    model, tokens, clean_cache, metric, tl.patching.layer_head_vector_patch_setter, "q",
    index_axis_names=("layer", "head"), return_index_df=True)
print(values, table.shape, list(table.columns))
""",
    "gradients": """
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
cache, fwd, bwd = model.get_caching_hooks(lambda name: name.endswith("resid_pre"), incl_bwd=True)
with model.hooks(fwd, bwd):
    logits = model(TEXT)
    (logits[0, -1, mary] - logits[0, -1, john]).backward()
print(sorted(cache))
for layer in range(model.cfg.n_layers):
    name = f"blocks.{layer}.hook_resid_pre"
    print((cache[name] * cache[name + "_grad"]).sum(-1)[0])
model.zero_grad()
model.reset_hooks()
""",
    "hooks that stay": """
seen = []
model.add_hook("blocks.0.hook_resid_post", lambda x, hook: seen.append(hook.name))
model.add_perma_hook("blocks.1.hook_resid_post", lambda x, hook: seen.append(hook.name))
model(TEXT)
print(seen)
model.reset_hooks()
model(TEXT)
print(seen)
model.reset_hooks(including_permanent=True)
model(TEXT)
print(len(seen))
with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append("inside"))]):
    model(TEXT)
model(TEXT)
print(seen[-1], len(seen))
model.hook_dict["hook_embed"].add_hook(lambda x, hook: hook.ctx.update(norm=x.norm()))
model(TEXT)
print(model.hook_dict["hook_embed"].ctx)
model.reset_hooks()
print(model.hook_dict["hook_embed"].ctx)
""",
    "more hooks for a head": """
model.set_use_attn_result(True)
model.set_use_split_qkv_input(True)
_, cache = model.run_with_cache(TEXT)
print(cache["result", 0].shape, cache["q_input", 0].shape)
print((cache["result", 0].sum(2) + model.b_O[0] - cache["attn_out", 0]).abs().max() < 1e-4)

def zero(q_input, hook):
    q_input[:, :, 1] = 0
    return q_input

print(model.run_with_hooks(TEXT, return_type="loss", fwd_hooks=[("blocks.1.hook_q_input", zero)]))
model.set_use_attn_result(False)
model.set_use_split_qkv_input(False)
try:
    model.add_hook("blocks.0.attn.hook_result", zero)
except AssertionError:
    print("off")
""",
    "weights": """
print(model.W_E.shape, model.W_U.shape, model.W_Q.shape, model.W_O.shape, model.W_in.shape, model.b_out.shape)
print(model.W_Q.norm(), model.W_U.norm(), model.b_U.norm(), model.W_pos.shape if hasattr(model, "pos_embed") else None)
print(model.all_head_labels()[:6] if callable(model.all_head_labels) else model.all_head_labels[:6])
print(sorted(name for name, value in model.named_parameters() if name != "unembed.b_U"))
print(sorted(model.state_dict())[:8])
print(model.accumulated_bias(2).norm(), model.accumulated_bias(2, mlp_input=True).shape)
""",
    "circuits of weights": """
OV, QK = model.OV, model.QK
print(OV, QK.shape, OV[1, 2].eigenvalues.real.sum(), OV[0, 0].svd()[1][:4])
full = model.W_E @ OV[1, 2] @ model.W_U
print(full, full.AB.diagonal()[:4], full.norm(), full.get_corner())
print((full.eigenvalues.real.sum() / full.eigenvalues.abs().sum()).item())
print(model.all_composition_scores("K").shape, model.all_composition_scores("V")[0, 0, 1:])
print(tl.utils.composition_scores(OV[0, 0], OV[1, 1]))
A, B = torch.arange(6.0).view(2, 3), torch.ones(3, 4)
product = tl.FactoredMatrix(A, B)
print(product, product.T.shape, (product @ torch.ones(4, 1)).AB, product[0, 1].AB, product.make_even().AB)
print(product.collapse_l().norm(), product.U.shape, product.S[:1], product.ndim, product.unsqueeze(0).shape)
""",
    "singular directions": """
reader = tl.SVDInterpreter(model)
vectors = reader.get_singular_vectors("OV", layer_index=1, head_index=2, num_vectors=3)
print(vectors.shape, vectors.abs().sum())
print(reader.get_singular_vectors("w_out", layer_index=0, num_vectors=2).abs().max())
""",
    "composition of layers": """
stream = model(TEXT, stop_at_layer=2)
print(stream.shape)
whole = model(stream, start_at_layer=2)
print((whole - model(TEXT)).abs().max() < 1e-4)
embedded, tokens, short, mask = model.input_to_embed(TEXT)
print(embedded.shape, tokens.shape, short, mask)
attn = model.blocks[0].attn
normed = model.blocks[0].ln1(embedded)
print((model.blocks[0](embedded) - model(TEXT, stop_at_layer=1)).abs().max() < 1e-4)
print(attn(normed, normed, normed).norm(), model.blocks[0].mlp(model.blocks[0].ln2(embedded)).norm())
""",
    "key-value caches": """
tokens = model.to_tokens(TEXT)
past = tl.HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
first = model(tokens[:, :6], past_kv_cache=past)
rest = model(tokens[:, 6:], past_kv_cache=past)
print((torch.cat([first, rest], 1) - model(tokens)).abs().max() < 1e-3, past[0].past_keys.shape)
past.freeze()
model(tokens[:, :2], past_kv_cache=past)
print(past[0].past_keys.shape, past.frozen)
past.unfreeze()
""",
    "generation": """
print(model.generate(TEXT, max_new_tokens=5, do_sample=False, verbose=False))
print(model.generate(TEXT, 4, temperature=0, verbose=False))
out = model.generate(model.to_tokens(TEXT), max_new_tokens=3, do_sample=False, verbose=False)
print(out.shape, model.to_string(out[0, -3:]))
""",
    "a prompt tested": """
tl.utils.test_prompt("When Mary and John went to the store , John gave a drink to", "Mary", model, top_k=3)
tl.utils.test_prompt("The capital of France is", "Paris", model, top_k=2, prepend_bos=False)
""",
    "small helpers": """
x = torch.arange(24.0).view(2, 3, 4)
print(tl.utils.get_corner(x, 2), tl.utils.to_numpy(x[0]).sum(), tl.utils.remove_batch_dim(x[:1]).shape)
print(tl.utils.transpose(x).shape, tl.utils.is_square(x[0]), tl.utils.is_lower_triangular(torch.eye(3)))
print(tl.utils.Slice((1, 3)).apply(x, 1).shape, tl.utils.Slice(0).apply(x, 2).shape, tl.utils.Slice([0, 2]).indices(4))
print(tl.utils.repeat_along_head_dimension(torch.ones(1, 2, 3), 4).shape)
print(tl.utils.get_offset_position_ids(1, torch.tensor([[0, 1, 1]])), tl.utils.override_or_use_default_value(1, None))
print(tl.utils.gelu_new(torch.linspace(-1, 1, 3)), tl.utils.solu(torch.linspace(-1, 1, 3)))
print(str(tl.utils.get_device()).split(":")[0])
""",
    "a module of one's own": """
from_package = tl.hook_points

class Square(from_package.HookedRootModule):
    def __init__(self):
        super().__init__()
        self.hook_in, self.hook_out = from_package.HookPoint(), from_package.HookPoint()
        self.setup()

    def forward(self, x):
        return self.hook_out(self.hook_in(x) ** 2)

square = Square()
out, cache = square.run_with_cache(torch.tensor([3.0]))
print(out, dict(cache), list(square.hook_dict))
print(square.run_with_hooks(torch.tensor([3.0]), fwd_hooks=[("hook_in", lambda x, hook: x + 1)]))
square.add_hook("hook_out", lambda x, hook: 2 * x)
print(square(torch.tensor([3.0])), len(square.hook_dict["hook_out"].fwd_hooks))
square.reset_hooks()
print(square(torch.tensor([3.0])))
""",
    "training": """
cfg = tl.HookedTransformerConfig(
    n_layers=1, d_model=16, n_ctx=5, d_head=8, n_heads=2, d_mlp=32, d_vocab=11, act_fn="relu", seed=1,
    normalization_type="LN", init_weights=True, device="cpu")
torch.manual_seed(0)
small = tl.HookedTransformer(cfg)
optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
data = torch.randint(11, (32, 5))
data[:, 3:] = data[:, :2]
losses = []
for step in range(8):
    loss = small(data, return_type="loss")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(round(loss.item(), 3))
print(losses)
print(small.W_E.norm(), small.blocks[0].attn.W_Q.norm())
""",
    "weights chosen by name": """
twin = copy.deepcopy(model)
for name, parameter in twin.named_parameters():
    if "b_" in name:
        parameter.requires_grad = False
print(sum(parameter.numel() for parameter in twin.parameters() if parameter.requires_grad))
print({name: round(value.norm().item(), 3) for name, value in sorted(twin.named_parameters()) if ".0.attn.W_" in name})
decayed = [value for name, value in twin.named_parameters() if "W_" in name]
print(len(decayed), sum(value.pow(2).sum() for value in decayed))
""",
    "folding": """
plain = copy.deepcopy(model)
before = model(TEXT)
plain.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=True)
after = plain(TEXT)
print((before.log_softmax(-1) - after.log_softmax(-1)).abs().max() < 1e-3, plain.cfg.normalization_type)
print(plain.W_U.mean(-1).abs().max() < 1e-4)
""",
    "frozen norms, means and steering": """
_, cache = model.run_with_cache(TEXT)
other = TEXT.replace(", John", ", Mary")
_, other_cache = model.run_with_cache(other)
vector = cache["resid_post", 1][:, 10] - other_cache["resid_post", 1][:, 10]

def steer(resid, hook, strength):
    resid[:, 10] = resid[:, 10] + strength * vector
    return resid

for strength in (0.0, 0.5, 1.0, 2.0):
    hooks = [("blocks.1.hook_resid_post", functools.partial(steer, strength=strength))]
    logits = model.run_with_hooks(other, fwd_hooks=hooks)
    print(strength, model.to_string(logits[0, -1].argmax()), logits[0, -1].max())

scale = cache["scale"]
print(model.run_with_hooks(other, return_type="loss", fwd_hooks=[("ln_final.hook_scale", lambda x, hook: scale)]))
""",
    "mistakes": """
for call in (
    lambda: model.run_with_hooks(TEXT, fwd_hooks=[("blocks.0.hook_nothing", lambda x, hook: x)]),
    lambda: model.run_with_cache(TEXT)[1]["nothing", 0],
    lambda: model.add_hook("hook_embed", lambda x, hook: x, dir="sideways"),
    lambda: model.to_single_token("Mary John"),
    lambda: tl.FactoredMatrix(torch.ones(2, 3), torch.ones(4, 5)),
    lambda: tl.HookedTransformer("gpt2"),
):
    try:
        call()
        print("fine")
    except Exception as error:
        kinds = (KeyError, AssertionError, ValueError)
        print(next((kind.__name__ for kind in kinds if isinstance(error, kind)), type(error).__name__))
""",
    "paths from head to head": """
corrupted = TEXT.replace(", John", ", Mary")
z_filter = lambda name: name.endswith("hook_z")
_, clean_cache = model.run_with_cache(TEXT, names_filter=z_filter)
_, new_cache = model.run_with_cache(corrupted, names_filter=z_filter)

def freeze_all_but(z, hook, layer, head):
    z[...] = clean_cache[hook.name]
    if hook.layer() == layer:
        z[:, :, head] = new_cache[hook.name][:, :, head]
    return z

mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
for layer in range(2):
    row = []
    for head in range(model.cfg.n_heads):
        hook = functools.partial(freeze_all_but, layer=layer, head=head)
        model.add_hook(z_filter, hook, level=1)
        _, cache = model.run_with_cache(TEXT, names_filter=lambda name: name == "blocks.3.hook_resid_post")
        logits = model.unembed(model.ln_final(cache["resid_post", 3]))
        row.append(round((logits[0, -1, mary] - logits[0, -1, john]).item(), 2))
        model.reset_hooks()
    print(row)
""",
    "a classifier of brackets": """
cfg = tl.HookedTransformerConfig(
    n_layers=2, d_model=12, n_ctx=7, d_head=6, n_heads=2, d_mlp=16, d_vocab=6, d_vocab_out=2, act_fn="relu",
    attention_dir="bidirectional", normalization_type="LN", use_hook_tokens=True, seed=3, device="cpu",
    use_attn_result=True)
small = tl.HookedTransformer(cfg)
tokens = torch.tensor([[4, 2, 3, 2, 3, 5, 0], [4, 2, 2, 3, 3, 3, 5]])

def remember(tokens, hook):
    hook.ctx["pads"] = tokens == 0

def hide(scores, hook):
    scores.masked_fill_(small.hook_dict["hook_tokens"].ctx["pads"][:, None, None], -1e5)
    if hook.layer() == 1:
        small.hook_dict["hook_tokens"].clear_context()

small.add_perma_hook("hook_tokens", remember)
for layer in range(2):
    small.add_perma_hook(tl.utils.get_act_name("attn_scores", layer), hide)
logits, cache = small.run_with_cache(tokens)
print(logits[:, 0], cache["pattern", 0][0, :, :, -1].abs().max(), small.hook_dict["hook_tokens"].ctx)
print(cache["result", 0].shape, cache["resid_post", 1].norm(), small.W_U.shape)
small.reset_hooks(including_permanent=True)
print(small(tokens)[:, 0])
""",
    "attention alone": """
cfg = tl.HookedTransformerConfig(
    n_layers=2, d_model=16, n_ctx=12, d_head=4, n_heads=4, d_vocab=20, attn_only=True, normalization_type=None,
    positional_embedding_type="shortformer", seed=2, device="cpu")
small = tl.HookedTransformer(cfg)
tokens = torch.arange(10)[None] % 7
logits, cache = small.run_with_cache(tokens)
print(logits.norm(), sorted(cache)[:6], cache["pos_embed"].shape)
parts, labels = cache.decompose_resid(return_labels=True, mode="attn")
outs = [label.endswith("attn_out") for label in labels]
print(sum(outs), parts[outs].norm(dim=-1).mean((1, 2)))
direct = small.W_E @ small.W_U
print((cache["embed"] @ small.W_U - direct[tokens]).abs().max() < 1e-4)
OV = tl.FactoredMatrix(small.W_V[1, 0], small.W_O[1, 0])
full = small.W_E @ OV @ small.W_U
print(full.AB.argmax(0)[:6], (full.AB.argmax(0) == torch.arange(20)).float().mean())
positions = small.W_pos @ small.QK[0, 1] @ small.W_pos.T
print((positions.AB / 2).tril().softmax(-1).diagonal(-1)[:4])
""",
    "numbers modulo a prime": """
prime = 7
cfg = tl.HookedTransformerConfig(
    n_layers=1, d_model=16, n_ctx=3, d_head=8, n_heads=2, d_mlp=32, d_vocab=prime + 1, d_vocab_out=prime,
    act_fn="relu", normalization_type=None, init_weights=True, device="cpu", seed=999)
small = tl.HookedTransformer(cfg)
for name, parameter in small.named_parameters():
    if "b_" in name:
        parameter.requires_grad = False
a, b = torch.arange(prime).repeat_interleave(prime), torch.arange(prime).repeat(prime)
data = torch.stack([a, b, torch.full_like(a, prime)], 1)
labels = (a + b) % prime
optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=1.0, betas=(0.9, 0.98))
for epoch in range(5):
    loss = -small(data)[:, -1].double().log_softmax(-1).gather(-1, labels[:, None]).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(round(loss.item(), 3))
print(all(bool((value == 0).all()) for name, value in small.named_parameters() if "b_" in name))
logits, cache = small.run_with_cache(data)
neurons = cache["post", 0, "mlp"][:, -1]
waves = torch.stack([torch.cos(2 * torch.pi * k * torch.arange(prime) / prime) for k in range(4)])
print((waves @ small.W_E[:-1]).norm(dim=-1), neurons.shape, (neurons > 0).float().mean())
""",
    "a loss of one's own with hooks": """
def regularised(model, tokens, strength):
    sizes = []
    hooks = [(lambda name: name.endswith("hook_mlp_out"), lambda out, hook: sizes.append(out.norm()))]
    loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
    return loss + strength * sum(sizes)

twin = copy.deepcopy(model)
loss = regularised(twin, TEXT, 0.1)
loss.backward()
print(loss, twin.blocks[0].attn.W_Q.shape, sum(p.grad.norm() for p in twin.parameters() if p.grad is not None))
""",
    "caches are dictionaries": """
_, cache = model.run_with_cache(TEXT)
print([name for name in cache if "hook_z" in name][:2], cache["z", 1, "attn"].shape, cache["post", 1, "mlp"].shape)
print(cache["v1"].shape, cache["scale0ln1"].shape, cache["normalized"].shape)
print({name: tuple(value.shape) for name, value in cache.items() if "ln_final" in name})
cache.remove_batch_dim()
print(cache["z", 1].shape)
flat = cache.stack_activation("pattern")
print(flat.shape, cache.stack_activation("z", layer=2).shape)
print(cache.cache_dict is not None, isinstance(cache, tl.ActivationCache))
made = tl.ActivationCache({"hook_embed": torch.ones(1, 2, 3)}, model)
print(made["embed"].shape, made.has_batch_dim, len(made.to("cpu")))
""",
    "batches of a cache": """
texts = [TEXT, TEXT.replace(", John", ", Mary")]
_, cache = model.run_with_cache(texts)
stack, labels = cache.decompose_resid(layer=2, pos_slice=(-3, None), apply_ln=True, return_labels=True)
print(stack.shape, labels[-1])
one = cache.apply_slice_to_batch_dim(0)
print(one.has_batch_dim, one["resid_pre", 1].shape, (one["resid_pre", 1] - cache["resid_pre", 1][0]).abs().max())
some = cache.apply_slice_to_batch_dim([1])
print(some["resid_pre", 1].shape)
print(cache.get_neuron_results(1, neuron_slice=(0, 5), pos_slice=-1).shape)
print(cache.compute_head_results(), cache["result", 1].shape)
last = cache.decompose_resid(layer=-1, pos_slice=-1)
print(cache.logit_attrs(last, tokens=torch.tensor([5, 6]), pos_slice=-1).sum(0))
""",
    "which heads copy": """
scores = {}
for layer in range(model.cfg.n_layers):
    for head in range(model.cfg.n_heads):
        circuit = model.W_E[:50] @ model.W_V[layer, head] @ model.W_O[layer, head] @ model.W_U[:, :50]
        scores[f"L{layer}H{head}"] = round((circuit.argmax(-1) == torch.arange(50)).float().mean().item(), 2)
print(sorted(scores.items(), key=lambda one: -one[1])[:6])
eigen = model.OV.eigenvalues
print((eigen.sum(-1).real / eigen.abs().sum(-1)).round(decimals=2))
""",
    "mean ablation with a context": """
_, cache = model.run_with_cache([TEXT, TEXT.replace("store", "park"), TEXT.replace("Mary", "Anna")])
means = {layer: cache["mlp_out", layer].mean(0) for layer in range(model.cfg.n_layers)}

def put_mean(out, hook):
    hook.ctx["seen"] = hook.ctx.get("seen", 0) + 1
    return means[hook.layer()].expand_as(out)

for layer in range(model.cfg.n_layers):
    name = tl.utils.get_act_name("mlp_out", layer)
    print(layer, model.run_with_hooks(TEXT, return_type="loss", fwd_hooks=[(name, put_mean)]))
print(model.hook_dict["blocks.0.hook_mlp_out"].ctx)
model.reset_hooks()
""",
    "hooks behind hooks": """
order = []
model.add_hook("hook_embed", lambda x, hook: order.append("first"))
model.add_hook("hook_embed", lambda x, hook: order.append("before"), prepend=True)
model.add_hook("hook_embed", lambda x, hook: order.append("inner"), level=1)
model.run_with_hooks(TEXT, fwd_hooks=[("hook_embed", lambda x, hook: order.append("call"))])
print(order)
model(TEXT)
print(order[4:])
handles = model.hook_dict["hook_embed"].fwd_hooks
print(len(handles), [handle.is_permanent for handle in handles], [handle.context_level for handle in handles])
model.hook_dict["hook_embed"].remove_hooks("fwd")
print(len(model.hook_dict["hook_embed"].fwd_hooks))
model.reset_hooks()
doubled = model.run_with_hooks(TEXT, fwd_hooks=[("hook_embed", lambda x, hook: 2 * x)] * 2, return_type="loss")
print(doubled)
""",
    "gradients by hooks": """
kept = {}

def keep(gradient, hook):
    kept[hook.name] = gradient.norm()

model.add_hook(lambda name: name.endswith("hook_z"), keep, "bwd")
model(TEXT, return_type="loss").backward()
print(kept)
model.reset_hooks()

def halve(gradient, hook):
    return (gradient / 2,)

seen = {}
with model.hooks(bwd_hooks=[("blocks.2.hook_resid_post", halve), ("blocks.0.hook_resid_pre", keep)]):
    model(TEXT, return_type="loss").backward()
print(kept["blocks.0.hook_resid_pre"])
model.zero_grad()
""",
    "names of models": """
loading = tl.loading if hasattr(tl, "loading") else importlib.import_module("transformer_lens.loading_from_pretrained")
print(loading.get_official_model_name("gpt2-small"), loading.get_official_model_name("pythia-70m"))
print(loading.get_official_model_name("attn-only-2l"), loading.get_official_model_name("solu-1l"))
print("gpt2" in loading.OFFICIAL_MODEL_NAMES, loading.MODEL_ALIASES["gpt2"][:1])
try:
    loading.get_official_model_name("no such model")
except Exception as error:
    print(isinstance(error, ValueError))
""",
    "sampling": """
logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
torch.manual_seed(1)
print(tl.utils.sample_logits(logits, temperature=0.0), tl.utils.sample_logits(logits, top_k=1))
print([tl.utils.sample_logits(logits, top_k=2).tolist() for _ in range(4)])
print([tl.utils.sample_logits(logits, top_p=0.5).tolist() for _ in range(3)])
print(tl.utils.sample_logits(logits, freq_penalty=5.0, tokens=torch.tensor([[3, 3], [0, 0]]), top_k=1))
""",
    "settings of positions and shapes": """
for kind, more in {
    "standard": {}, "rotary": {"rotary_dim": 4}, "alibi": {}, "shortformer": {}
}.items():
    cfg = tl.HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=6, d_head=4, n_heads=2, d_mlp=12, d_vocab=9, act_fn="gelu_new", seed=5,
        normalization_type="LN", positional_embedding_type=kind, device="cpu", **more)
    small = tl.HookedTransformer(cfg)
    out, cache = small.run_with_cache(torch.arange(6)[None] % 9)
    print(kind, out.norm(), cache["pattern", 0][0, 0, -1], cfg.n_params)
""",
    "saving and loading": """
state = model.state_dict()
twin = copy.deepcopy(model)
with torch.no_grad():
    twin.blocks[0].attn.W_O[:] = 0
print((twin(TEXT) - model(TEXT)).abs().max() > 0.01)
twin.load_state_dict(state)
print((twin(TEXT) - model(TEXT)).abs().max() < 1e-5)
print(state["blocks.0.attn.W_Q"].shape, state["blocks.0.mlp.W_in"].shape, state["unembed.W_U"].shape)
""",
    "edits of weights": """
twin = copy.deepcopy(model)
with torch.no_grad():
    twin.W_E[:, :4] += 1
    twin.blocks[1].mlp.b_out += 0.5
    twin.blocks[2].attn.W_Q[1] *= 2
    twin.unembed.W_U[:, 0] = 0
logits, cache = twin.run_with_cache(TEXT)
print(logits[0, -1, :3], cache["resid_post", 1].norm(), cache["q", 2][0, -1, 1].norm())
twin.blocks[0].attn.W_V.data.zero_()
print(twin.run_with_cache(TEXT)[1]["v", 0].sub(twin.b_V[0]).abs().max() < 1e-5)
""",
}
