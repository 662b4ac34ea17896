from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from hooklens import patching
from hooklens.errors import CheckpointError, InputError
from hooklens.files import write_safetensors
from hooklens.patching import LogProb
from hooklens.patching.estimates import edge_gradients
from hooklens.patching.graph.nodes import list_readers, list_writers, parse_reader, parse_writer
from tests.annotations import unchecked
from tests.model.networks import Allocations, make_config, make_model, pad_rows, random_tokens
from tests.patching.estimates import published

METRIC = LogProb(4)
WIRINGS = ["grouped", "rotary", "shared norm", "alibi, grouped", "learned, tied", "bare", "attention only"]
WIRINGS += ["heads and MLPs apart", "latent attention"]


def assert_scores(found, table, atol):
    edges = [(w, r) for w, row in enumerate(found.exists.tolist()) for r, is_edge in enumerate(row) if is_edge]
    assert {(found.writers[w], found.readers[r]) for w, r in edges} == set(table)
    for w, r in edges:
        expected = table[found.writers[w], found.readers[r]]
        torch.testing.assert_close(found.per_pair[w, r], expected, rtol=0, atol=atol)
    assert bool((found.per_pair[~found.exists] == 0).all())


METHODS = [
    ({"method": "eap", "rules": "gradient"}, published.eap),
    ({"method": "eap-ig-inputs", "steps": 3}, partial(published.eap_ig_inputs, weights=[1 / 3, 2 / 3, 1.0])),
    ({"method": "eap-ig", "steps": 2, "rule": "left"}, partial(published.eap_ig_inputs, weights=[0.0, 0.5])),
    ({"method": "eap-ig", "steps": 2, "rule": "midpoint"}, partial(published.eap_ig_inputs, weights=[0.25, 0.75])),
    ({"method": "eap-ig-activations", "steps": 2}, partial(published.eap_ig_activations, weights=[0.5, 1.0])),
    ({"method": "clean-corrupted", "rules": []}, published.clean_corrupted),
    ({"method": "exact"}, published.exact),
]
# One gradient is taken in every network; methods that take it at other points, and patches, see these kinds.
TRIED_WITH_ALL = {"eap": WIRINGS, "exact": ["grouped", "shared norm", *WIRINGS[-2:]]}
TRIED_OTHERWISE = ["grouped", "heads and MLPs apart"]


def methods_and_networks():
    for (options, reference), network in product(METHODS, WIRINGS):
        is_tried = network in TRIED_WITH_ALL.get(options["method"], TRIED_OTHERWISE)
        name = "-".join([*map(str, options.values()), network])
        yield pytest.param(network, options, reference, id=name, marks=() if is_tried else pytest.mark.slow)


@pytest.mark.parametrize(("network", "options", "reference"), list(methods_and_networks()))
def test_scores_are_the_published_ones(network, options, reference):
    """The default was the corrupted run's gradient, and integrated gradients took midpoints, under the papers' names.

    In float64; the sums have some hundred terms below 100, so 1e-10 is a hundred times their rounding.
    """
    model = make_model(network)
    clean, corrupted = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
    found = patching.edge_attribution(model, clean, corrupted, METRIC, progress=False, **options)
    assert_scores(found, reference(model, clean, corrupted, METRIC), atol=1e-10)
    assert found.method == options["method"]
    parts = patching.edge_attribution(model, clean, corrupted, METRIC, batch_size=2, progress=False, **options)
    torch.testing.assert_close(parts.per_pair, found.per_pair, rtol=0, atol=1e-10)


