"""Tests of hooklens.model.attention.attention: the cheap way, the watched side tensors, and edits of each."""

import pytest
import torch

from tests.model.networks import ALL_CONFIGS, CONFIGS, Allocations, make_config, make_model, pad_rows, random_tokens

# No product of other sizes gives these numbers of entries.
N, HEADS, BATCH = 31, 4, 2
QUERY_KEY = [BATCH * HEADS * N * N, HEADS * N * N, BATCH * N * N, N * N, BATCH * 2 * N * N]
PER_HEAD = [BATCH * N * HEADS * 12]
P2_NETWORKS = ["rotary", "grouped", "alibi", "alibi, grouped", "shared norm", "learned, tied", "bare"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("network", P2_NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_nobody_watches_is_not_made(network, dtype, mode):
    model, tokens = make_model(network, dtype=dtype), random_tokens(BATCH, N)
    if network == "learned, tied":
        model = make_model(CONFIGS[network].replace(d_vocab=29), dtype=dtype)
        tokens = tokens % 29
    for run in (
        lambda: model(tokens),
        lambda: model.run_with_cache(tokens, names_filter="resid_post"),
        lambda: model.run_with_cache(tokens, names_filter=["resid_pre", "z", "mlp_out"]),
    ):
        with mode(), Allocations() as made:
            run()
        assert made.sizes, "nothing was recorded"
        assert made.with_numel(*QUERY_KEY) == []
        assert made.with_numel(*PER_HEAD) == []


@pytest.mark.parametrize("network", P2_NETWORKS)
def test_no_logits_at_positions_nobody_reads(network):
    model, tokens = make_model(network, dtype=torch.float32), random_tokens(BATCH, N)
    all_logits = BATCH * N * model.cfg.d_vocab
    with torch.no_grad():
        with Allocations() as made:
            model(tokens)
        assert made.with_numel(all_logits)
        with Allocations() as made:
            model(tokens, logits_at=-1)
            model(tokens, return_type=None)
            model(tokens, stop_at_layer=1)
            model.run_with_cache(tokens, names_filter="resid_post", return_type=None)
        assert made.with_numel(all_logits) == []
        with Allocations() as made:
            model(tokens, return_type=None)
        assert made.with_numel(BATCH * model.cfg.d_vocab) == []


@pytest.mark.parametrize("network", P2_NETWORKS)
def test_a_watched_pattern_is_made_and_the_result_too(network):
    """Guards the tests above: the record does see these tensors where they are made."""
    model, tokens = make_model(network, dtype=torch.float32), random_tokens(BATCH, N)
    with torch.no_grad(), Allocations() as made:
        model.run_with_cache(tokens, names_filter=["pattern", "result"])
    assert made.with_numel(QUERY_KEY[0])
    assert made.with_numel(*PER_HEAD)


@pytest.mark.parametrize("layout", ["fresh", "after to", "after a step"])
@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_no_forward_copies_or_permutes_a_weight(network, layout):
    """Every forward copied weights to transpose them, 75 % of all parameter bytes."""
    # Seven tokens: an activation's number of entries is a multiple of 7, and no weight's is.
    model, tokens = make_model(network, dtype=torch.float32), random_tokens(1, 7)
    if layout == "after to":
        model = model.to(torch.bfloat16).to(torch.float64)
    if layout == "after a step":
        optimiser = torch.optim.AdamW(model.parameters())
        model(tokens, return_type="loss").backward()
        optimiser.step()
    weights = {p.numel() for p in model.parameters() if p.ndim > 1}
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), Allocations() as made:
            model(tokens)
        activations = {torch.Size(shape).numel() for _, shape in made.sizes}
        assert not weights & activations


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_side_tensors_against_their_definitions(network):
    model = make_model(network)
    ids, mask = pad_rows([random_tokens(1, n, seed=n)[0] for n in (6, 4)], "left")
    _, cache = model.run_with_cache(ids, names_filter="*", attention_mask=mask)
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for layer, block in enumerate(model.block_list()):
        if block.attn is None:
            continue
        scores, pattern = cache["attn_scores", layer], cache["pattern", layer]
        real = mask.bool()
        visible = torch.ones(6, 6).tril().bool() & real[:, None, None, :]
        if (window := model.cfg.window(layer)) is not None:
            visible = visible & torch.ones(6, 6).triu(1 - window).bool()
        assert torch.equal(scores == -torch.inf, ~visible.expand_as(scores))
        expected = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0.0).nan_to_num()
        torch.testing.assert_close(pattern, expected, rtol=1e-12, atol=1e-12)
        v = cache["v", layer].repeat_interleave(group, 2)
        z = torch.einsum("bnqk,bknh->bqnh", pattern, v)
        torch.testing.assert_close(cache["z", layer][real], z[real], rtol=1e-12, atol=1e-12)
        result = torch.einsum("bqnh,nhd->bqnd", cache["z", layer], block.attn.W_O)
        torch.testing.assert_close(cache["result", layer], result, rtol=1e-12, atol=1e-12)
        written = result.sum(2) + (0 if block.attn.b_O is None else block.attn.b_O)
        if block.ln1_post is None:
            torch.testing.assert_close(cache["attn_out", layer], written, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("point", ["attn_scores", "pattern", "result", "q_input", "k_input", "v_input", "attn_in"])
@pytest.mark.parametrize("network", ["rotary", "alibi, grouped", "shared norm", "capped", "bare"])
def test_an_in_place_edit_of_a_side_tensor_is_an_edit(network, point, mode):
    """Scores were the pattern, and edits of them were dropped; in-place edits went unseen under inference_mode."""
    model, tokens = make_model(network), random_tokens(2, 5)

    # No multiple of the tensor: norms would undo that.
    ramp = torch.linspace(0, 1, 12 if "in" in point or point == "result" else 5, dtype=torch.float64)

    def in_place(tensor, hook):
        tensor[:, 1].add_(ramp)

    def replace(tensor, hook):
        tensor = tensor.clone()
        tensor[:, 1] += ramp
        return tensor

    with mode():
        plain = model(tokens)
        edited = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.*hook_{point}", in_place)])
        replaced = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.*hook_{point}", replace)])
        assert torch.equal(edited, replaced)
        assert (edited - plain).abs().max() > 1e-6


@pytest.mark.parametrize("network", ["rotary", "grouped", "alibi"])
def test_edited_scores_and_patterns_reach_z_by_the_explicit_way(network):
    model, tokens = make_model(network), random_tokens(2, 5)
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    noise = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    hooks = [("pattern1", lambda t, hook: t * noise)]
    with model.hooks(hooks), model.capture(["pattern1", "z1", "v1"]) as captured:
        model(tokens)
    z, pattern, v = (captured[f"blocks.1.attn.hook_{name}"] for name in ("z", "pattern", "v"))
    torch.testing.assert_close(z, torch.einsum("bnqk,bknh->bqnh", pattern, v.repeat_interleave(group, 2)))
    with (
        model.hooks([("attn_scores1", lambda t, hook: t * noise)]),
        model.capture(["attn_scores1", "pattern1"]) as seen,
    ):
        model(tokens)
    torch.testing.assert_close(seen["blocks.1.attn.hook_pattern"], seen["blocks.1.attn.hook_attn_scores"].softmax(-1))


@pytest.mark.parametrize("point", ["attn_scores", "pattern", "result"])
def test_retain_grad_on_a_side_tensor_gives_the_true_gradient(point):
    """The fused kernel does not go through the side tensor, so its gradient stayed None."""
    model, tokens, kept = make_model("grouped"), random_tokens(2, 5), {}

    def keep(tensor, hook):
        tensor.retain_grad()
        kept[hook.name] = tensor

    name = f"blocks.0.attn.hook_{point}"
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep)], return_type="loss").backward()
    where = (1, 2, 4, 1) if point != "result" else (1, 4, 2, 1)
    step = 1e-6

    def loss(sign):
        def shift(tensor, hook):
            tensor = tensor.clone()
            tensor[where] += sign * step
            return tensor

        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=[(name, shift)], return_type="loss")

    slope = (loss(1) - loss(-1)) / (2 * step)
    # Central differences in float64 with a step of 1e-6: good to about 1e-9.
    torch.testing.assert_close(kept[name].grad[where], slope, rtol=1e-5, atol=1e-8)


def test_d_head_need_not_divide_d_model():
    model = make_model(make_config(d_head=5, n_kv_heads=1))
    assert model(random_tokens(1, 4)).shape == (1, 4, 23)
    assert model.blocks[0].attn.W_O.shape == (4, 5, 12)
