import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import LogProb
from hooklens.patching.graph.nodes import list_readers, list_writers, parse_reader, parse_writer
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens

METRIC = LogProb(4)


@torch.no_grad()
def derivative_of_edge(model, clean, corrupted, writer, reader, *, step=1e-5):
    """The metric's derivative as the reader alone gets the writer's output moved towards the clean run's."""
    writer, reader = parse_writer(writer, model.cfg), parse_reader(reader, model.cfg)

    def output(tokens):
        _, cache = model.run_with_cache(tokens, names_filter=writer.hook_name)
        tensor = cache[writer.hook_name]
        return tensor[:, :, writer.head] if tensor.ndim == 4 else tensor

    change = output(clean) - output(corrupted)

    def value(amount):
        def move(tensor, hook):
            moved = tensor.clone()
            part = moved[:, :, reader.head] if tensor.ndim == 4 else moved
            part += amount * change
            return moved

        return METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(reader.hook_name, move)])).mean()

    return float(value(step) - value(-step)) / (2 * step)


@pytest.mark.parametrize("network", ["grouped", "rotary", "shared norm", "alibi, grouped"])
def test_scores_equal_explicit_edge_patches_in_the_linear_limit(network):
    model = make_model(network)
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    scores = patching.edge_attribution(model, clean, corrupted, METRIC)
    readers = {reader.split(".")[-1]: reader for reader in reversed(scores.readers)}
    edges = [(writer, reader) for writer in scores.writers[::3] for reader in [*readers.values(), *scores.readers[::5]]]
    checked = 0
    for writer, reader in edges:
        if scores.exists[scores.writers.index(writer), scores.readers.index(reader)]:
            expected = derivative_of_edge(model, clean, corrupted, writer, reader)
            # Central differences of step 1e-5 in float64 leave about 1e-9.
            assert scores[writer, reader] == pytest.approx(expected, rel=1e-5, abs=1e-7)
            checked += 1
        else:
            assert scores[writer, reader] == 0.0
    assert checked >= 10


def test_edges_are_those_of_the_wiring():
    sequential, parallel = make_model("grouped"), make_model("rotary")
    clean, corrupted = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
    for model, count in ((sequential, True), (parallel, False)):
        scores = patching.edge_attribution(model, clean, corrupted, METRIC)
        exists = dict(zip(scores.readers, scores.exists.T.tolist(), strict=True))
        assert exists["m0"][scores.writers.index("a0.h1")] is count
        assert exists["m1"][scores.writers.index("a0.h1")]
        assert not exists["a0.h0.q"][scores.writers.index("a0.h1")]
        assert all(exists["logits"])
        assert not any(exists["m0"][scores.writers.index(later)] for later in ("m0", "m1", "a1.h0"))
        assert len(scores.to_dataframe()) == int(scores.exists.sum())
        strongest = scores.top(3)
        assert abs(scores[strongest[0]]) == pytest.approx(float(scores.scores.abs().max()))


def test_padding_and_averaging():
    model = make_model("grouped")
    lengths = (6, 4)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "left"), pad_rows(rows[1], "left")
    together = patching.edge_attribution(model, clean, corrupted, METRIC, attention_mask=mask)
    alone = [patching.edge_attribution(model, rows[0][i][None], rows[1][i][None], METRIC) for i in range(2)]
    torch.testing.assert_close(together.scores, (alone[0].scores + alone[1].scores) / 2, rtol=0, atol=1e-10)


def test_averaged_gradients_add_up_to_the_whole_difference():
    """All edges into the first readers of the embeddings carry the whole change of the metric (completeness)."""
    model = make_model("shared norm")
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    scores = patching.edge_attribution(model, clean, corrupted, METRIC, method="eap-ig", steps=400)
    embed = scores.scores[scores.writers.index("embed")]
    assert float(embed.sum()) == pytest.approx(scores.clean - scores.corrupted, abs=0.02)


def test_nodes_and_refusals():
    model = make_model("capped")
    clean, corrupted = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
    with pytest.raises(InputError, match="a norm follows each branch"):
        patching.edge_attribution(model, clean, corrupted, METRIC)
    grouped = make_model("grouped")
    with unchecked(), pytest.raises(InputError, match="method='acdc'"):
        patching.edge_attribution(grouped, clean, corrupted, METRIC, method="acdc")
    cfg = grouped.cfg
    assert [str(writer) for writer in list_writers(cfg)][:6] == ["embed", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    assert [str(reader) for reader in list_readers(cfg)][4:9] == ["a0.h0.k", "a0.h1.k", "a0.h0.v", "a0.h1.v", "m0"]
    with pytest.raises(patching.SiteError, match=r"'a0\.h4' writes nothing .* 'a1\.h3'"):
        parse_writer("a0.h4", cfg)
    with pytest.raises(patching.SiteError, match="key-value heads 0 to 1"):
        parse_reader("a0.h2.k", cfg)


def chosen_greedily(scores, k, group_size):
    """The search for a connected circuit, step by step over all edges."""
    chosen = []
    while len(chosen) < k:
        nodes = {writer for writer, _ in chosen}

        def is_open(reader, nodes=nodes):
            if reader == "logits" or reader in nodes:
                return True
            layer, _, rest = reader.partition(".")
            head, _, kind = rest.partition(".")
            size = 1 if kind == "q" else group_size
            number = int(head[1:] or 0) if head else 0
            return bool(head) and any(f"{layer}.h{number * size + i}" in nodes for i in range(size))

        candidates = [edge for edge in scores.top(scores.scores.numel()) if is_open(edge[1]) and edge not in chosen]
        if not candidates:
            break
        chosen.append(candidates[0])
    return chosen


@pytest.mark.parametrize("network", ["grouped", "shared norm"])
def test_connected_circuits_grow_from_the_logits(network):
    model = make_model(network)
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    scores = patching.edge_attribution(model, clean, corrupted, METRIC)
    n_edges, group_size = int(scores.exists.sum()), model.cfg.n_heads // model.cfg.n_kv_heads
    before = patching.Circuit()
    for k in (0, 1, 2, 5, 11, 30):
        circuit = scores.circuit(k)
        assert set(circuit) == set(chosen_greedily(scores, k, group_size))
        assert len(circuit) == k
        assert before <= circuit
        before = circuit
    assert scores.circuit(10 * n_edges) == patching.Circuit.full(model.cfg)
    plain = scores.circuit(5, connected=False)
    assert plain == patching.Circuit(scores.top(5))
    with pytest.raises(InputError, match="k=-1; expected a number of edges >= 0"):
        scores.circuit(-1)
