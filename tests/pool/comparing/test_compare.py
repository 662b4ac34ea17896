import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from hooklens import HookedCausalLM
from hooklens.errors import HookNameError, InputError, TransformError
from hooklens.pool.comparing.compare import compare_models
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, pad_rows, random_tokens
from tests.pool.comparing.test_measures import align, published_hsic, unbiased_hsic
from tests.text_models import make_text_model
from tests.tokens.kinds import make_tokenizer
from tests.word_models import make_word_model

LENGTHS = (5, 3, 7, 4)
PROMPTS = ["the cat sat on the mat", "the mats sat", "the cat sat on the cat"]


def rows_of_ids():
    return [random_tokens(1, n, seed=n)[0] for n in LENGTHS]


def padded(side="right"):
    return pad_rows(rows_of_ids(), side)


def vectors_one_by_one(model, name, pos=slice(None)):
    """The activations of each prompt, run by itself."""
    found = [model.run_with_cache(row[None], names_filter=name)[1][name][0, pos] for row in rows_of_ids()]
    return torch.cat([one.flatten(1) for one in found])


def lens(model, stream):
    """The last stream's way through the model, hooks and all."""
    return model(stream[None], start_at_layer=model.cfg.n_layers)[0].log_softmax(-1)


def measure_plainly(first, second, name, pos=slice(None)):
    x, y = vectors_one_by_one(first, name, pos), vectors_one_by_one(second, name, pos)
    found = {
        "cosine": float(F.cosine_similarity(x, y).mean()),
        "relative_norm": float(((y - x).norm(dim=1) / x.norm(dim=1)).mean()),
        "cka": align(unbiased_hsic, x, y),
        "biased_cka": align(published_hsic, x, y),
    }
    if "resid" in name:
        p, q = lens(first, x), lens(second, y)
        found["kl"] = float((p.exp() * (p - q)).sum(1).mean().detach())
    return found


@pytest.mark.parametrize("network", ["grouped", "learned, tied", "capped", "latent attention"])
@pytest.mark.parametrize("site", ["resid_post", "z", "mlp_out"])
def test_every_measure_is_what_plain_torch_gives(network, site):
    models = {"one": make_model(network), "two": make_model(network, seed=1)}
    measures = ["cosine", "relative_norm", "cka", "biased_cka", *(["kl"] if site == "resid_post" else [])]
    ids, mask = padded()
    result = compare_models(
        models, ids, attention_mask=mask, site=site, measures=measures, batch_size=3, progress=False
    )
    assert len(result.frame) == 2
    for _, line in result.frame.iterrows():
        expected = measure_plainly(models["one"], models["two"], line["site"])
        # Float64 rounding through two layers, and through a sum of fourth powers for the alignment.
        assert {name: line[name] for name in measures} == pytest.approx(
            {name: expected[name] for name in measures}, rel=1e-8
        )


@pytest.mark.parametrize("pos", [-1, slice(1, None), [0, 2]])
def test_positions_count_over_each_prompts_own_tokens(pos):
    models = {"one": make_model("grouped"), "two": make_model("grouped", seed=1)}
    chosen = [pos] if isinstance(pos, int) else pos
    expected = measure_plainly(models["one"], models["two"], "blocks.1.hook_resid_post", chosen)
    for side in ("left", "right"):
        ids, mask = padded(side)
        result = compare_models(models, ids, attention_mask=mask, pos=pos, progress=False)
        line = result.frame.iloc[1]
        assert {"cosine": line["cosine"], "kl": line["kl"]} == pytest.approx(
            {"cosine": expected["cosine"], "kl": expected["kl"]}, rel=1e-8
        )
        assert result.n_tokens == sum(len(row[chosen]) for row in rows_of_ids())


def test_the_number_of_prompts_run_at_once_changes_nothing():
    models = {"one": make_model("alibi"), "two": make_model("alibi", seed=1)}
    ids, mask = padded()
    tables = [
        compare_models(models, ids, attention_mask=mask, batch_size=size, progress=False).frame for size in (1, 2, 9)
    ]
    for table in tables[1:]:
        numbers = table.select_dtypes("float")
        assert numbers.to_numpy() == pytest.approx(tables[0].select_dtypes("float").to_numpy(), rel=1e-10)


