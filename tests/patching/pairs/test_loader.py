import gc
import weakref
from itertools import product

import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import InputError
from hooklens.patching import KL, LogitDiff, Pair, SiteError, SweepInterruptedError
from hooklens.patching.pairs.loader import read_source
from tests.annotations import unchecked
from tests.checkpoints import D_VOCAB, build_variant
from tests.model.networks import make_model, random_tokens
from tests.patching.naive import patch_naively
from tests.patching.variants import variants
from tests.slow_cases import slow_but

LENGTHS = (6, 4, 5, 6, 3)
ANSWERS = ([3, 4], [5], [6, 7, 8], [9], [1, 2])


def ragged_pairs(d_vocab=23):
    """Pairs of different length, with answers of different number."""
    rows = [random_tokens(2, n, seed=i, d_vocab=d_vocab) for i, n in enumerate(LENGTHS)]
    return [Pair(row[0], row[1], answer=answer, wrong=0) for row, answer in zip(rows, ANSWERS, strict=True)]


def padded(pairs):
    clean, corrupted, mask = patching.stack_pairs(pairs)
    return {
        "clean": clean,
        "corrupted": corrupted,
        "attention_mask": mask,
        "answer": [pair.answer for pair in pairs],
        "wrong": [pair.wrong for pair in pairs],
    }


FORMS = {
    "pairs": iter,
    "lists": lambda pairs: (pairs[i : i + 2] for i in range(0, len(pairs), 2)),
    "mappings": lambda pairs: [padded(pairs[:3]), padded(pairs[3:])],
    "list of pairs": lambda pairs: pairs,
}


@pytest.mark.parametrize(
    ("group", "form"),
    slow_but(product([1, 2, 100], FORMS), [*((2, form) for form in FORMS), (1, "pairs"), (100, "mappings")]),
)
def test_pairs_in_every_form_equal_each_pair_alone(group, form, monkeypatch):
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: group)
    model = make_model("grouped")
    pairs = ragged_pairs()
    metric = LogitDiff(over="logsumexp")
    sites = [patching.grid("resid_pre", positions=[-1, 1]), patching.grid("pattern", positions=-1, sources=-2)]
    result = patching.sweep(model, FORMS[form](pairs), sites=sites, metric=metric, progress=False)
    assert result.stats.pairs == len(pairs)
    assert result.stats.naive_forwards == (result.stats.cells + 2) * len(pairs)
    assert result.stats.naive_tokens == (result.stats.cells + 2) * sum(LENGTHS)
    for number, pair in enumerate(pairs):
        alone = patching.sweep(model, pair, sites=sites, metric=metric, progress=False)
        # 1e-10: float64 rounding through two layers.
        torch.testing.assert_close(result.per_pair[..., number], alone.per_pair[..., 0], rtol=0, atol=1e-10)
        torch.testing.assert_close(result.clean_per_pair[number], alone.clean_per_pair[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", variants())
def test_loaders_of_ragged_pairs_equal_one_forward_per_cell_in_every_wiring(variant):
    over = "mean" if len(variant) % 2 else "logsumexp"
    model = HookedCausalLM.from_hf(build_variant(variant, dtype=torch.float64))
    pairs = ragged_pairs(D_VOCAB)
    sites = [patching.grid(word, positions=[-1, 1]) for word in ("resid_pre", "z", "v", "mlp_out")]
    result = patching.sweep(model, iter(pairs), sites=sites, metric=LogitDiff(over=over), progress=False)
    for index in range(0, len(result.cells), 11):
        cell = result.cells[index]
        for number, pair in enumerate(pairs):
            metric = LogitDiff([pair.answer], pair.wrong, over=over)
            expected = patch_naively(model, pair.clean[None], pair.corrupted[None], cell, metric)
            torch.testing.assert_close(result.per_pair[index, [number]], expected, rtol=0, atol=1e-9)


def test_texts_and_torchs_own_loader():
    model = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    texts = [("Mary gave a drink to John", "John gave a drink to Mary")] * 3
    sites = patching.grid("z", layers=-1)
    result = patching.sweep(model, texts, sites=sites, metric=LogitDiff(" Mary", " John"), progress=False)
    expected = patching.sweep(model, *texts[0], sites, LogitDiff(" Mary", " John"), progress=False)
    torch.testing.assert_close(result.values, expected.values, rtol=0, atol=1e-6)
    clean, corrupted = model.to_tokens([texts[0][0]] * 4), model.to_tokens([texts[0][1]] * 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(clean, corrupted), batch_size=3)
    result = patching.sweep(model, loader, sites=sites, metric=KL(), progress=False)
    assert result.stats.pairs == 4
    expected = patching.sweep(model, *texts[0], sites, KL(), progress=False)
    torch.testing.assert_close(result.values, expected.values, rtol=0, atol=1e-6)


def test_no_more_pairs_are_in_memory_than_a_group(monkeypatch):
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: 2)
    model = make_model("grouped")
    alive, most = weakref.WeakSet(), 0

    def loader():
        nonlocal most
        for number in range(12):
            tokens = random_tokens(2, 5, seed=number)
            pair = Pair(tokens[0], tokens[1])
            alive.add(pair)
            yield pair
            del pair, tokens
            gc.collect()
            most = max(most, len(alive))

    result = patching.sweep(model, loader(), sites="z", metric=KL(), progress=False)
    assert result.stats.pairs == 12
    assert most <= 2


def test_positions_of_each_token_need_prompts_of_one_length(monkeypatch):
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: 1)
    model = make_model("grouped")
    pairs = ragged_pairs()
    with pytest.raises(
        SweepInterruptedError, match=r"pairs 1 \(4\) have other numbers of tokens than the first, 6"
    ) as caught:
        patching.sweep(model, [pairs[:1], pairs[1:]], sites="resid_pre", metric=LogitDiff(), progress=False)
    assert caught.value.result.per_pair.shape[-1] == 1
    same = [pairs[0], pairs[3]]
    result = patching.sweep(model, iter(same), sites="resid_pre", metric=LogitDiff(), progress=False)
    assert result.axes["pos"] == tuple(range(6))


