"""The Jacobian lens against autograd's Jacobians, one entry of the last stream at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import hooklens as hl
from hooklens import edits
from hooklens.analysis.lens import JacobianLens, SwapCoordinates, lens_losses, logit_lens, read_streams
from hooklens.bundled.corpus import held_out_indirect_objects
from hooklens.bundled.words import NAMES
from hooklens.errors import CheckpointError, EditError, InputError, TransformError
from hooklens.model.decoder import Decoder
from hooklens.model.stream_reader import StreamReader
from tests.analysis.lens.corpus import make_texts
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, make_config, make_model, random_tokens


def reference(model, tokens, layer, skip_first, targets):
    """The definition: torch's own Jacobian of the whole last stream, and its blocks added up."""
    means = []
    for row in tokens:
        with torch.no_grad():
            stream = model(row[None], stop_at_layer=layer)
        whole = torch.autograd.functional.jacobian(
            lambda x: model(x, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)[0], stream
        )[:, :, 0]
        counted = range(skip_first, len(row) - 1)
        blocks = [sum(whole[later, :, at] for later in (counted if targets == "later" else [at])) for at in counted]
        means.append(sum(blocks) / len(blocks))
    return sum(means) / len(means)


@settings(max_examples=8)
@given(
    network=st.sampled_from(sorted(ALL_CONFIGS)),
    targets=st.sampled_from(["later", "same"]),
    skip_first=st.integers(0, 2),
    batch_size=st.integers(1, 14),
    seed=st.integers(0, 3),
)
def test_it_is_autograds_jacobian(network, targets, skip_first, batch_size, seed):
    model = make_model(network)
    tokens = random_tokens(2, 4, seed=seed)
    lens = JacobianLens.fit(
        model, tokens, targets=targets, skip_first=skip_first, batch_size=batch_size, progress=False
    )
    assert lens.layers == tuple(range(model.cfg.n_layers))
    for layer in lens.layers:
        # The contract's bar; the two differ by the order of sums in float64.
        expected = reference(model, tokens, layer, skip_first, targets)
        assert_close(lens.jacobians[layer], expected, rtol=0, atol=1e-8 * max(1, float(expected.abs().max())))


