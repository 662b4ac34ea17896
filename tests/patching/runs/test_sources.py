import pytest
import torch

from hooklens import patching
from hooklens.errors import HookNameError, InputError
from hooklens.patching import LogitDiff, SiteError
from tests.model.networks import make_model, random_tokens

METRIC = LogitDiff(3, 5)


def activations(model, tokens, name):
    return model.run_with_cache(tokens, names_filter=name)[1][name]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_means_are_those_of_the_activations(batch_size):
    model = make_model("grouped")
    tokens = random_tokens(7, 5, seed=1)
    means = patching.mean_activations(model, tokens, ["z", patching.grid("pattern")], batch_size=batch_size)
    assert sorted(means) == sorted(
        f"blocks.{layer}.attn.hook_{word}" for layer in range(2) for word in ("z", "pattern")
    )
    for name, mean in means.items():
        # float64 sums in another order.
        torch.testing.assert_close(mean, activations(model, tokens, name).mean(0, keepdim=True), rtol=0, atol=1e-14)


def test_one_mean_for_all_positions_counts_every_token_once():
    model = make_model("rotary")
    short, long = random_tokens(2, 3, seed=1), random_tokens(1, 6, seed=2)
    padded = torch.nn.functional.pad(short, (0, 3))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[:2, 3:] = 0
    tokens = torch.cat([padded, long])
    means = patching.mean_activations(model, tokens, "resid_pre", each_position=False, attention_mask=mask)
    for name, mean in means.items():
        rows = torch.cat([activations(model, one, name).flatten(0, 1) for one in (short, long)])
        torch.testing.assert_close(mean, rows.mean(0)[None, None], rtol=0, atol=1e-14)


def test_a_sweep_puts_the_mean_in():
    model = make_model("alibi")
    data, clean, corrupted = random_tokens(5, 4, seed=1), random_tokens(2, 4, seed=2), random_tokens(2, 4, seed=3)
    source = patching.mean_activations(model, data, "z")
    result = patching.sweep(model, clean, corrupted, "z", METRIC, source=source, progress=False)
    name = "blocks.1.attn.hook_z"
    mean = activations(model, data, name).mean(0)

    def put_in(tensor, hook):
        tensor = tensor.clone()
        tensor[:, :, 2] = mean[:, 2]
        return tensor

    expected = METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(name, put_in)]))
    torch.testing.assert_close(result.per_pair[1, 2], expected, rtol=0, atol=1e-10)


def test_drawn_examples_are_rows_of_the_data():
    model = make_model("grouped")
    data = random_tokens(4, 5, seed=1)
    drawn = patching.draw_activations(model, data, "v", n_pairs=6, seed=3, batch_size=4)
    name = "blocks.0.attn.hook_v"
    rows = activations(model, data, name)
    picks = [next(i for i, row in enumerate(rows) if torch.allclose(row, one, atol=1e-12)) for one in drawn[name]]
    # All four once before any comes twice.
    assert sorted(picks[:4]) == [0, 1, 2, 3]
    assert len(set(picks[4:])) == 2
    again = patching.draw_activations(model, data, "v", n_pairs=6, seed=3)
    torch.testing.assert_close(again[name], drawn[name], rtol=0, atol=1e-12)
    other = patching.draw_activations(model, data, "v", n_pairs=4, seed=4)
    assert not torch.equal(other[name], drawn[name][:4])
    clean, corrupted = random_tokens(6, 5, seed=5), random_tokens(6, 5, seed=6)
    result = patching.sweep(
        model, clean, corrupted, patching.grid("v", heads="all"), METRIC, source=drawn, progress=False
    )
    hooks = [(name, lambda tensor, hook: drawn[name])]
    expected = METRIC(model.run_with_hooks(corrupted, fwd_hooks=hooks))
    torch.testing.assert_close(result.per_pair[0], expected, rtol=0, atol=1e-10)


def test_bad_input_is_refused():
    model = make_model("grouped")
    tokens, ragged = random_tokens(2, 5, seed=1), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(InputError, match=r"\[2, 3\] tokens, so their positions do not mean the same"):
        patching.mean_activations(model, tokens[:, :3], "z", attention_mask=ragged)
    with pytest.raises(InputError, match="do not mean the same"):
        patching.draw_activations(model, tokens[:, :3], "z", n_pairs=1, seed=0, attention_mask=ragged)
    with pytest.raises(SiteError, match=r"blocks\.0\.attn\.hook_pattern.*positions themselves"):
        patching.mean_activations(model, tokens, "pattern", each_position=False)
    with pytest.raises(HookNameError, match="resid_pre"):
        patching.mean_activations(model, tokens, "resid_per")
    with pytest.raises(InputError, match="batch_size is 0"):
        patching.mean_activations(model, tokens, "z", batch_size=0)
    with pytest.raises(InputError, match="n_pairs is 0"):
        patching.draw_activations(model, tokens, "z", n_pairs=0, seed=0)
