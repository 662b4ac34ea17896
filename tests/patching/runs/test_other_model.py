"""Another model as the source of activations, against one full forward per cell."""

from itertools import product

import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError, TransformError
from hooklens.patching import KL, LogitDiff, LogProb
from hooklens.patching.errors import SiteError
from tests.annotations import unchecked
from tests.model.networks import PARTIAL_CONFIGS, make_config, make_model, random_tokens
from tests.patching.naive import cell_index
from tests.slow_cases import slow_but
from tests.text_models import make_text_model
from tests.tokens.kinds import make_tokenizer

METRIC = LogitDiff(3, 5)
SITES = ("resid_pre", "z", "pattern", "mlp_out", "k", "resid_post")


@torch.no_grad()
def patch_from(model, other, from_tokens, into_tokens, cell, metric):
    """The metric with one cell's activation of another model, all rows in full."""
    name = cell["site"]
    _, cache = other.run_with_cache(from_tokens, names_filter=name)
    index = cell_index(cell, name)

    def replace(tensor, hook):
        patched = tensor.clone()
        patched[index] = cache[name][index]
        return patched

    return metric(model.run_with_hooks(into_tokens, fwd_hooks=[(name, replace)]))


@pytest.mark.parametrize(
    ("network", "direction"),
    slow_but(
        product(["grouped", "shared norm", "capped", "latent attention"], ["denoise", "noise"]),
        [("grouped", "denoise"), ("shared norm", "noise"), ("capped", "denoise"), ("latent attention", "noise")],
    ),
)
def test_every_cell_equals_one_full_forward(network, direction):
    model, other = make_model(network), make_model(network, seed=1)
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=2)
    from_tokens, into_tokens = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    for site in SITES:
        result = patching.sweep(
            model, clean, corrupted, patching.grid(site, positions="each"), METRIC, source=other, direction=direction,
            progress=False,
        )  # fmt: skip
        values = result.per_pair.reshape(-1, 2)
        for number in range(0, len(values), 7):
            expected = patch_from(model, other, from_tokens, into_tokens, result.cells[number], METRIC)
            # Float64 rounding through two layers.
            assert values[number].tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-11)
        # The ends of the scale: the run that was patched, and the other model's.
        assert result.base_per_pair.tolist() == pytest.approx(METRIC(model(into_tokens)).tolist(), rel=1e-9)
        assert result.source_per_pair.tolist() == pytest.approx(METRIC(other(from_tokens)).tolist(), rel=1e-9)


def test_the_same_prompts_in_both_models():
    """The usual question: which activation of a fine-tune makes its base do as it does."""
    base, tuned = make_model("grouped"), make_model("grouped", seed=1)
    ids = random_tokens(3, 5)
    result = patching.sweep(base, ids, ids, patching.grid("resid_post", positions="all"), METRIC, source=tuned,
                            progress=False)  # fmt: skip
    # All positions behind the last block: the base's own unembedding reads the tuned stream.
    with torch.no_grad():
        stream = tuned(ids, stop_at_layer=2)
        expected = METRIC(base(stream, start_at_layer=2))
    assert result.per_pair[-1].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert result.normalized.shape == (2,)
    assert result.stats.forwards >= 3


def test_the_model_itself_is_the_other_run():
    model = make_model("alibi")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=2)
    for direction in ("denoise", "noise"):
        options = {"progress": False, "direction": direction}
        own = patching.sweep(model, clean, corrupted, ["resid_pre", "z"], METRIC, source=model, **options)
        other = patching.sweep(model, clean, corrupted, ["resid_pre", "z"], METRIC, **options)
        torch.testing.assert_close(own.per_pair, other.per_pair, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own.clean_per_pair, other.clean_per_pair, rtol=1e-10, atol=1e-12)


def test_prompts_of_different_length_and_one_group_after_another():
    model, other = make_model("grouped"), make_model("grouped", seed=1)
    rows = [random_tokens(1, n, seed=n) for n in (5, 3, 6)]
    mask = torch.stack([(torch.arange(6) < row.shape[1]).long() for row in rows])
    ids = torch.cat([torch.nn.functional.pad(row, (0, 6 - row.shape[1])) for row in rows])
    site = patching.grid("resid_pre", positions=-1)
    found = patching.sweep(model, ids, ids, site, METRIC, source=other, attention_mask=mask, progress=False)
    loader = [{"clean": row, "corrupted": row} for row in rows]
    grouped = patching.sweep(model, loader, sites=site, metric=METRIC, source=other, progress=False)
    for number, row in enumerate(rows):
        cell = {"site": "blocks.1.hook_resid_pre", "pos": -1, "head": None, "source": None}
        expected = patch_from(model, other, row, row, cell, METRIC).tolist()
        for result in (found, grouped):
            assert result.per_pair[1, 0, number].tolist() == pytest.approx(expected[0], rel=1e-9)


