"""Activation patching against TransformerLens (the extra `bench`), which runs one full forward per cell."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hooklens import HookedCausalLM, patching
from hooklens.bundled import bundled_path
from hooklens.patching.circuits.runner import CircuitRunner
from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.models import build_pair

_ANSWER, _WRONG = 3, 5
# Many rounds where a grid takes hundredths of a second, few where it takes seconds.
_ROUNDS = {"6 layers, d_model 128": 20, "12 layers, d_model 768": 3}
_SIZES = {
    "6 layers, d_model 128": {"n_layers": 6, "d_model": 128, "n_heads": 4},
    "12 layers, d_model 768": {"n_layers": 12, "d_model": 768, "n_heads": 12},
}
_BARS = {
    ("6 layers, d_model 128", "resid_pre"): 40,
    ("6 layers, d_model 128", "z"): 18,
    ("12 layers, d_model 768", "resid_pre"): 15,
    ("12 layers, d_model 768", "z"): 10,
}
_PEER_FUNCTIONS = {"resid_pre": "get_act_patch_resid_pre", "z": "get_act_patch_attn_head_out_all_pos"}


def _peer_metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, _ANSWER] - logits[:, -1, _WRONG]).mean()


def _boot_peer(reference: Any, folder: Path) -> Any:
    """The same weights in TransformerLens, which wants a checkpoint's folder and eager attention."""
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    reference.save_pretrained(folder)
    eager = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_path("tiny-gpt-neox"))
    return bridge.TransformerBridge.boot_transformers(str(folder), hf_model=eager, tokenizer=tokenizer)