def test_a_model_is_no_way_from_a_copy_of_itself():
    models = {"one": make_model("grouped"), "two": make_model("grouped")}
    line = compare_models(models, random_tokens(3, 6), progress=False).frame.iloc[0]
    found = {name: line[name] for name in ("cosine", "relative_norm", "kl", "cka", "weight_relative_norm")}
    assert found == pytest.approx(
        {"cosine": 1, "relative_norm": 0, "kl": 0, "cka": 1, "weight_relative_norm": 0}, abs=1e-12
    )


def test_each_pair_or_each_with_the_base():
    models = {name: make_model("grouped", seed=seed) for seed, name in enumerate("abc")}
    ids = random_tokens(2, 5)

    def pairs(**options):
        frame = compare_models(models, ids, progress=False, **options).frame
        return list(dict.fromkeys(zip(frame["first"], frame["second"], strict=True)))

    assert pairs() == [("a", "b"), ("a", "c")]
    assert pairs(base="b") == [("b", "a"), ("b", "c")]
    assert pairs(every_pair=True) == [("a", "b"), ("a", "c"), ("b", "c")]
    every = compare_models(models, ids, every_pair=True, progress=False)
    alone = compare_models({"b": models["b"], "c": models["c"]}, ids, progress=False)
    assert every.frame.iloc[-1]["kl"] == pytest.approx(alone.frame.iloc[-1]["kl"], rel=1e-12)
    assert every.weights.iloc[-1]["cosine"] == pytest.approx(alone.weights.iloc[-1]["cosine"], rel=1e-12)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("base", [None, "0"])
def test_models_that_are_loaded_one_by_one_are_let_go_of(weights, base):
    """The loop's own variable kept each model while the next one was loaded: two in memory in place of one."""
    alive, most = weakref.WeakSet(), []
    # What there is before is not looked through each time.
    gc.collect()
    gc.freeze()

    def load():
        for seed in range(4):
            gc.collect()
            most.append(len(alive))
            model = make_model("grouped", seed=seed)
            alive.add(model)
            yield str(seed), model
            del model

    try:
        result = compare_models(load(), random_tokens(2, 5), base=base, weights=weights, progress=False)
    finally:
        gc.unfreeze()
    # The base stays where its weights are compared.
    assert most == [0, *[1 if weights else 0] * 3]
    assert result.names == ("0", "1", "2", "3")
    assert (result.weights is None) is not weights


def test_models_of_other_widths_are_compared_by_what_does_not_need_the_same():
    cfg = make_config(d_model=20)
    models = {"narrow": make_model("learned, tied"), "wide": make_model(cfg)}
    result = compare_models(models, random_tokens(3, 6), progress=False)
    line = result.frame.iloc[1]
    assert math.isnan(line["cosine"])
    assert math.isnan(line["relative_norm"])
    assert math.isnan(line["weight_cosine"])
    x, y = (
        torch.cat([row.flatten(1) for row in model.run_with_cache(random_tokens(3, 6))[1]["resid_post", 1]])
        for model in models.values()
    )
    assert line["cka"] == pytest.approx(align(unbiased_hsic, x, y), rel=1e-8)
    assert line["kl"] > 0


def test_activations_may_be_kept_in_a_narrower_dtype():
    models = {"one": make_model("grouped"), "two": make_model("grouped", seed=1)}
    ids = random_tokens(3, 6)
    exact = compare_models(models, ids, progress=False).frame.iloc[0]
    short = compare_models(models, ids, dtype=torch.bfloat16, progress=False).frame.iloc[0]
    # Eight bits of each number.
    assert short["cosine"] == pytest.approx(exact["cosine"], abs=1e-2)
    assert short["cosine"] != exact["cosine"]


def test_a_site_outside_the_blocks_and_one_without_streams():
    models = {"one": make_model("grouped"), "two": make_model("grouped", seed=1)}
    ids = random_tokens(3, 6)
    once = compare_models(models, ids, site="ln_final.hook_normalized", progress=False)
    assert once.frame["layer"].isna().all()
    assert "kl" not in once.frame
    with pytest.raises(InputError, match="measure 'kl' reads the residual stream"):
        compare_models(models, ids, site="z", measures="kl", progress=False)
    with pytest.raises(InputError, match="no vector for each token"):
        compare_models(models, ids, site="pattern", progress=False)
    with pytest.raises(HookNameError, match="resid_psot"):
        compare_models(models, ids, site="resid_psot", progress=False)


