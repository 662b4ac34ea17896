"""FusionBench's numbers, bit for bit: against what version 0.2.33 gave, recorded in `data/fusionbench.safetensors`.

The file holds state dicts of a small module with a tied weight (`head.weight` is `embed.weight`), a base
(`float32/model-0/...`) and four models near it, and of each method what that library made of them, in float32 and in
bfloat16; where entries are dropped, after `torch.manual_seed(7)`.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM
from hooklens.errors import InputError
from hooklens.weights import merging
from hooklens.weights.merging.kinds import shared_names
from tests.merged_models import build_models, save_models
from tests.torch_version import draws_bfloat16_anew

RECORDED = load_file(Path(__file__).parent / "data" / "fusionbench.safetensors")
N_MODELS = 4


def state_of(dtype: str, case: str) -> dict[str, torch.Tensor]:
    prefix = f"{dtype}/{case}/"
    state = {name.removeprefix(prefix): one for name, one in RECORDED.items() if name.startswith(prefix)}
    # In the module's order, which files do not keep.
    state = {name: state[name] for name in ("embed.weight", "second.weight", "second.bias", "first.weight")}
    return {**state, "head.weight": state["embed.weight"]}


merge_as_there = partial(partial, compat="fusionbench")
CASES = {
    "average": lambda base, models: merging.simple_average(models, compat="fusionbench"),
    "task": merge_as_there(merging.task_arithmetic),
    "dare-average": merge_as_there(merging.dare, then="simple_average", seed=7),
    "dare-task": merge_as_there(merging.dare, sparsity=0.7, seed=7),
    "dare-plain": merge_as_there(merging.dare, rescale=False, seed=7),
    "dare-ties": merge_as_there(merging.dare, then="ties_merging", seed=7),
    "ties-sum-20": merge_as_there(merging.ties_merging),
    "ties-sum-65": merge_as_there(merging.ties_merging, density=0.65),
    "ties-mean-20": merge_as_there(merging.ties_merging, agreement="mean"),
    "ties-mean-65": merge_as_there(merging.ties_merging, agreement="mean", density=0.65),
    "ties-max-20": merge_as_there(merging.ties_merging, agreement="max"),
    "ties-max-65": merge_as_there(merging.ties_merging, agreement="max", density=0.65),
}


def test_all_that_was_recorded_is_tested():
    assert {name.split("/")[1] for name in RECORDED} == {*CASES, *(f"model-{i}" for i in range(1 + N_MODELS))}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=draws_bfloat16_anew if "dare" in case and dtype == "bfloat16" else ())
        for case in CASES
        for dtype in ("float32", "bfloat16")
    ],
)
def test_it_gives_that_library_s_numbers(dtype, case):
    """Its defaults, too: 0.3, a fifth, the sum. The signs of zeros are compared with all other bits."""
    base, *models = (state_of(dtype, f"model-{i}") for i in range(1 + N_MODELS))
    found, expected = CASES[case](base, models), state_of(dtype, case)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_it_keeps_one_entry_more_and_counts_a_tied_weight_twice():
    """What differs from the exact merge: of 20 entries, 12 of them a tied weight's, int(0.2 * 32) + 1 stay, not 4."""
    base = {"a": torch.zeros(12), "b": torch.zeros(8)}
    base["c"] = base["a"]
    model = {"a": torch.arange(1.0, 13.0), "b": torch.arange(13.0, 21.0)}
    model["c"] = model["a"]
    theirs = merging.ties_merging(base, [model], density=0.2, scaling_factor=1.0, compat="fusionbench")
    assert sum(int((theirs[name] != 0).sum()) for name in "abc") == int(0.2 * 32) + 1
    ours = merging.ties_merging(base, [model], density=0.2, scaling_factor=1.0)
    assert sum(int((ours[name] != 0).sum()) for name in "ab") == int(0.2 * 20)


def test_folders_and_hooked_models_merge_as_the_state_dicts_of_transformers(tmp_path):
    models = build_models("gpt2", 4, dtype=torch.float32)
    folders = save_models(models, tmp_path / "given")
    base, *states = (model.state_dict() for model in models)
    assert shared_names(base)
    for number, options in enumerate(({}, {"agreement": "max"})):
        expected = merging.ties_merging(base, states, **options, compat="fusionbench")
        out = merging.ties_merging(folders[0], folders[1:], **options, out=tmp_path / str(number), compat="fusionbench")
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())
        hooked = [HookedCausalLM.from_hf(model) for model in models]
        merged = merging.ties_merging(hooked[0], hooked[1:], **options, compat="fusionbench").to_hf().state_dict()
        assert all(torch.equal(tensor, merged[name]) for name, tensor in expected.items())
        # The models themselves stay as they are.
        assert torch.equal(hooked[0].W_E, base["transformer.wte.weight"])
    assert (tmp_path / "0" / "tokenizer.json").exists()
    assert HookedCausalLM.from_pretrained(tmp_path / "0").generation_config["max_new_tokens"] == 7


def test_dare_draws_alike_for_folders(tmp_path):
    models = build_models("llama", 2, dtype=torch.float32)
    folders = save_models(models, tmp_path / "given")
    base, *states = (model.state_dict() for model in models)
    expected = merging.dare(base, states, then="ties_merging", seed=5, compat="fusionbench")
    before = torch.random.get_rng_state()
    merging.dare(folders[0], folders[1:], then="ties_merging", seed=5, compat="fusionbench", out=tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_what_fails_there_is_refused():
    """A threshold of 100, and of 1, which it takes for all, not for one in a hundred."""
    base, *models = (state_of("float32", f"model-{i}") for i in range(3))
    for merge in (merging.ties_merging, partial(merging.dare, then="ties_merging")):
        with pytest.raises(InputError, match=r"density is 1.0 with compat='fusionbench', which fails where all"):
            merge(base, models, density=1, compat="fusionbench")
    with pytest.raises(InputError, match="compat is 'mergekit'"):
        merging.simple_average(models, compat="mergekit")
    with pytest.raises(InputError, match="sparsity is 1, expected a number from 0 to below 1"):
        merging.dare(base, models, sparsity=1, compat="fusionbench")


def test_whole_numbers_are_kept():
    base, *models = ({**state_of("float32", f"model-{i}"), "steps": torch.tensor([3, 4])} for i in range(3))
    for name, merge in CASES.items():
        assert torch.equal(merge(base, models)["steps"], torch.tensor([3, 4])), name


def test_models_are_brought_to_another_dtype_before():
    """As that library loads them; what is dropped at random is one tensor under both names of a tied weight."""
    base, *models = (state_of("float32", f"model-{i}") for i in range(1 + N_MODELS))
    half = [{name: one.bfloat16() for name, one in state.items()} for state in (base, *models)]
    for state in half:
        state["head.weight"] = state["embed.weight"]
    merge = CASES["dare-ties"]
    merged, expected = merge(base, models, dtype="bfloat16"), merge(half[0], half[1:])
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
