from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.model.attention.attention import Attention
from hooklens.model.mlp import MLP
from hooklens.patching import KL, FunctionMetric, LogitDiff, LogProb
from hooklens.patching.graph.nodes import list_writers
from hooklens.patching.paths import path as module
from hooklens.patching.paths.passes import share_of_mlp
from hooklens.patching.paths.route import Route
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, PARTIAL_CONFIGS, make_model, pad_rows, random_tokens
from tests.patching.live_bytes import LiveBytes
from tests.patching.path_reference import PathTree
from tests.slow_cases import slow_but

METRIC = LogitDiff(3, 5)
# Sequential with grouped queries, parallel, parallel with one norm and one key-value head, sequential with biases.
WIRINGS = ("grouped", "rotary", "shared norm", "learned, tied")
RECEIVERS = {
    "logits": ["logits"],
    "an MLP": ["m0"],
    "the last MLP": ["m1"],
    "an MLP and the logits": ["m0", "logits"],
    "both MLPs": ["m0", "m1"],
    "heads": ["a1.h0.q", "a1.h0.k", "a1.h1.q"],
    "queries of the last block": ["a1.h0.q", "a1.h1.q"],
    "values of the last block": ["a1.h0.v"],
    "heads above heads": ["a0.h0.v", "a1.h0.q"],
    "heads above heads, an MLP and the logits": ["a0.h0.q", "m0", "a1.h1.q", "a1.h0.v", "logits"],
    "a head and the logits": ["a1.h1.q", "logits"],
}


@cache
def small_model(network, n_layers=2):
    cfg = CONFIGS[network]
    n_kv_heads = 1 if network == "grouped" else min(cfg.n_kv_heads, 2)
    return make_model(replace(cfg, n_heads=2, n_kv_heads=n_kv_heads, n_layers=n_layers))


@cache
def small_partial_model(network):
    return make_model(PARTIAL_CONFIGS[network].replace(n_heads=2, n_kv_heads=1))


def two_prompts(model, n=2, length=5, shared=1):
    clean, corrupted = random_tokens(n, length, seed=1), random_tokens(n, length, seed=2)
    corrupted[:, :shared] = clean[:, :shared]
    return clean, corrupted


