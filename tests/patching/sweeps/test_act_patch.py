import pandas as pd
import pytest
import torch

from hooklens import get_act_name, patching
from hooklens.errors import InputError
from hooklens.patching import LogitDiff, MetricError
from tests.model.networks import make_model, random_tokens


def metric(logits):
    return (logits[:, -1, 3] - logits[:, 1, 5]).mean()


@pytest.fixture(scope="module", params=["grouped", "alibi"])
def setting(request):
    model = make_model(request.param)
    clean, corrupted = random_tokens(2, 4), random_tokens(2, 4, seed=9)
    corrupted[:, 0] = clean[:, 0]
    return model, corrupted, model.run_with_cache(clean)[1]


def one_forward(model, corrupted, cache, name, index):
    """The field's own way: one hook that writes the clean activation, one full forward."""

    def hook(tensor, hook):
        patched = tensor.clone()
        patched[(slice(None), *index)] = cache[name][(slice(None), *index)]
        return patched

    with torch.no_grad():
        return metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, hook)]))


EVERY = slice(None)
CASES = [
    ("resid_pre", "resid_pre", lambda pos: (pos,), ["pos"]),
    ("resid_mid", "resid_mid", lambda pos: (pos,), ["pos"]),
    ("attn_out", "attn_out", lambda pos: (pos,), ["pos"]),
    ("mlp_out", "mlp_out", lambda pos: (pos,), ["pos"]),
    ("attn_head_out_by_pos", "z", lambda pos, head: (pos, head), ["pos", "head"]),
    ("attn_head_q_by_pos", "q", lambda pos, head: (pos, head), ["pos", "head"]),
    ("attn_head_k_by_pos", "k", lambda pos, head: (pos, head), ["pos", "kv_head"]),
    ("attn_head_v_by_pos", "v", lambda pos, head: (pos, head), ["pos", "kv_head"]),
    ("attn_head_pattern_by_pos", "pattern", lambda head, dest: (head, dest), ["head", "pos"]),
    ("attn_head_pattern_dest_src_pos", "pattern", lambda head, dest, src: (head, dest, src), ["head", "pos", "pos"]),
    ("attn_head_out_all_pos", "z", lambda head: (EVERY, head), ["head"]),
    ("attn_head_q_all_pos", "q", lambda head: (EVERY, head), ["head"]),
    ("attn_head_k_all_pos", "k", lambda head: (EVERY, head), ["kv_head"]),
    ("attn_head_v_all_pos", "v", lambda head: (EVERY, head), ["kv_head"]),
    ("attn_head_pattern_all_pos", "pattern", lambda head: (head,), ["head"]),
]


