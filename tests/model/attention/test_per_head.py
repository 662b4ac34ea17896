"""Keys and values of single query heads under grouped queries, against a copy of the network without groups.

In the copy every query head has key-value weights of its own, so the same edit is a plain one there. Bounds are
1e-10 in float64: other shapes and another order of sums, through two layers.
"""

from functools import cache

import pytest
import torch

from hooklens import HookedCausalLM, HookedKeyValueCache, NormConfig, RotaryPositions, edits
from hooklens.errors import CacheError
from tests.model.networks import CONFIGS, RMS_NORM, make_config, make_model, pad_rows, random_tokens

LAYER_NORM = NormConfig(kind="layer", eps=1e-5)
GROUPED = {
    "rotary": CONFIGS["grouped"],
    "alibi": CONFIGS["alibi, grouped"],
    "multi-query": CONFIGS["shared norm"],
    "qk rms norm": make_config(qk_norm=RMS_NORM, n_kv_heads=2, positions=RotaryPositions(dim=4)),
    "qk layer norm": make_config(qk_norm=LAYER_NORM, n_heads=6, n_kv_heads=3),
    "capped, windows": CONFIGS["capped"].replace(n_kv_heads=2),
}
KEYS, VALUES = "blocks.0.attn.hook_k", "blocks.0.attn.hook_v"
POINTS = [KEYS, VALUES]
VECTOR = torch.linspace(-1, 2, 6, dtype=torch.float64)


def ungroup(model):
    """The same network with key-value weights for each query head."""
    cfg = model.cfg
    group = cfg.n_heads // cfg.n_kv_heads
    shared = ("W_K", "b_K", "W_V", "b_V")
    state = {
        name: weight.repeat_interleave(group, 0) if name.rpartition(".")[2] in shared else weight
        for name, weight in model.named_weights().items()
    }
    return HookedCausalLM.from_state_dict(state, cfg.replace(n_kv_heads=cfg.n_heads))


@cache
def pair(network):
    model = make_model(GROUPED[network])
    return model, ungroup(model)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def both(network, edit_list, tokens, **keywords):
    """The logits of the network with edits of query heads, and of its copy with the same edits as plain ones."""
    model, copy = pair(network)
    assert_close(model(tokens, **keywords), copy(tokens, **keywords))
    with torch.no_grad():
        found = model.run_with_hooks(tokens, edits=[kind(query_head=h, **at) for kind, h, at in edit_list], **keywords)
        expected = copy.run_with_hooks(tokens, edits=[kind(head=h, **at) for kind, h, at in edit_list], **keywords)
    return found, expected


def make_kind(kind, name):
    """An edit of a kind, as a function of where it acts."""
    tensor = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {
        "zero": lambda **at: edits.Zero(name, **at),
        "scale": lambda **at: edits.Scale(name, -1.5, **at),
        "add": lambda **at: edits.Add(name, VECTOR, **at),
        "replace by vector": lambda **at: edits.Replace(name, VECTOR, **at),
        "replace by tensor": lambda **at: edits.Replace(name, tensor, **at),
        "mean": lambda **at: edits.Mean(name, **at),
        "project": lambda **at: edits.Project(name, VECTOR, **at),
        "custom": lambda **at: edits.Custom(name, lambda region: region.sin() + 0.3, **at),
    }[kind]


