import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import LogitDiff
from tests.model.networks import make_model, pad_rows, random_tokens

METRIC = LogitDiff(3, 5)


@torch.no_grad()
def three_passes(model, clean, corrupted, sender, receivers, *, through_mlps):
    """Path patching as the paper tells it, per head: `sender` (layer, head), `receivers` (kind, layer, head)."""
    _, a = model.run_with_cache(corrupted)
    _, b = model.run_with_cache(clean)
    hooks = []
    for layer in range(model.cfg.n_layers):
        frozen = a["z", layer].clone()
        if sender[0] == layer:
            frozen[:, :, sender[1]] = b["z", layer][:, :, sender[1]]
        hooks.append((f"blocks.{layer}.attn.hook_z", lambda tensor, hook, frozen=frozen: frozen))
        if not through_mlps:
            hooks.append((f"blocks.{layer}.hook_mlp_out", lambda tensor, hook, out=a["mlp_out", layer]: out))
    names = [f"blocks.{layer}.attn.hook_{kind}" for kind, layer, _ in receivers]
    logits, c = model.run_with_cache(corrupted, names_filter=names or None, fwd_hooks=hooks)
    if not receivers:
        return METRIC(logits)

    def receive(tensor, hook):
        patched = tensor.clone()
        for kind, layer, head in receivers:
            if hook.name == f"blocks.{layer}.attn.hook_{kind}":
                patched[:, :, head] = c[kind, layer][:, :, head]
        return patched

    return METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(list(dict.fromkeys(names)), receive)]))


@pytest.mark.parametrize("through_mlps", [True, False])
@pytest.mark.parametrize("network", ["grouped", "rotary", "alibi", "shared norm"])
def test_equals_three_passes(network, through_mlps):
    model = make_model(network)
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    kv = model.cfg.n_kv_heads - 1
    for names, receivers in (
        (["a1.h2.q", f"a1.h{kv}.v", f"a1.h{kv}.k"], [("q", 1, 2), ("v", 1, kv), ("k", 1, kv)]),
        (["logits"], []),
    ):
        result = patching.path_patch(
            model, clean, corrupted, ["a0.h0", "a0.h3", "a1.h1"], names, METRIC, through_mlps=through_mlps
        )
        for sender, value in zip([(0, 0), (0, 3), (1, 1)], result.per_pair, strict=True):
            expected = three_passes(model, clean, corrupted, sender, receivers, through_mlps=through_mlps)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-8)


def test_an_mlp_that_receives_the_embedding():
    """One layer: all that the embedding does is done through the queries, keys, values, the MLP and the stream."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    own = patching.path_patch(model, clean, corrupted, ["embed"], ["m0"], METRIC)
    _, read = model.run_with_cache(corrupted)
    _, other = model.run_with_cache(clean)
    # The heads are held, so the MLP reads the clean embedding plus the corrupted heads.
    moved = read["resid_mid", 0] - read["resid_pre", 0] + other["resid_pre", 0]
    logits = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.hook_mlp_in", lambda tensor, hook: moved)])
    torch.testing.assert_close(own.per_pair[0], METRIC(logits), rtol=0, atol=1e-8)


def test_several_kinds_of_receivers_together():
    """Logits beside an MLP read what the sender sends them, and what the MLP makes of what it was sent."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    both = patching.path_patch(model, clean, corrupted, ["m0"], ["m1", "logits"], METRIC, through_mlps=False)
    _, read = model.run_with_cache(corrupted)
    _, other = model.run_with_cache(clean)
    change = other["mlp_out", 0] - read["mlp_out", 0]
    hooks = [
        ("blocks.1.hook_mlp_in", lambda tensor, hook: tensor + change),
        ("blocks.1.hook_resid_post", lambda tensor, hook: tensor + change),
    ]
    logits = model.run_with_hooks(corrupted, fwd_hooks=hooks)
    torch.testing.assert_close(both.per_pair[0], METRIC(logits), rtol=0, atol=1e-8)


def test_padding_directions_and_all_senders():
    model = make_model("grouped")
    lengths = (6, 4)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "left"), pad_rows(rows[1], "left")
    together = patching.path_patch(model, clean, corrupted, None, ["a1.h0.q"], METRIC, attention_mask=mask)
    assert len(together.axes["sender"]) == 1 + 2 * (4 + 1)
    for i in range(2):
        one, other = rows[0][i][None], rows[1][i][None]
        alone = patching.path_patch(model, other, one, None, ["a1.h0.q"], METRIC, direction="noise")
        torch.testing.assert_close(together.per_pair[:, i], alone.per_pair[:, 0], rtol=0, atol=1e-10)


def test_refusals():
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    with pytest.raises(InputError, match="at least one sender and one receiver"):
        patching.path_patch(make_model("grouped"), clean, corrupted, ["embed"], [], METRIC)
    with pytest.raises(InputError, match="a norm follows each branch"):
        patching.path_patch(make_model("capped"), clean, corrupted, ["embed"], ["logits"], METRIC)
    with pytest.raises(patching.SiteError, match=r"'a9\.h0\.q' does not read the stream"):
        patching.path_patch(make_model("grouped"), clean, corrupted, ["embed"], ["a9.h0.q"], METRIC)


def test_an_interruption_keeps_what_was_measured():
    model = make_model("grouped")
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    calls = []

    def stop(logits):
        calls.append(logits)
        # The clean and the corrupted run, then two senders.
        if len(calls) > 4:
            raise KeyboardInterrupt
        return logits[:, -1, 3]

    with pytest.raises(patching.SweepInterruptedError, match=r"path patching stopped after 2 of 11 values") as caught:
        patching.path_patch(model, clean, corrupted, None, ["logits"], stop, progress=False)
    whole = patching.path_patch(model, clean, corrupted, None, ["logits"], lambda logits: logits[:, -1, 3])
    partial = caught.value.result
    assert torch.equal(partial.values[:2], whole.values[:2])
    assert bool(partial.values[2:].isnan().all())


@pytest.mark.parametrize(("receivers", "passes"), [(["logits"], 1), (["logits", "a1.h0.q"], 2)])
def test_stats_are_the_forwards_that_ran(receivers, passes):
    """Each sender takes one pass, and a second where receivers other than the logits pass on what they read."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
    ran = []
    model.blocks[-1].register_forward_pre_hook(lambda block, inputs: ran.append(inputs[0].shape[:2].numel()))
    stats = patching.path_patch(model, clean, corrupted, ["a0.h0", "a0.h1"], receivers, METRIC).stats
    assert stats.forwards == len(ran) == 1 + 2 + 2 * passes
    assert stats.tokens == sum(ran)
    assert (stats.cells, stats.pairs, stats.unchanged) == (2, 3, 0)
    # One by one: two unpatched runs, and two passes for each sender.
    assert (stats.naive_forwards, stats.naive_tokens) == ((2 + 2 * 2) * 3, (2 + 2 * 2) * 3 * 5)