@pytest.mark.parametrize("network", WIRINGS)
def test_the_reference_computes_the_network(network):
    model = small_model(network)
    clean, corrupted = two_prompts(model)
    tree = PathTree(model, corrupted, clean)
    with torch.no_grad():
        for tokens in (clean, corrupted):
            written = tree.outputs_of(tree.embed(tokens))
            torch.testing.assert_close(
                tree.unembed(tree.sum_into(tree.last, written)), model(tokens), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("through_mlps", [True, False])
@pytest.mark.parametrize("receivers", ["logits", "an MLP and the logits", "heads above heads, an MLP and the logits"])
def test_copies_of_a_node_may_share_a_run_of_the_reference(receivers, through_mlps):
    model = small_model("grouped")
    clean, corrupted = two_prompts(model)
    for sender in ("embed", "a0.h0", "m0"):
        shared, apart = (
            PathTree(model, corrupted, clean, is_shared=is_shared).logits(
                sender, RECEIVERS[receivers], through_mlps=through_mlps
            )
            for is_shared in (True, False)
        )
        assert torch.equal(shared, apart)


@pytest.mark.parametrize("through_mlps", [True, False])
@pytest.mark.parametrize(
    ("network", "receivers"),
    [
        ("attention only", ["logits"]),
        ("attention only", ["a1.h1.q", "a1.h0.v"]),
        ("attention only", ["a0.h0.k", "a1.h0.q", "logits"]),
        ("heads and MLPs apart", ["logits"]),
        ("heads and MLPs apart", ["m2", "logits"]),
        ("heads and MLPs apart", ["a3.h0.q", "m3"]),
        ("heads and MLPs apart", ["a0.h0.v", "m2", "a3.h0.k", "logits"]),
    ],
)
def test_layers_without_attention_or_mlp(network, receivers, through_mlps):
    model = small_partial_model(network)
    clean, corrupted = two_prompts(model)
    senders = list(map(str, list_writers(model.cfg)))
    result = patching.path_patch(
        model, clean, corrupted, senders, receivers, METRIC, through_mlps=through_mlps, progress=False
    )
    tree = PathTree(model, corrupted, clean)
    for sender, value in zip(senders, result.per_pair, strict=True):
        expected = METRIC(tree.logits(sender, receivers, through_mlps=through_mlps))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
    with pytest.raises(patching.SiteError, match=r"'m1' does not read the stream; .*no MLPs in layers \[0, 1\]\)"):
        patching.path_patch(model, clean, corrupted, senders, ["m1"], METRIC, progress=False)


# Each wiring with all receivers, which two of the four wirings have with MLPs on the way, and the others without.
BY_TURNS = [
    (network, receivers, (row + column) % 2 == 0)
    for row, network in enumerate(WIRINGS)
    for column, receivers in enumerate(RECEIVERS)
]


@pytest.mark.parametrize(
    ("network", "receivers", "through_mlps"), slow_but(product(WIRINGS, RECEIVERS, [True, False]), BY_TURNS)
)
def test_equals_the_network_path_by_path(network, receivers, through_mlps):
    """Each path counts once, in one run.

    Receivers that could reach each other were given what they read while the others were held, and the logits got the
    sender's own change on top of what the receivers had made of it: with `["m0", "logits"]` and `through_mlps`, paths
    over `m0` to the logits were in both parts.
    """
    receivers = RECEIVERS[receivers]
    model = small_model(network)
    clean, corrupted = two_prompts(model)
    senders = ["embed", "a0.h0", "m0", "a1.h1", "m1"]
    result = patching.path_patch(
        model, clean, corrupted, senders, receivers, METRIC, through_mlps=through_mlps, progress=False
    )
    tree = PathTree(model, corrupted, clean)
    for sender, value in zip(senders, result.per_pair, strict=True):
        expected = METRIC(tree.logits(sender, receivers, through_mlps=through_mlps))
        # Sums of some hundred terms in another order, in float64.
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("network", ["grouped", "rotary", "shared norm"])
def test_three_layers_equal_the_network_path_by_path(network):
    model = small_model(network, n_layers=3)
    clean, corrupted = two_prompts(model, n=1, length=4, shared=0)
    receivers = ["m0", "a1.h0.k", "m1", "a2.h1.q"]
    result = patching.path_patch(model, clean, corrupted, ["embed", "a0.h1", "a1.h0"], receivers, KL(), progress=False)
    tree = PathTree(model, corrupted, clean)
    reference = model(clean).detach()[:, -1].log_softmax(-1)
    for sender, value in zip(("embed", "a0.h1", "a1.h0"), result.per_pair, strict=True):
        log_probs = tree.logits(sender, receivers)[:, -1].log_softmax(-1)
        expected = (reference.exp() * (reference - log_probs)).sum(-1)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


def test_receivers_inside_each_other_add_nothing():
    """Without heads above, every path over MLPs ends at the logits: naming one of the MLPs chooses no further path.

    With `W_O` of layer 1 zero, `["logits"]` gave the full patch and `["m0", "logits"]` nearly nine times as much.
    """
    model = make_model("grouped")
    model.blocks[1].attn.W_O = torch.zeros_like(model.blocks[1].attn.W_O)
    clean, corrupted = two_prompts(model)
    name = "blocks.0.attn.hook_z"
    _, other = model.run_with_cache(clean, names_filter=name)
    values = {}
    for receivers in (["logits"], ["m0", "logits"], ["m0", "m1", "logits"]):
        values[len(receivers)] = patching.path_patch(
            model, clean, corrupted, ["a0.h2"], receivers, METRIC, progress=False
        ).per_pair[0]

    def patch(tensor, hook):
        tensor = tensor.clone()
        tensor[:, :, 2] = other[name][:, :, 2]
        return tensor

    full = METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])).detach()
    for value in values.values():
        torch.testing.assert_close(value, full, rtol=0, atol=1e-9)


@torch.no_grad()
def three_passes(model, clean, corrupted, sender, receivers, *, through_mlps):
    """Path patching as Wang et al. tell it, per head: `sender` (layer, head), `receivers` (kind, layer, head)."""
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
@pytest.mark.parametrize("network", ["grouped", "rotary", "alibi", "alibi, grouped", "shared norm", "bare"])
def test_equals_three_passes_where_receivers_do_not_reach_each_other(network, through_mlps):
    model = make_model(network)
    clean, corrupted = two_prompts(model)
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