def test_refusals():
    model = make_model("grouped")
    pairs = ragged_pairs()
    tokens = pairs[0].clean[None]

    def refuse(match, clean, *, metric=None, error=InputError, **options):
        with unchecked(), pytest.raises(error, match=match):
            patching.sweep(
                model, clean, sites="z", metric=LogitDiff() if metric is None else metric, progress=False, **options
            )

    refuse("the corrupted prompts are missing", tokens)
    refuse("the corrupted prompts are missing", "Mary gave")
    refuse("the corrupted prompts are missing", [1, 2, 3])
    refuse("the corrupted prompts are missing", None)
    refuse("the loader of pairs gives nothing", iter([]))
    refuse("batch 0 of the loader: it is 3; expected a Pair", iter([3]))
    refuse(
        r"batch 0 of the loader: keys \['mask'\] are unknown, \['corrupted'\] missing", iter([{"clean": 1, "mask": 2}])
    )
    refuse("batch 0 of the loader: 1 clean prompts and 2 corrupted", iter([(tokens, tokens.repeat(2, 1))]))
    refuse("answers of 2 pairs, but the pairs come from a loader", iter(pairs), metric=LogitDiff([1, 2], 3))
    refuse(
        "sees all pairs at once, so it cannot go through a loader", iter(pairs), metric=lambda logits: logits[:, 0, 0]
    )
    refuse(
        "reference has 2 rows, but the pairs come from a loader", iter(pairs), metric=KL(reference=torch.ones(2, 1, 23))
    )
    refuse("answer is not given, and the pairs bring none along", Pair(tokens[0], tokens[0]))
    refuse(r"Pair: answer is missing in pairs \[1\]", [pairs[0], Pair(tokens[0], tokens[0], wrong=0)])
    refuse("a loader gives it with each batch", iter(pairs), attention_mask=torch.ones(1, 6))
    refuse("a Pair has no padding", pairs, attention_mask=torch.ones(1, 6))
    refuse("has 5 rows; expected 1, since pairs come one after another", iter(pairs), error=SiteError,
           source={f"blocks.{i}.attn.hook_z": torch.zeros(5, 6, 4, 3) for i in range(2)})  # fmt: skip
    with pytest.raises(InputError, match="sites and metric missing"):
        patching.sweep(model, pairs)
    with unchecked(), pytest.raises(InputError, match="Pair: wrong is"):
        Pair(tokens[0], tokens[0], wrong=True)


def test_a_failing_loader_keeps_what_was_measured(monkeypatch):
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: 100)
    model = make_model("grouped")
    pairs = ragged_pairs()

    def loader():
        yield pairs[:1] * 400
        raise OSError("the disk is gone")

    source = read_source(model, loader())
    assert (source.n_pairs, len(source.at_hand)) == (None, 400)
    with pytest.raises(SweepInterruptedError, match=r"stopped after 400 values \(OSError: the disk is gone\)"):
        patching.sweep(model, loader(), sites=patching.grid("z", layers=0, heads=0), metric=LogitDiff(), progress=False)