def test_metrics_of_runs_take_the_other_models_run_as_the_clean_one():
    base, tuned = make_model("grouped"), make_model("grouped", seed=1)
    ids = random_tokens(2, 5)
    result = patching.sweep(base, ids, ids, "resid_post", KL(), source=tuned, progress=False)
    with torch.no_grad():
        p, q = tuned(ids)[:, -1].log_softmax(-1), base(ids)[:, -1].log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert result.corrupted_per_pair.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert result.clean_per_pair.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_models_may_differ_where_nothing_is_put_in():
    """Another depth, and other heads: the stream has one shape all the same."""
    model, deep = make_model("grouped"), make_model(make_config(n_layers=3, n_heads=2))
    ids = random_tokens(2, 5)
    result = patching.sweep(
        model, ids, ids, patching.grid("resid_pre", positions=2), LogProb(3), source=deep, progress=False
    )
    cell = {"site": "blocks.1.hook_resid_pre", "pos": 2, "head": None, "source": None}
    expected = patch_from(model, deep, ids, ids, cell, LogProb(3))
    assert result.per_pair[1, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert result.clean_per_pair.tolist() == pytest.approx(LogProb(3)(deep(ids)).tolist(), rel=1e-9)


def test_the_functions_by_their_old_names_take_the_cache_of_another_model():
    model, other = make_model("grouped"), make_model("grouped", seed=1)
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=2)
    _, cache = other.run_with_cache(clean)
    found = patching.get_act_patch_resid_pre(model, corrupted, cache, METRIC)
    expected = patching.sweep(model, clean, corrupted, "resid_pre", METRIC, source=other, progress=False)
    torch.testing.assert_close(found, expected.values, rtol=1e-9, atol=1e-11)


def test_shapes_that_differ_are_all_named_before_anything_runs(monkeypatch):
    """Activations of another shape were to fail in the middle of a sweep, or to be broadcast."""
    model, ids = make_model("grouped"), random_tokens(2, 5)
    narrow = make_model(make_config(n_kv_heads=1, d_head=6, norm=model.cfg.norm))
    gappy = make_model(PARTIAL_CONFIGS["layers that lack parts"])
    processed = make_model("grouped").process_weights(fold_ln=True)
    other_vocab = make_model(make_config(d_vocab=29))
    monkeypatch.setattr(type(model), "run", lambda *arguments, **keywords: pytest.fail("it ran"))

    def refused(error, match, source, sites="k"):
        with unchecked(), pytest.raises(error, match=match):
            patching.sweep(model, ids, ids, sites, METRIC, source=source, progress=False)

    refused(
        SiteError,
        r"'blocks.0.attn.hook_k' is \[batch pos 2 6\] here, and there \[batch pos 1 6\]; 'blocks.1.attn.hook_k' is",
        narrow,
    )
    refused(SiteError, r"'blocks.0.attn.hook_z' is \[batch pos 4 6\] here, and there absent", gappy, "z")
    refused(InputError, "predicts 29 outputs and the one that is patched 23", other_vocab, "resid_pre")
    refused(TransformError, "source .first. and the model .second.", processed, "resid_pre")
    refused(SiteError, "source is 'them'; expected 'other', 'zero', tensors by hook name, or another model", "them")
    refused(InputError, r"the model is in training mode; call eval\(\) of it", make_model("grouped").train())


def test_tokens_that_mean_something_else_to_the_other_model_are_refused():
    one, other = (make_text_model(make_tokenizer("byte-level BPE")) for _ in range(2))
    other.tokenizer = make_tokenizer("Metaspace always")
    texts = ("the cat sat on the mat", "the mat sat on the cat")
    with pytest.raises(InputError, match="the tokenizers of the model and the source differ: id"):
        patching.sweep(one, *texts, "resid_pre", METRIC, source=other, progress=False)