@pytest.mark.parametrize(
    ("network", "direction"),
    slow_but(
        product(["grouped", "rotary", "shared norm"], ["denoise", "noise"]),
        [("grouped", "noise"), ("rotary", "denoise"), ("shared norm", "noise")],
    ),
)
def test_ragged_pairs_equal_pairs_alone(network, direction):
    model = make_model(network)
    lengths, shared = (6, 4, 5), (2, 0, 4)
    clean = [row[:n] for row, n in zip(random_tokens(3, 6, seed=1), lengths, strict=True)]
    corrupted = [row[:n].clone() for row, n in zip(random_tokens(3, 6, seed=2), lengths, strict=True)]
    for one, other, n in zip(clean, corrupted, shared, strict=True):
        other[:n] = one[:n]
    (ids, mask), (others, _) = pad_rows(clean, "left"), pad_rows(corrupted, "left")
    # The other direction with the prompts exchanged is the same experiment.
    turned = {"denoise": "noise", "noise": "denoise"}[direction]
    metric = LogProb(4, pos=[1, -1])
    for receivers in (["logits"], ["a1.h2.q"], ["a0.h1.q", "a1.h0.q", "m1"]):
        alone = [
            patching.path_patch(
                model, one[None], other[None], None, receivers, metric, direction=turned, progress=False
            )
            for one, other in zip(corrupted, clean, strict=True)
        ]
        for batch_size in ("auto", 2, 7):
            together = patching.path_patch(
                model, ids, others, None, receivers, metric, attention_mask=mask, batch_size=batch_size,
                direction=direction, progress=False,
            )  # fmt: skip
            assert len(together.axes["sender"]) == 1 + 2 * (4 + 1)
            for pair, one in enumerate(alone):
                torch.testing.assert_close(together.per_pair[:, pair], one.per_pair[:, 0], rtol=0, atol=1e-10)
                torch.testing.assert_close(together.clean_per_pair[pair], one.corrupted_per_pair[0], rtol=0, atol=1e-10)


