import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching import SiteError
from hooklens.patching.circuits.ablation import ablated_outputs, check_ablation, written_names
from hooklens.patching.pairs.prompts import read_pairs
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(5, 6, seed=1), random_tokens(5, 6, seed=2)
PROMPTS = read_pairs(MODEL, CLEAN, CORRUPTED)


@torch.no_grad()
def outputs(tokens):
    _, cache = MODEL.run_with_cache(tokens, names_filter=written_names(MODEL))
    return dict(cache)


def test_names():
    assert written_names(MODEL) == [
        "blocks.0.hook_resid_pre",
        "blocks.0.attn.hook_result",
        "blocks.0.hook_mlp_out",
        "blocks.1.attn.hook_result",
        "blocks.1.hook_mlp_out",
    ]


@torch.no_grad()
def test_what_is_put_in():
    pairs = [1, 3]
    own, other = outputs(CLEAN[pairs]), outputs(CORRUPTED)

    def ablate(ablation, *, like=own):
        return ablated_outputs(ablation, like=like, pairs=pairs, prompts=PROMPTS)

    for name in own:
        assert not ablate("zero")[name].any()
        assert torch.equal(ablate(other)[name], other[name][pairs])
        means = {key: value.mean(0) for key, value in other.items()}
        assert torch.equal(ablate(means)[name], means[name].expand_as(own[name]))
        single = {key: value[:1] for key, value in other.items()}
        assert torch.equal(ablate(single)[name], other[name][:1].expand_as(own[name]))
        # A group of pairs that are shorter than the longest of all.
        short = {key: value[:, :4] for key, value in own.items()}
        assert torch.equal(ablate(means, like=short)[name], means[name][:4].expand_as(short[name]))
    other["blocks.1.hook_mlp_out"] = torch.zeros(3, 6, 12)
    with pytest.raises(SiteError, match=r"'blocks\.1\.hook_mlp_out' has 3 rows; expected 1 or 5"):
        ablate(other)


def test_refusals():
    with unchecked(), pytest.raises(InputError, match="ablation is 'noise'; expected 'resample', 'mean', 'zero'"):
        check_ablation(MODEL, PROMPTS, "noise")
    with pytest.raises(SiteError, match=r"no outputs for 'blocks\.0\.attn\.hook_result', .* and of all heads"):
        check_ablation(MODEL, PROMPTS, {"blocks.0.hook_resid_pre": torch.zeros(12)})
    rows, mask = pad_rows([CLEAN[0], CLEAN[1, :4]], "right")
    with pytest.raises(InputError, match=r"'mean' averages position by position .* between 4 and 6 tokens"):
        check_ablation(MODEL, read_pairs(MODEL, rows, rows, mask), "mean")