def test_the_other_direction():
    """Between two runs the same points are taken whichever is patched, so that only the sign changes."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    options = {"progress": False}
    denoise = patching.edge_attribution(model, clean, corrupted, METRIC, direction="denoise", **options)
    swapped = patching.edge_attribution(model, corrupted, clean, METRIC, **options)
    torch.testing.assert_close(denoise.per_pair, swapped.per_pair, rtol=0, atol=1e-12)
    for method in ("eap-ig-inputs", "clean-corrupted"):
        noise = patching.edge_attribution(model, clean, corrupted, METRIC, method=method, **options)
        back = patching.edge_attribution(model, clean, corrupted, METRIC, method=method, direction="denoise", **options)
        torch.testing.assert_close(back.per_pair, -noise.per_pair, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="exchange the prompts to patch the other run"):
        patching.edge_attribution(model, clean, corrupted, METRIC, method="exact", direction="denoise")


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
    scores = patching.edge_attribution(model, clean, corrupted, METRIC, method="eap-ig", steps=50, rule="midpoint")
    embed = scores.scores[scores.writers.index("embed")]
    assert float(embed.sum()) == pytest.approx(scores.corrupted - scores.clean, abs=0.02)


def test_nodes_and_refusals():
    model = make_model("capped")
    clean, corrupted = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
    with pytest.raises(InputError, match="a norm follows each branch"):
        patching.edge_attribution(model, clean, corrupted, METRIC)
    grouped = make_model("grouped")
    for wrong in ({"method": "acdc"}, {"rule": "upper"}, {"direction": "both"}, {"steps": 0}, {"batch_size": 0}):
        with unchecked(), pytest.raises(InputError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}"):
            patching.edge_attribution(grouped, clean, corrupted, METRIC, **wrong)
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
    with pytest.raises(InputError, match="k is -1, expected a whole number >= 0"):
        scores.circuit(-1)


def test_stopped_on_the_way(monkeypatch):
    model = make_model("grouped")
    clean, corrupted = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
    whole = patching.edge_attribution(model, clean, corrupted, METRIC, progress=False)
    run, calls = edge_gradients.EdgeGradients.run, []

    def stop(self, group):
        calls.append(group)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, group)

    monkeypatch.setattr(edge_gradients.EdgeGradients, "run", stop)
    with pytest.raises(patching.SweepInterruptedError, match="edge attribution stopped after") as caught:
        patching.edge_attribution(model, clean, corrupted, METRIC, batch_size=1, progress=False)
    found = caught.value.result
    torch.testing.assert_close(found.per_pair[..., :2], whole.per_pair[..., :2], rtol=0, atol=1e-12)
    assert bool(found.per_pair[found.exists][:, 2].isnan().all())
    torch.testing.assert_close(found.scores, whole.per_pair[..., :2].mean(-1), rtol=0, atol=1e-12)
    assert found.clean == pytest.approx(float(whole.clean_per_pair[:2].mean()))


def test_values_of_pairs_are_kept_and_saved(tmp_path):
    model = make_model("rotary")
    clean, corrupted = random_tokens(4, 5, seed=1), random_tokens(4, 5, seed=2)
    scores = patching.edge_attribution(model, clean, corrupted, METRIC, progress=False)
    edge = scores.writers.index("a0.h1"), scores.readers.index("logits")
    values = scores.per_pair[edge]
    assert scores["a0.h1", "logits"] == pytest.approx(float(values.mean()))
    assert float(scores.standard_errors[edge]) == pytest.approx(float(values.std()) / 2)
    table = scores.to_dataframe().set_index(["writer", "reader"])
    assert table.loc[("a0.h1", "logits"), "standard_error"] == pytest.approx(float(values.std()) / 2)
    one = patching.edge_attribution(model, clean[:1], corrupted[:1], METRIC, progress=False)
    assert bool(one.standard_errors.isnan().all())
    assert list(one.to_dataframe().columns) == ["writer", "reader", "score"]
    with pytest.raises(patching.SiteError, match=r"no edge 'a9.h0' -> 'logits': \['a9.h0'\] is no node here"):
        scores["a9.h0", "logits"]

    scores.save(tmp_path / "scores.safetensors")
    loaded = patching.EdgeScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.per_pair, scores.per_pair)
    assert loaded.top(5) == scores.top(5)
    for name in ("writers", "readers", "metric", "method", "direction", "forwards", "tokens", "clean", "corrupted"):
        assert getattr(loaded, name) == getattr(scores, name)


def test_damaged_files_are_refused(tmp_path):
    model = make_model("rotary")
    scores = patching.edge_attribution(model, random_tokens(1, 4), random_tokens(1, 4, seed=3), METRIC, progress=False)
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    whole = path.read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="cannot read edge scores from"):
            patching.EdgeScores.load(path)
    tensors = {"per_pair": torch.zeros(2)}
    for metadata, message in (
        ({"format": "other"}, "does not hold edge scores; expected a file that EdgeScores.save wrote"),
        ({"format": "hooklens.patching.edge-scores-1"}, "is damaged: key 'description' is no JSON"),
        ({"format": "hooklens.patching.edge-scores-1", "description": "[]"}, "key 'description' is .*a mapping"),
        ({"format": "hooklens.patching.edge-scores-1", "description": "[" * 10**5}, "key 'description' is no JSON"),
    ):
        write_safetensors(path, tensors, metadata)
        with pytest.raises(CheckpointError, match=message):
            patching.EdgeScores.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "key 'direction' is 'both', expected 'denoise' or 'noise'"),
        ({"clean_per_pair": torch.zeros(3)}, r"key 'clean_per_pair' is a tensor \[3\] .*, expected \[1\]"),
        ({"writers": ("embed",)}, "key 'per_pair' is a tensor .*; key 'exists' is a tensor"),
    ],
)
def test_scores_that_do_not_go_together_are_refused(tmp_path, change, message):
    """They loaded, and were wrong later or not at all."""
    model = make_model("rotary")
    scores = patching.edge_attribution(model, random_tokens(1, 4), random_tokens(1, 4, seed=3), METRIC, progress=False)
    with unchecked():
        replace(scores, **change).save(tmp_path / "scores.safetensors")
    with unchecked(), pytest.raises(CheckpointError, match=message):
        patching.EdgeScores.load(tmp_path / "scores.safetensors")


def test_no_graph_holds_the_stream_once_for_each_head():
    """Memory was writers x pairs x positions x d_model: here nothing has a copy for more than one layer's nodes."""
    model = make_model(make_config(n_layers=6, d_model=64, n_heads=4, d_head=16))
    n_pairs, width = 3, 7
    with Allocations() as allocations:
        patching.edge_attribution(
            model, random_tokens(n_pairs, width), random_tokens(n_pairs, width, seed=3), METRIC, progress=False
        )
    tokens = n_pairs * width * model.cfg.d_model
    # The three readers of each of a layer's heads, and nothing of all layers.
    assert max(torch.Size(shape).numel() for _, shape in allocations.sizes) == 3 * model.cfg.n_heads * tokens