def test_text_is_read_once_and_alike():
    tokenizer = make_tokenizer("byte-level BPE", "none")
    one, two = make_text_model(tokenizer), make_text_model(tokenizer)
    two.initialize(seed=1)
    two.double()
    result = compare_models({"one": one, "two": two}, PROMPTS, progress=False)
    ids, mask = one.to_tokens(PROMPTS, return_attention_mask=True)
    same = compare_models({"one": one, "two": two}, ids, attention_mask=mask, progress=False)
    assert result.frame.equals(same.frame)
    assert result.n_prompts == len(PROMPTS)
    assert repr(result).splitlines()[:3] == [
        "ModelComparison of one, two",
        "  pairs    1, at 2 hook points",
        f"  prompts  {len(PROMPTS)}, {result.n_tokens} tokens",
    ]


def test_tokenizers_that_differ_are_refused_for_text_alone():
    one = make_text_model(make_tokenizer("byte-level BPE", "none"))
    begins = make_text_model(make_tokenizer("byte-level BPE", "BOS"))
    with pytest.raises(InputError, match=r"'one' and 'two' read prompt 0 as different tokens.*give token ids"):
        compare_models({"one": one, "two": begins}, PROMPTS, progress=False)
    silent = make_text_model(make_tokenizer("byte-level BPE", "none"))
    silent.tokenizer = None
    with pytest.raises(InputError, match="model 'two' has no tokenizer"):
        compare_models({"one": one, "two": silent}, PROMPTS, progress=False)
    ids = one.to_tokens(PROMPTS[0])
    assert len(compare_models({"one": one, "two": begins, "three": silent}, ids, progress=False).frame) == 4


def test_what_cannot_be_compared_is_refused_before_anything_runs(monkeypatch):
    one, ids = make_model("grouped"), random_tokens(2, 5)
    deep = make_model(make_config(n_layers=3))
    word = make_word_model(d_model=16, n_ctx=32, init_std=0.1)
    processed = make_model("grouped").process_weights(fold_ln=True)
    monkeypatch.setattr(HookedCausalLM, "run_with_cache", lambda *arguments, **keywords: pytest.fail("it ran"))

    def refused(models, match, error=InputError, **options):
        with unchecked(), pytest.raises(error, match=match):
            compare_models(models, ids, progress=False, **options)

    refused({"one": one}, r"models: \['one'\]; expected at least two")
    refused({}, "models: none; expected at least two")
    refused({"one": one, "two": deep}, r"'one' has no 'blocks.2.hook_resid_post', which 'two' has")
    refused({"deep": deep, "two": one}, r"'two' has no 'blocks.2.hook_resid_post', which 'deep' has")
    refused({"one": one, "two": processed}, "models 'one' .first. and 'two' .second.", TransformError)
    refused({"one": one, "two": word}, r"base is 'three'; the models are \['one', 'two'\]", base="three")
    refused({"one": one, "two": "gpt2"}, r"models\['two'\] is 'gpt2', expected a HookedCausalLM")
    refused([one, one], "models: an entry is a HookedCausalLM, expected a name and a HookedCausalLM")
    refused(one, "models is a HookedCausalLM, expected models by name")
    refused({"one": one, "two": one}, "measures is 'cosin'", measures=["cosin"])
    refused({"one": one, "two": one}, "batch_size is 0", batch_size=0)
    refused({"one": one, "two": one}, "pos: 5 out of range", pos=5)


def test_models_one_by_one_are_refused_as_they_come():
    one, ids = make_model("grouped"), random_tokens(2, 5)
    with pytest.raises(InputError, match="the name 'one' comes twice"):
        compare_models([("one", one), ("one", one)], ids, progress=False)
    with pytest.raises(InputError, match="base is 'two', but the models begin with 'one'"):
        compare_models([("one", one), ("two", one)], ids, base="two", progress=False)
    with pytest.raises(InputError, match="expected at least two"):
        compare_models(iter([("one", one)]), ids, progress=False)


def test_dropout_is_refused():
    dropping = make_model(make_config(resid_dropout=0.1)).train()
    with pytest.raises(InputError, match=r"model 'two' is in training mode with dropout.*eval\(\)"):
        compare_models({"one": make_model("grouped"), "two": dropping}, random_tokens(2, 5), progress=False)