def test_the_cost_of_a_layer(monkeypatch):
    """At most d_model / batch backwards for a prompt, and one forward; all layers above come with it."""
    model = make_model("grouped")
    runs, backwards = [], []
    run, grad = Decoder.run, torch.autograd.grad

    def count_run(self, input, *given, **more):
        runs.append((tuple(input.shape), more.get("start_at_layer")))
        return run(self, input, *given, **more)

    monkeypatch.setattr(Decoder, "run", count_run)
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: backwards.append(1) or grad(*given, **more))
    for layers, batch_size, n_backwards in (([1], 5, 3), ([1], 12, 1), ([1], 100, 1), (None, 4, 3)):
        runs.clear()
        backwards.clear()
        lens = JacobianLens.fit(
            model, random_tokens(1, 6), layers=layers, skip_first=1, batch_size=batch_size, progress=False
        )
        first = min(lens.layers)
        assert runs == [((1, 6), None), ((min(batch_size, 12), 6, 12), first)]
        assert len(backwards) == n_backwards == -(-12 // batch_size)
        assert lens.cost == (1, n_backwards)


@pytest.fixture(scope="module")
def model():
    return make_model("learned, tied")


@pytest.fixture(scope="module")
def lens(model):
    return JacobianLens.fit(model, random_tokens(3, 6), skip_first=1, progress=False)


def test_prompts_count_alike_and_padding_does_not(model):
    """Rows of different length, padded: the mean of what each gives by itself."""
    words = hl.HookedCausalLM.from_pretrained("bundled:tiny-falcon", layers=[0, 1], dtype="float64")
    texts = ["Mary and John went", "Mary gave a drink to John and"]
    both = JacobianLens.fit(words, texts, skip_first=1, progress=False)
    alone = [JacobianLens.fit(words, [text], skip_first=1, progress=False).jacobians for text in texts]
    assert_close(both.jacobians, (alone[0] + alone[1]) / 2)


def test_parts_of_a_fit_are_the_fit(model, lens):
    prompts = random_tokens(3, 6)
    parts = [JacobianLens.fit(model, rows, skip_first=1, progress=False) for rows in (prompts[:1], prompts[1:])]
    whole = JacobianLens.merge(parts)
    assert_close(whole.jacobians, lens.jacobians)
    assert (whole.n_prompts, whole.layers, whole.targets) == (3, lens.layers, "later")
    same = JacobianLens.fit(model, prompts[:1], skip_first=1, targets="same", progress=False)
    with pytest.raises(InputError, match="lens 1 and lens 0 differ in their targets: same and later"):
        JacobianLens.merge([parts[0], same])
    other = JacobianLens.fit(make_model("learned, tied", seed=7), prompts[:1], skip_first=1, progress=False)
    with pytest.raises(InputError, match="lens 2 and lens 0 differ in their model; fit them alike"):
        JacobianLens.merge([*parts, other])
    for wrong in ([], [3], lens):
        with unchecked(), pytest.raises(InputError, match=r"lenses is .*, expected a list of JacobianLens"):
            JacobianLens.merge(wrong)


def test_the_lens_is_read_as_its_formula(model, lens):
    _, cache = model.run_with_cache(random_tokens(2, 4))
    readings = dict(read_streams(model, cache, transport=lens))
    expected = StreamReader(model).read(cache["resid_pre", 1] @ lens.jacobians[1].T)
    assert_close(readings["1_pre"], expected)
    part = JacobianLens.fit(model, random_tokens(3, 6), layers=-1, skip_first=1, progress=False)
    assert part.layers == (1,)
    assert logit_lens(model, cache, transport=part).stream.unique().tolist() == ["1_pre", "final_post"]
    assert lens_losses(model, random_tokens(2, 4), transport=part, progress=False).layer.tolist() == [1, 2]


@pytest.mark.parametrize(
    "network",
    [
        *(ALL_CONFIGS[name] for name in ("learned, tied", "capped", "grouped", "attention only")),
        make_config(d_embed=7, logits_scale=0.3),
    ],
    ids=["layer norm", "unit offset", "rms norm", "no norm", "projected, scaled"],
)
def test_directions_and_their_tokens(network):
    """The logit before cap and denominator of what the Jacobian carries to the end, by hand."""
    model = make_model(network)
    lens = JacobianLens.fit(model, random_tokens(2, 5), skip_first=1, progress=False)
    found = lens.directions(model, [3, 7], layer=1)
    stream = torch.randn(12, dtype=torch.float64)
    carried = lens.apply(stream, 1)
    norm = model.ln_final
    if norm is not None:
        centred = carried - carried.mean() if norm.norm.kind == "layer" else carried
        gain = norm.w.detach() if norm.w is not None else 1
        carried = centred * (1 + gain if norm.norm.unit_offset else gain)
    logits = carried @ model.W_U.detach() * model.cfg.logits_scale
    assert_close(found @ stream, logits[[3, 7]])
    assert_close(lens.directions(model, 3, layer=1), found[0])
    table = lens.top_tokens(model, stream, layer=1, k=4)
    assert table.token.tolist() == logits.topk(4).indices.tolist()
    assert table.value.tolist() == pytest.approx(logits.topk(4).values.tolist())
    read = lens.read_directions(model, layer=1, n_directions=2, k=3)
    _, S, V = torch.linalg.svd(lens.jacobians[1])
    assert read.singular_value.tolist() == pytest.approx(S[:2].repeat_interleave(2).tolist())
    ends = lens.top_tokens(model, V[0], layer=1, k=3).token.tolist()
    assert ends in (list(read.writes[0]), list(read.writes[1]))


@settings(max_examples=9)
@given(layers=st.sampled_from([[0], [1], None]), pos=st.sampled_from([None, -1, [0, 2]]), seed=st.integers(0, 9))
def test_a_swap_exchanges_two_coordinates_and_nothing_else(model, lens, layers, pos, seed):
    pair = torch.randperm(23, generator=torch.Generator().manual_seed(seed))[:2].tolist()
    swaps = lens.swap(model, *pair, layers=layers, pos=pos)
    assert [edit.name for edit in swaps] == [f"blocks.{layer}.hook_resid_pre" for layer in layers or [0, 1]]
    tokens = random_tokens(2, 4, seed=seed)
    layer = (layers or [0])[0]
    _, before = model.run_with_cache(tokens)
    _, after = model.run_with_cache(tokens, edits=swaps[:1])
    x, y = before["resid_pre", layer], after["resid_pre", layer]
    touched = range(4) if pos is None else [3] if pos == -1 else pos
    untouched = [place for place in range(4) if place not in touched]
    assert torch.equal(x[:, untouched], y[:, untouched])
    x, y = x[:, list(touched)], y[:, list(touched)]
    unit = lens.directions(model, pair, layer=layer)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    # By hand: the normal equations of least squares.
    solve = torch.linalg.inv(unit @ unit.T) @ unit
    assert_close(y @ solve.T, (x @ solve.T).flip(-1))
    rest = torch.eye(12, dtype=torch.float64) - unit.T @ solve
    assert_close(y @ rest, x @ rest)
    back = model.run_with_hooks(tokens, edits=[swaps[0], swaps[0]])
    assert_close(back, model(tokens))


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-falcon"])
def test_a_swap_of_names_exchanges_the_answers_of_a_trained_model(name):
    """Two names that no prompt holds, exchanged in the same way, leave the answer as it is."""
    model = hl.HookedCausalLM.from_pretrained(f"bundled:{name}")
    lens = JacobianLens.fit(model, make_texts(6, seed=1, length=32), layers=[1], progress=False)
    plain, swapped, control = [], [], []
    for item in held_out_indirect_objects(10, seed=0):
        answer, wrong = model.to_single_token(item.answer), model.to_single_token(item.wrong)
        others = [name for name in NAMES if name not in (item.answer, item.wrong)]
        for found, pair in ((plain, None), (swapped, (item.answer, item.wrong)), (control, others[:2])):
            with torch.no_grad():
                logits = model.run_with_hooks(item.prompt, edits=lens.swap(model, *pair) if pair else ())[0, -1]
            found.append(float(logits[answer] - logits[wrong]))
    plain, swapped, control = (sum(found) / len(found) for found in (plain, swapped, control))
    assert plain > 8
    assert swapped < -2
    assert control > 0.7 * plain


def test_the_model_is_as_it_was(monkeypatch):
    for fails in (False, True):
        model = make_model("rotary").train()
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        if fails:
            monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                JacobianLens.fit(model, random_tokens(1, 5), skip_first=0, progress=False)
        else:
            with torch.inference_mode():
                JacobianLens.fit(model, random_tokens(1, 5), skip_first=0, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert not model.list_hooks()


def test_save_and_load(model, lens, tmp_path):
    lens.save(tmp_path)
    again = JacobianLens.load(tmp_path, model=model)
    assert torch.equal(again.jacobians, lens.jacobians)
    assert (again.layers, again.n_prompts, again.targets, again.origin) == ((0, 1), 3, "later", lens.origin)
    assert repr(again).splitlines()[0] == "JacobianLens(layers 0-1, d_model=12, mean over 3 prompts)"
    with pytest.raises(InputError, match="fitted on other weights"):
        JacobianLens.load(tmp_path, model=make_model("learned, tied", seed=3))
    with pytest.raises(CheckpointError, match="holds a lens of kind 'JacobianLens'; expected a TunedLens"):
        hl.analysis.lens.TunedLens.load(tmp_path)


def test_another_model_is_refused(model, lens):
    folded = model.process_weights(fold_ln=True)
    stream = torch.zeros(12, dtype=torch.float64)
    for ask in (
        lambda: lens.directions(folded, 3, layer=0),
        lambda: lens.top_tokens(folded, stream, layer=0),
        lambda: lens.read_directions(folded, layer=0),
        lambda: lens.swap(folded, 1, 2),
    ):
        with pytest.raises(TransformError, match="do not belong together"):
            ask()


def test_bad_arguments(model, lens):
    with pytest.raises(InputError, match=r"2 of 2 prompts, such as number 0, have fewer than 18 tokens; the first 16"):
        JacobianLens.fit(model, random_tokens(2, 5), progress=False)
    with pytest.raises(InputError, match="targets is 'all', expected 'later' or 'same'"):
        JacobianLens.fit(model, random_tokens(2, 5), targets="all")
    with pytest.raises(InputError, match="layers"):
        JacobianLens.fit(model, random_tokens(2, 5), layers=[5])
    with pytest.raises(InputError, match="source and target are both token 3"):
        lens.swap(model, 3, 3)
    with pytest.raises(InputError, match=r"direction is a tensor \[3\].*expected floating numbers \[12\]"):
        lens.top_tokens(model, torch.zeros(3), layer=0)
    line = torch.ones(12)
    with pytest.raises(EditError, match=r"nearly\) one, so there is nothing to exchange"):
        model.run_with_hooks(random_tokens(1, 2), edits=[SwapCoordinates("resid_pre", torch.stack([line, -line]))])
    with pytest.raises(EditError, match=r"directions are \[12\]; expected \[2, 12\]"):
        model.run_with_hooks(random_tokens(1, 2), edits=[SwapCoordinates("resid_pre", line)])
    assert isinstance(lens.swap(model, 1, 2)[0], edits.Edit)