@pytest.mark.parametrize("size", _SIZES)
@torch.no_grad()
def test_grids_against_the_peer(size: str, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The (layer x position) `resid_pre` grid and the (layer x head) `z` grid of 16 tokens, all threads."""
    peer_patching = pytest.importorskip("transformer_lens.patching")
    # Its progress bar cannot be turned off, and should not be timed.
    monkeypatch.setattr(peer_patching, "tqdm", lambda rows: rows)
    reference, model = build_pair("gpt_neox", **_SIZES[size])
    peer = _boot_peer(reference, tmp_path)
    clean, corrupted = torch.randint(0, 1000, (2, 1, 16))
    _, peer_cache = peer.run_with_cache(clean)
    metric = patching.LogitDiff(_ANSWER, _WRONG)
    for site, function in _PEER_FUNCTIONS.items():

        def theirs(function: str = function) -> torch.Tensor:
            return getattr(peer_patching, function)(peer, corrupted, peer_cache, _peer_metric)

        def ours(site: str = site) -> torch.Tensor:
            return patching.sweep(model, clean, corrupted, site, metric, progress=False).values

        difference = float((theirs() - ours()).abs().max())
        record(f"sweep of {site}, {size}: largest difference to the peer", difference, at_most=1e-4)
        seconds = time_alternating({"peer": theirs, "hooklens": ours}, rounds=_ROUNDS[size], warm_up=1)
        record(
            f"sweep of {site}, {size}: speed / the peer's",
            seconds["peer"] / seconds["hooklens"],
            at_least=_BARS[size, site],
        )
        record(f"sweep of {site}, {size}: seconds", seconds["hooklens"])
        record(f"sweep of {site}, {size}: seconds of the peer", seconds["peer"])


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_work_of_five_sweeps_over_heads(name: str, record: Any) -> None:
    """What `get_act_patch_attn_head_all_pos_every` runs, in forwards of the prompt: tokens times blocks, counted."""
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    text = "When Mary and John went to the store , {} gave a drink to"
    pair = patching.Pair.from_text(model, text.format("John"), text.format("Mary"), answer=" Mary", wrong=" John")
    words, n_tokens = ("z", "q", "k", "v", "pattern"), len(pair.clean)

    def run(sites: Any) -> float:
        result = patching.sweep(model, pair, sites=sites, metric=patching.LogitDiff(), progress=False)
        return result.stats.tokens / n_tokens

    record(f"five sweeps over heads of {name}: forwards' worth", run(list(words)), at_most=20)
    record(f"the same one after another, {name}: forwards' worth", sum(map(run, words)))


@torch.no_grad()
def test_cost_per_cell_falls_as_the_grid_grows(record: Any) -> None:
    """`resid_pre` and `z` over 1, 2, 4, ... cells of one layer: seconds per cell over those of one cell."""
    _, model = build_pair("gpt_neox", **_SIZES["6 layers, d_model 128"])
    clean, corrupted = torch.randint(0, 1000, (2, 1, 16))
    for cells in (1, 4, 16, 64):
        _time_cells(model, clean, corrupted, cells)
    costs = {cells: _time_cells(model, clean, corrupted, cells) / cells for cells in (1, 4, 16, 64)}
    for few, many in ((1, 4), (4, 16), (16, 64)):
        record(f"sweep of z by position: cost per cell, {many} cells / {few}", costs[many] / costs[few], at_most=1.0)


def _time_cells(model: HookedCausalLM, clean: torch.Tensor, corrupted: torch.Tensor, cells: int) -> float:
    """Seconds of a grid of so many cells in the third layer."""
    heads, positions = min(cells, 4), max(1, cells // 4)
    grid = patching.grid("z", layers=2, heads=range(heads), positions=range(positions))
    metric = patching.LogitDiff(_ANSWER, _WRONG)
    fastest = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        patching.sweep(model, clean, corrupted, grid, metric, progress=False)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


_SENTENCES = {
    "they differ late": "When Mary and John went to the store , {} gave a drink to",
    "they differ at once": "{} and John went to the store , and John gave a drink to",
}
_RECEIVERS = {"the logits": ["logits"], "queries": ["a3.h0.q"], "keys and values": ["a3.h0.k", "a3.h0.v"]}
# In sequential blocks each of 16 senders has an MLP of its own input at every position in each layer that it passes:
# 24 passes of an MLP, or 4.1 forwards' worth beside the two unpatched runs, are the least that is exact.
_PATH_BARS = {("tiny-llama", "they differ at once", "keys and values"): 7.5}


def _pair_of(model: HookedCausalLM, sentence: str) -> patching.Pair:
    prompts = sentence.format("John"), sentence.format("Mary")
    return patching.Pair.from_text(model, *prompts, answer=" Mary", wrong=" John")


@pytest.mark.parametrize("sentence", _SENTENCES)
@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_work_of_path_patching(name: str, sentence: str, record: Any) -> None:
    """16 senders, all heads of four layers, through MLPs and past them, in forwards of the prompt."""
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    pair = _pair_of(model, _SENTENCES[sentence])
    senders = [f"a{layer}.h{head}" for layer in range(4) for head in range(4)]
    for receivers, listed in _RECEIVERS.items():
        for through_mlps in (True, False):
            stats = patching.path_patch(
                model, pair, senders=senders, receivers=listed, metric=patching.LogitDiff(), through_mlps=through_mlps,
                progress=False,
            ).stats  # fmt: skip
            record(
                f"16 senders to {receivers}, {'through' if through_mlps else 'past'} MLPs, prompts: {sentence}, {name}",
                stats.tokens / len(pair.clean),
                at_most=_PATH_BARS.get((name, sentence, receivers), 5) if through_mlps else 5,
            )


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_work_of_circuit_discovery(name: str, record: Any) -> None:
    """Forwards of the prompts for each edge that is decided by a run; with all pairs at once, and in groups of two."""
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    one = _pair_of(model, _SENTENCES["they differ late"])
    for pairs, batch_size in ((1, "auto"), (8, "auto"), (8, 32)):
        found = patching.discover_circuit(
            model,
            [one] * pairs,
            metric=patching.LogitDiff(),
            threshold=0.5,
            holdout=0,
            batch_size=batch_size,
            progress=False,
        ).stats
        record(
            f"circuit discovery, {pairs} pairs, batch_size={batch_size}, {name}: forwards' worth a decision",
            found.tokens / (pairs * len(one.clean)) / (found.decided - found.unreachable),
            at_most=0.3,
        )


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_work_of_circuit_discovery_in_little_memory(name: str, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where eight pairs go in four groups, of which one is held and the others are run anew for each batch."""
    monkeypatch.setattr(CircuitRunner, "_pairs_per_group", lambda self: 2)
    monkeypatch.setattr(CircuitRunner, "rows_per_batch", lambda self, ground: 64)
    monkeypatch.setattr(CircuitRunner, "grounds_to_hold", lambda self, ground, n_circuits: 1)
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    couples = [("Mary", "John"), ("Anna", "Paul"), ("Alice", "Tom"), ("Sarah", "James")]
    pairs = [
        patching.Pair.from_text(
            model,
            *(f"When {one} and {other} went to the store , {who} gave a drink to" for who in (other, one)),
            answer=f" {one}",
            wrong=f" {other}",
        )
        for one, other in [*couples, *(couple[::-1] for couple in couples)]
    ]
    for threshold in (0.05, 0.5):
        found = patching.discover_circuit(
            model, pairs, metric=patching.LogitDiff(), threshold=threshold, holdout=0, progress=False
        ).stats
        record(
            f"circuit discovery in groups, threshold {threshold}, {name}: forwards' worth a decision",
            found.tokens / sum(len(pair.clean) for pair in pairs) / (found.decided - found.unreachable),
            at_most=0.3,
        )


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_work_of_estimates(name: str, record: Any) -> None:
    """Forwards of the prompt, those with a backward pass among them, whatever the number of cells or edges."""
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    pair = _pair_of(model, _SENTENCES["they differ late"])
    metric, n_tokens = patching.LogitDiff(), len(pair.clean)
    found = patching.attribution(model, pair, sites=["resid_pre", "z", "mlp_out"], metric=metric, progress=False)
    record(f"attribution of three grids, {name}: forwards' worth", found.stats.tokens / n_tokens, at_most=3)
    for method, bar in (("eap", 3), ("eap-ig-inputs", 7), ("clean-corrupted", 4)):
        scores = patching.edge_attribution(model, pair, metric=metric, method=method, progress=False)
        record(f"edge attribution, {method}, {name}: forwards' worth", scores.tokens / n_tokens, at_most=bar)
    exact = patching.edge_attribution(model, pair, metric=metric, method="exact", progress=False)
    record(f"exact edge scores, {name}: forwards' worth an edge", exact.tokens / n_tokens / int(exact.exists.sum()))