@pytest.mark.parametrize(("name", "site", "index_of", "axes"), CASES)
def test_equals_one_forward_per_index(setting, name, site, index_of, axes):
    model, corrupted, cache = setting
    values = getattr(patching, f"get_act_patch_{name}")(model, corrupted, cache, metric)
    sizes = {"pos": 4, "head": 4, "kv_head": model.cfg.n_kv_heads}
    assert values.shape == (2, *(sizes[axis] for axis in axes))
    flat = list(torch.cartesian_prod(*(torch.arange(size) for size in values.shape)).tolist())
    for layer, *rest in flat[:: max(1, len(flat) // 5)]:
        expected = one_forward(model, corrupted, cache, get_act_name(site, layer), index_of(*rest))
        torch.testing.assert_close(values[(layer, *rest)], expected, rtol=0, atol=1e-10)


def test_the_every_forms_stack(setting):
    model, corrupted, cache = setting
    block = patching.get_act_patch_block_every(model, corrupted, cache, metric)
    assert block.shape == (3, 2, 4)
    # 1e-12: float64 sums of batches of another shape.
    attn_out = patching.get_act_patch_attn_out(model, corrupted, cache, metric)
    torch.testing.assert_close(block[1], attn_out, rtol=0, atol=1e-12)
    heads = patching.get_act_patch_attn_head_all_pos_every(model, corrupted, cache, metric)
    assert heads.shape == (5, 2, 4)
    k = patching.get_act_patch_attn_head_k_all_pos(model, corrupted, cache, metric)
    torch.testing.assert_close(heads[2, :, : k.shape[1]], k, rtol=0, atol=1e-12)
    assert not heads[2, :, k.shape[1] :].any()
    by_pos = patching.get_act_patch_attn_head_by_pos_every(model, corrupted, cache, metric)
    assert by_pos.shape == (5, 2, 4, 4)
    pattern = patching.get_act_patch_attn_head_pattern_by_pos(model, corrupted, cache, metric)
    torch.testing.assert_close(by_pos[4], pattern.transpose(1, 2), rtol=0, atol=1e-12)


def test_the_every_forms_share_one_baseline():
    """Each of the five sweeps ran both prompts anew: 32 forwards' worth of a model of 12 layers."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(1, 6), random_tokens(1, 6, seed=9)
    _, cache = model.run_with_cache(clean)
    seen = []
    run = patching.sweeps.run.run_baseline

    def count(*given, **options):
        seen.append(1)
        return run(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching.sweeps.run, "run_baseline", count)
        for every in (
            patching.get_act_patch_attn_head_all_pos_every,
            patching.get_act_patch_attn_head_by_pos_every,
            patching.get_act_patch_block_every,
        ):
            seen.clear()
            every(model, corrupted, cache, metric)
            assert len(seen) == 1


def test_generic_takes_a_setter_of_ones_own(setting):
    model, corrupted, cache = setting

    def set_pos(corrupted_activation, index, clean_activation):
        corrupted_activation[:, index[1]] = clean_activation[:, index[1]]
        return corrupted_activation

    arguments = (model, corrupted, cache, metric, set_pos, "resid_pre")
    values, table = patching.generic_activation_patch(*arguments, ("layer", "pos"), return_index_df=True)
    expected = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-6)
    assert list(table.columns) == ["layer", "pos"]
    chosen = pd.DataFrame({"layer": [1, 0], "pos": [3, 2]})
    some = patching.generic_activation_patch(*arguments, index_df=chosen)
    assert torch.equal(some, values[[1, 0], [3, 2]])
    with pytest.raises(InputError, match="either index_axis_names or index_df"):
        patching.generic_activation_patch(*arguments)


def axes_of(kind):
    """The index of a case, and the setter of this package for it."""
    _, site, _, axes = kind
    positions = iter(("dest_pos", "src_pos"))
    names = ["head" if axis == "kv_head" else axis for axis in axes]
    names = ["layer", *(next(positions) if site == "pattern" and axis == "pos" else axis for axis in names)]
    return names, patching.sweeps.patch_setters.SETTERS[site == "pattern", " ".join(names)]


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind[0])
def test_generic_is_one_sweep_with_the_setters_of_this_package(setting, kind, monkeypatch):
    """It ran the model once for each index, where the function of that name shares runs."""
    model, corrupted, cache = setting
    names, setter = axes_of(kind)
    ran = []
    one_by_one = patching.sweeps.act_patch._Setter

    def count(*given):
        ran.append(given[1])
        return one_by_one(*given)

    monkeypatch.setattr(patching.sweeps.act_patch, "_Setter", count)
    given = (model, corrupted, cache, metric, setter, kind[1])
    values, table = patching.generic_activation_patch(*given, names, return_index_df=True)
    assert not ran
    assert list(table.columns) == names
    assert values.dtype == torch.get_default_dtype()
    # Rows of a table are run one by one, whatever they are.
    expected = patching.generic_activation_patch(*given, index_df=table)
    assert len(ran) == len(table)
    torch.testing.assert_close(values.flatten(), expected, rtol=0, atol=1e-6)
    if "head" in names:
        renamed = [name.replace("head", "head_index") for name in names]
        assert torch.equal(patching.generic_activation_patch(*given, renamed), values)
        assert len(ran) == len(table)


@pytest.mark.parametrize("case", ["training", "longer clean run", "padding", "another setter's activation"])
def test_generic_runs_index_by_index_where_no_sweep_would_do(case):
    """Each is answered as one plain run for each index says."""
    model = make_model("alibi")
    clean, corrupted = random_tokens(2, 4), random_tokens(2, 4, seed=9)
    word, axes, setter, mask = "attn_out", ("layer", "pos"), patching.layer_pos_patch_setter, None
    place = (EVERY, 2)
    if case == "training":
        model.train()
    elif case == "longer clean run":
        clean = torch.cat([clean, random_tokens(2, 2)], 1)
    elif case == "padding":
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    else:
        # Of a pattern this is a query, where of queries it is a head.
        word, axes, setter = "pattern", ("layer", "head"), patching.layer_head_vector_patch_setter
        place = (EVERY, EVERY, 2)
    _, cache = model.run_with_cache(clean)
    values = patching.generic_activation_patch(model, corrupted, cache, metric, setter, word, axes, attention_mask=mask)
    name = get_act_name(word, 1)

    def patch(tensor, hook):
        patched = tensor.clone()
        patched[place] = cache[name][:, :, 2] if word == "pattern" else cache[name][:, 2]
        return patched

    with torch.no_grad():
        expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)], attention_mask=mask))
    # 1e-6: the values are of the default dtype.
    torch.testing.assert_close(values[1, 2].double(), expected, rtol=0, atol=1e-6)


def test_metrics_of_this_package_are_averaged(setting):
    model, corrupted, cache = setting
    own = patching.get_act_patch_resid_pre(model, corrupted, cache, LogitDiff(3, 5))
    theirs = patching.get_act_patch_resid_pre(
        model, corrupted, cache, lambda logits: (logits[:, -1, 3] - logits[:, -1, 5]).mean()
    )
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)
    with pytest.raises(MetricError, match="expected a single number"):
        patching.get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[:, -1, 0])


def test_generic_refuses_axes_that_are_none_and_several_numbers(setting):
    """A misspelt axis was taken for positions; a metric of two numbers ended in torch's own error."""
    model, corrupted, cache = setting
    arguments = (model, corrupted, cache, metric, patching.layer_pos_patch_setter, "resid_pre")
    with pytest.raises(InputError, match="no axis is called 'poss'"):
        patching.generic_activation_patch(*arguments, ("layer", "poss"))
    several = (*arguments[:3], lambda logits: logits[:, -1, 0], *arguments[4:])
    with pytest.raises(MetricError, match="expected a single number"):
        patching.generic_activation_patch(*several, ("layer", "pos"))


@pytest.mark.parametrize("attached", ["to the model", "in a with block"])
def test_generic_runs_with_the_hooks_that_there_are(setting, attached):
    """A hook at the stream that runs started from acted twice: in the stream kept, and at the start of each run."""
    model, corrupted, cache = setting

    def halve(tensor, hook):
        return tensor * 0.5

    def run():
        return patching.generic_activation_patch(
            model, corrupted, cache, metric, patching.layer_pos_patch_setter, "attn_out", ("layer", "pos")
        )

    name = "blocks.1.hook_resid_pre"
    if attached == "to the model":
        model.add_hook(name, halve)
        try:
            values = run()
        finally:
            model.reset_hooks()
    else:
        with model.hooks(fwd_hooks=[(name, halve)]):
            values = run()

    def patch(tensor, hook):
        return patching.layer_pos_patch_setter(tensor.clone(), (1, 2), cache["blocks.1.hook_attn_out"])

    with torch.no_grad():
        hooks = [(name, halve), ("blocks.1.hook_attn_out", patch)]
        expected = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks))
    # 1e-6: the values are of the default dtype.
    torch.testing.assert_close(values[1, 2].double(), expected, rtol=0, atol=1e-6)


def test_a_mask_of_padded_ids_is_the_callers():
    """Without one, a run of pad tokens at a row's end is padding."""
    model = make_model("alibi")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    _, cache = model.run_with_cache(clean, attention_mask=mask)

    def last_real(logits):
        return logits[0, 2, 3] + logits[1, 4, 3]

    def patch(tensor, hook):
        return patching.layer_head_vector_patch_setter(tensor.clone(), (1, 2), cache["z", 1])

    def expected(**options):
        with torch.no_grad():
            return last_real(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_z", patch)], **options))

    generic = (patching.layer_head_vector_patch_setter, "z", ("layer", "head"))
    for given in (mask, torch.ones_like(mask)):
        options = {"attention_mask": given}
        values = patching.generic_activation_patch(model, corrupted, cache, last_real, *generic, **options)
        # 1e-6: the values are of the default dtype.
        torch.testing.assert_close(values[1, 2].double(), expected(**options), rtol=0, atol=1e-6)
    ones = torch.ones_like(mask)
    values = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, last_real, attention_mask=ones)
    torch.testing.assert_close(values[1, 2], expected(attention_mask=ones), rtol=0, atol=1e-10)