def test_functions_of_logits_see_all_pairs():
    model = make_model("grouped")
    clean, corrupted = two_prompts(model, n=5)

    def difference(logits):
        assert len(logits) == 5
        return logits[:, -1, 3] - logits[:, -1, 5]

    for receivers in (["logits"], ["a1.h0.q", "m1"]):
        whole = patching.path_patch(model, clean, corrupted, None, receivers, METRIC, progress=False)
        for batch_size in ("auto", 2):
            found = patching.path_patch(
                model, clean, corrupted, None, receivers, FunctionMetric(difference), batch_size=batch_size,
                progress=False,
            )  # fmt: skip
            torch.testing.assert_close(found.per_pair, whole.per_pair, rtol=0, atol=1e-10)


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch):
    """The runs of all pairs, and what every node writes in them, were held at once."""
    model = make_model("grouped")
    monkeypatch.setattr(module, "tokens_per_pass", lambda *sizes, **options: 64)
    peaks, forwards = [], []
    for n in (8, 16, 64):
        clean, corrupted = two_prompts(model, n=n, length=16)
        with LiveBytes() as live:
            result = patching.path_patch(
                model, clean, corrupted, ["a0.h1", "m0"], ["a1.h0.k", "logits"], METRIC, progress=False
            )
        peaks.append(live.peak)
        forwards.append(result.stats.forwards)
    assert forwards == [n // 4 * 3 for n in (8, 16, 64)]
    # Token ids and values themselves: about a thousand bytes for each pair; the runs of one are some 18 thousand.
    assert peaks[2] - peaks[0] < 56 * 1200
    assert peaks[2] < 1.5 * peaks[0]


def test_senders_that_reach_no_receiver_run_nothing():
    model = make_model("grouped")
    clean, corrupted = two_prompts(model)
    result = patching.path_patch(model, clean, corrupted, ["m1", "a1.h0"], ["a1.h0.q"], METRIC, progress=False)
    assert torch.equal(result.per_pair, result.corrupted_per_pair.expand(2, -1))
    assert (result.stats.unchanged, result.stats.forwards) == (4, 1)


def test_refusals():
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    model = make_model("grouped")

    def patch(senders=("embed",), receivers=("logits",), metric=METRIC, **options):
        return patching.path_patch(model, clean, corrupted, list(senders), list(receivers), metric, **options)

    with pytest.raises(InputError, match="at least one sender and one receiver"):
        patch(receivers=[])
    with pytest.raises(InputError, match="a norm follows each branch"):
        patching.path_patch(make_model("capped"), clean, corrupted, ["embed"], ["logits"], METRIC)
    with pytest.raises(patching.SiteError, match=r"'a9\.h0\.q', 'a0\.h1' does not read the stream"):
        patch(receivers=["a9.h0.q", "m1", "a0.h1"])
    with pytest.raises(patching.SiteError, match=r"'m7', 'logits' writes nothing to the stream"):
        patch(senders=["m7", "logits"])
    with unchecked(), pytest.raises(InputError, match=r"expected a list of nodes' names, got 'logits'"):
        patching.path_patch(model, clean, corrupted, None, "logits", METRIC)
    with pytest.raises(InputError, match="batch_size is 0"):
        patch(batch_size=0)
    with unchecked(), pytest.raises(InputError, match="direction is 'both'"):
        patch(direction="both")
    with pytest.raises(patching.MetricError, match=r"NaN for the unpatched runs of pairs \[0\]"):
        patch(metric=FunctionMetric(lambda logits: logits[:, -1, 0] * torch.nan))


def test_nan_names_the_senders():
    model = make_model("grouped")
    clean, corrupted = two_prompts(model)
    calls = []

    def sometimes(logits):
        calls.append(logits)
        return logits[:, -1, 0] * (1.0 if len(calls) <= 3 else torch.nan)

    with pytest.raises(patching.SweepInterruptedError, match=r"sometimes is NaN for the senders \['a0.h1', 'm0'\]"):
        patching.path_patch(model, clean, corrupted, ["embed", "a0.h1", "m0"], ["logits"], sometimes, progress=False)


@pytest.mark.parametrize(
    "receivers", [["logits"], ["a1.h0.q"], ["a3.h0.q"], ["a3.h0.v"], ["a2.h0.k", "m2", "logits"]], ids="+".join
)
@pytest.mark.parametrize("network", ["grouped", "rotary"])
def test_stats_are_what_ran(network, receivers, monkeypatch):
    """Every sender took one or two whole forwards of all positions through all layers; 16 came to 20 to 36."""
    model = make_model(replace(CONFIGS[network], n_layers=4))
    clean, corrupted = two_prompts(model, n=3, length=8, shared=5)
    ran = {Attention: [], MLP: []}

    def count(part, run):
        def counted(self, stream, *arguments, **keywords):
            ran[part].append(stream.shape[:2].numel())
            return run(self, stream, *arguments, **keywords)

        monkeypatch.setattr(part, "forward", counted)

    count(Attention, Attention.forward)
    count(MLP, MLP.forward)
    senders = [f"a{layer}.h{head}" for layer in range(4) for head in range(4)]
    stats = patching.path_patch(model, clean, corrupted, senders, receivers, METRIC, progress=False).stats
    share = share_of_mlp(model.blocks[0])
    assert stats.tokens == pytest.approx(((1 - share) * sum(ran[Attention]) + share * sum(ran[MLP])) / 4)
    assert stats.forwards == 2
    # With the logits among other receivers both streams run, and here senders are in all layers.
    assert stats.tokens < (5 if len(receivers) == 1 else 6) * clean.numel()
    if receivers == ["logits"]:
        # The unpatched runs, and MLPs at the position that is read.
        assert len(ran[Attention]) == 4
        assert set(ran[MLP][4:]) <= {3 * n for n in range(1, 17)}
    assert (stats.cells, stats.pairs) == (16, 3)
    # One by one: two unpatched runs, and two passes for each sender.
    assert (stats.naive_forwards, stats.naive_tokens) == ((2 + 2 * 16) * 3, (2 + 2 * 16) * 3 * 8)


@pytest.mark.parametrize("network", ["grouped", "rotary"])
def test_queries_of_the_last_block_are_patched_where_the_metric_reads(network, monkeypatch):
    """All positions behind the first difference were run, though queries carry nothing to another position."""
    model = make_model(replace(CONFIGS[network], n_layers=3))
    clean, corrupted = two_prompts(model, n=2, length=8, shared=0)
    senders = ["embed", "a0.h0", "m0", "a1.h2", "m1"]
    found = patching.path_patch(model, clean, corrupted, senders, ["a2.h1.q", "a2.h3.q"], METRIC, progress=False)
    # The unpatched runs, and at one of eight positions less than all blocks of five senders.
    assert found.stats.tokens < (2 + 5 / 8) * clean.numel()
    monkeypatch.setattr(Route, "carries_from", lambda route, entry: 0)
    monkeypatch.setattr(Route, "attends_alone", lambda route, layer: False)
    wide = patching.path_patch(model, clean, corrupted, senders, ["a2.h1.q", "a2.h3.q"], METRIC, progress=False)
    assert wide.stats.tokens > 3 * clean.numel()
    torch.testing.assert_close(found.per_pair, wide.per_pair, rtol=0, atol=1e-10)
    assert float((found.per_pair - found.corrupted_per_pair).abs().min()) > 1e-7


def test_an_interruption_keeps_what_was_measured(monkeypatch):
    model = make_model("grouped")
    clean, corrupted = two_prompts(model)
    whole = patching.path_patch(model, clean, corrupted, None, ["logits", "a1.h0.q"], METRIC, progress=False)
    run, calls = module.PathPass.run, []

    def stop(self):
        calls.append(self.senders)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(module.PathPass, "run", stop)
    with pytest.raises(patching.SweepInterruptedError, match=r"path patching stopped after 16 of 22 values") as caught:
        patching.path_patch(model, clean, corrupted, None, ["logits", "a1.h0.q"], METRIC, progress=False, batch_size=8)
    partial = caught.value.result.per_pair
    measured = ~partial.isnan().any(1)
    assert int(measured.sum()) == 8
    torch.testing.assert_close(partial[measured], whole.per_pair[measured], rtol=0, atol=1e-10)