KINDS = ["zero", "scale", "add", "replace by vector", "replace by tensor", "mean", "project", "custom"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("network", GROUPED)
def test_every_kind_of_edit_of_one_query_head(network, name, kind):
    tokens = random_tokens(2, 5)
    # Not all positions: a vector added to every key alike falls out of the softmax.
    found, expected = both(network, [(make_kind(kind, name), 1, {"pos": slice(1, None)})], tokens)
    assert_close(found, expected)
    assert (found - pair(network)[0](tokens)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("head", "at"),
    [
        (0, {"pos": -1}),
        (-1, {"pos": [0, 3], "rows": 1}),
        ([0, 3], {"pos": slice(1, 4)}),
        (slice(1, None, 2), {"rows": [0]}),
        (None, {"pos": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("network", GROUPED)
def test_heads_positions_and_rows(network, head, at):
    """Without any head chosen a plain edit of the per-head points is one of all query heads."""
    model, copy = pair(network)
    tokens = random_tokens(2, 5)
    where = [name + "_per_head" if head is None else name for name in POINTS]
    found = model.run_with_hooks(tokens, edits=[edits.Add(name, VECTOR, query_head=head, **at) for name in where])
    expected = copy.run_with_hooks(tokens, edits=[edits.Add(name, VECTOR, head=head, **at) for name in POINTS])
    assert_close(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("network", GROUPED)
def test_padded_rows(network, side):
    ids, mask = pad_rows([random_tokens(1, n, seed=n)[0] for n in (6, 3, 4)], side)
    chosen = [(make_kind("add", KEYS), 2, {"pos": -2}), (make_kind("scale", VALUES), [1, 2], {"pos": slice(0, 3)})]
    found, expected = both(network, chosen, ids, attention_mask=mask)
    assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("watched", [(), ("pattern",), ("attn_scores", "z")], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("rows_of_prefix", [1, 3])
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("network", GROUPED)
def test_new_tokens_on_a_frozen_prefix(network, name, rows_of_prefix, mode, watched):
    model, copy = pair(network)
    prefix, new = random_tokens(rows_of_prefix, 4), random_tokens(3, 3, seed=2)
    kv = model.prefill(prefix)
    held = [entry.past_keys.clone() for entry in kv.entries]
    at = {"pos": [4, -1]}
    with mode(), model.hooks([(word, lambda tensor, hook: None) for word in watched]):
        found = model.run_with_hooks(new, past_kv_cache=kv, edits=[edits.Add(name, VECTOR, query_head=1, **at)])
        whole = torch.cat([prefix.expand(3, -1), new], 1)
        expected = copy.run_with_hooks(whole, edits=[edits.Add(name, VECTOR, head=1, **at)])[:, 4:]
    assert_close(found, expected)
    assert (found - model(new, past_kv_cache=kv)).abs().max() > 1e-6
    assert all(torch.equal(entry.past_keys, keys) for entry, keys in zip(kv.entries, held, strict=True))


@pytest.mark.parametrize("name", POINTS)
def test_a_frozen_cache_without_tokens(name):
    model, _ = pair("rotary")
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64).freeze()
    edit, tokens = edits.Zero(name, query_head=1), random_tokens(2, 4)
    on_cache = model.run_with_hooks(tokens, edits=[edit], past_kv_cache=kv)
    assert_close(on_cache, model.run_with_hooks(tokens, edits=[edit]))


@pytest.mark.parametrize("network", GROUPED)
def test_patterns_and_values_are_those_of_the_copy(network):
    model, copy = pair(network)
    tokens = random_tokens(2, 5)
    words = ["q", "attn_scores", "pattern", "z", "result"]
    _, found = model.run_with_cache(
        tokens, names_filter=words, edits=[edits.Scale(name, 2.0, query_head=3) for name in POINTS]
    )
    _, expected = copy.run_with_cache(
        tokens, names_filter=words, edits=[edits.Scale(name, 2.0, head=3) for name in POINTS]
    )
    for name in expected:
        finite = expected[name].isfinite()
        assert torch.equal(found[name].isfinite(), finite)
        assert_close(found[name][finite], expected[name][finite])


@pytest.mark.parametrize("network", GROUPED)
def test_gradients_are_those_of_the_copy(network):
    """Those at the points themselves, and what flows through edits to everything upstream and to the weights."""
    model, copy = pair(network)
    tokens = random_tokens(2, 5)
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for chosen in ((), [(make_kind("scale", name), 1, {"pos": [1, 3]}) for name in POINTS]):
        grads, weights = [], []
        for one, word, own in ((model, "query_head", "_per_head"), (copy, "head", "")):
            one.zero_grad()
            listed = [kind(**{word: head}, **at) for kind, head, at in chosen]
            names = ["resid_pre", "pattern", f"k{own}", f"v{own}"]
            _, cache = one.run_with_cache(tokens, names_filter=names, incl_bwd=True, edits=listed, return_type="loss")
            grads.append({name.replace("_per_head", ""): cache[name] for name in cache if name.endswith("_grad")})
            weights.append(one.blocks[0].attn.W_K.grad)
        assert set(grads[0]) == set(grads[1])
        for name in grads[1]:
            assert_close(grads[0][name], grads[1][name])
        assert_close(weights[0], weights[1].unflatten(0, (-1, group)).sum(1))


@pytest.mark.parametrize("network", ["rotary", "qk rms norm", "qk layer norm"])
def test_edits_behind_the_keys_count_too(network):
    """An added vector behind the rotation moves every query head's keys, edited ones from where the edit left them."""
    model, copy = pair(network)
    tokens = random_tokens(2, 5)
    name = "rot_k0" if "layer" not in network else "blocks.0.attn.k_norm.hook_normalized"
    moved = edits.Add(name, VECTOR, pos=slice(None))
    # What the norm's weight makes of an added vector does not depend on the keys.
    found = model.run_with_hooks(tokens, edits=[edits.Scale(KEYS, 2.0, query_head=1), moved])
    assert_close(found, copy.run_with_hooks(tokens, edits=[edits.Scale(KEYS, 2.0, head=1), moved]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", GROUPED)
def test_watching_leaves_edited_runs_bit_identical(network, dtype, mode):
    """Whether somebody looks at rotated keys does not change how an edited key is rounded."""
    model, tokens = make_model(GROUPED[network], dtype=dtype), random_tokens(2, 5)
    chosen = [edits.Add(name, VECTOR.to(dtype), query_head=1) for name in POINTS]
    behind = [name for name in model.hook_points() if "rot_k" in name or "k_norm" in name or "per_head" in name]
    with mode():
        alone = model.run_with_hooks(tokens, edits=chosen)
        watched, cache = model.run_with_cache(tokens, edits=chosen, names_filter=["resid_post", *behind])
    assert torch.equal(watched, alone)
    if "blocks.0.attn.hook_rot_k" in behind:
        _, plain = model.run_with_cache(tokens, names_filter="rot_k0")
        assert torch.equal(cache["rot_k", 0], plain["rot_k", 0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("word", ["k_per_head", "v_per_head"])
@pytest.mark.parametrize("network", GROUPED)
def test_an_edit_in_place_is_an_edit(network, word, mode):
    model, tokens = make_model(GROUPED[network]), random_tokens(2, 5)

    def in_place(tensor, hook):
        tensor[:, 1, 2].add_(VECTOR)

    def replace(tensor, hook):
        tensor = tensor.clone()
        tensor[:, 1, 2] += VECTOR
        return tensor

    with mode():
        edited, replaced = (model.run_with_hooks(tokens, fwd_hooks=[((word, 1), hook)]) for hook in (in_place, replace))
        assert torch.equal(edited, replaced)
        assert (edited - model(tokens)).abs().max() > 1e-6
        same = model.run_with_hooks(tokens, fwd_hooks=[(word, lambda tensor, hook: tensor)])
        assert torch.equal(same, model(tokens))


def test_the_points_hold_copies_of_the_shared_heads():
    for network in GROUPED:
        model, _ = pair(network)
        group = model.cfg.n_heads // model.cfg.n_kv_heads
        _, cache = model.run_with_cache(random_tokens(2, 4), names_filter=["k", "v", "k_per_head", "v_per_head"])
        for word in "kv":
            assert torch.equal(cache[f"{word}_per_head", 1], cache[word, 1].repeat_interleave(group, 2))


def test_the_points_exist_where_query_heads_share_keys():
    model, copy = pair("rotary")
    assert {name for name in model.hook_points() if name not in copy.hook_points()} == {
        f"blocks.{layer}.attn.hook_{word}_per_head" for layer in (0, 1) for word in "kv"
    }
    table = model.hook_table().set_index("name")
    assert table.loc[KEYS + "_per_head", "shape"] == ("batch", "pos", 4, 6)
    assert table.loc[KEYS + "_per_head", "on_request"]
    tokens = random_tokens(1, 3)
    assert list(model.run_with_cache(tokens, names_filter="k_per_head")[1]) == [
        f"blocks.{layer}.attn.hook_k_per_head" for layer in (0, 1)
    ]
    assert VALUES + "_per_head" in model.run_with_cache(tokens, names_filter="*")[1]
    assert not any("per_head" in name for name in model.run_with_cache(tokens)[1])


def test_nothing_is_repeated_where_nobody_listens(monkeypatch):
    model, _ = pair("rotary")
    tokens = random_tokens(2, 4)

    def refuse(heads, n_heads):
        raise AssertionError("keys or values were repeated")

    monkeypatch.setattr("hooklens.model.attention.attention.repeat_heads", refuse)
    model(tokens)
    model.run_with_cache(tokens)
    model(tokens, past_kv_cache=model.prefill(tokens))
    with pytest.raises(AssertionError, match="were repeated"):
        model.run_with_cache(tokens, names_filter="v_per_head")


class TestGrowingCaches:
    @torch.no_grad()
    def test_watching_is_allowed(self):
        model, _ = pair("rotary")
        tokens = random_tokens(2, 5)
        caches = [HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64) for _ in range(2)]
        plain = model(tokens, past_kv_cache=caches[0])
        watched, captured = model.run_with_cache(tokens, names_filter="*", past_kv_cache=caches[1])
        assert torch.equal(plain, watched)
        assert KEYS + "_per_head" in captured
        for one, other in zip(caches[0].entries, caches[1].entries, strict=True):
            assert torch.equal(one.past_keys, other.past_keys)

    @torch.no_grad()
    @pytest.mark.parametrize("n_past", [0, 2])
    @pytest.mark.parametrize("name", POINTS)
    def test_edits_are_refused_and_nothing_is_stored(self, name, n_past):
        model, _ = pair("rotary")
        tokens, later = random_tokens(2, 5), name.replace("0", "1")
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
        model(tokens[:, :n_past], past_kv_cache=kv) if n_past else None
        text = (
            rf"'{later}_per_head' \[batch=2, pos={5 - n_past}, head=4, d_head=6\] was edited .* one key and value for "
            r"each of 2 key-value heads, .* \(past_kv_cache=None, in generate use_past_kv_cache=False\) or on a frozen "
            r"one, or edit the key-value head at hook_k or hook_v"
        )
        with pytest.raises(CacheError, match=text):
            model.run_with_hooks(
                tokens[:, n_past:], past_kv_cache=kv, edits=[edits.Zero(later, query_head=1, pos=slice(None))]
            )
        assert [len(entry) for entry in kv.entries] == [n_past, n_past]
        assert len(kv) == n_past

    @torch.no_grad()
    def test_edits_that_do_nothing_in_a_call_are_not_in_the_way(self):
        model, _ = pair("rotary")
        tokens = random_tokens(2, 5)
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
        edit = edits.Zero(KEYS, query_head=1, when="decode")
        assert_close(model.run_with_hooks(tokens, past_kv_cache=kv, edits=[edit]), model(tokens))
        plan = model.make_plan(tokens[:, :1], past_kv_cache=kv, phase="decode")
        with pytest.raises(CacheError, match="was edited"):
            model.run(tokens[:, :1], plan, listeners=model.listen(edits=[edit]), past_kv_cache=kv)

    def test_gradients_are_refused(self):
        model, _ = pair("rotary")
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=1, dtype=torch.float64)
        with pytest.raises(CacheError, match=r"was edited \(or asked for gradients\)"):
            model.run_with_hooks(
                random_tokens(1, 3), past_kv_cache=kv, bwd_hooks=[("v_per_head", lambda gradient, hook: None)]
            )
