"""An autoencoder at a hook point: what goes on, what listeners see and change, gradients, and the promises."""

import threading
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM, edits
from hooklens.errors import HookNameError, InputError
from hooklens.sae import SAE, SAEConfig, SAETraining, attribute_latents, sweep_latents

IDS = torch.tensor([[0, 27, 99, 12, 5, 40], [0, 31, 7, 100, 64, 2]])
PLACE = "blocks.1.hook_resid_post"
ACTS = f"{PLACE}.hook_sae_acts"
PLACES = (PLACE, "blocks.0.hook_mlp_out", "blocks.2.attn.hook_z", "blocks.1.ln2.hook_normalized")


@cache
def model() -> HookedCausalLM:
    return HookedCausalLM.from_pretrained("bundled:tiny-llama").requires_grad_(False)


def make(place: str = PLACE, architecture: str = "jumprelu", **more: Any) -> SAE:
    sae = SAE(SAEConfig(d_in=128, d_sae=200, architecture=architecture, training=SAETraining(hook_name=place, **more)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if name == "threshold":
                parameter.abs_()
    return sae.requires_grad_(False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gradients", [False, True])
def test_kept_error_changes_no_bit(place: str, *, gradients: bool) -> None:
    """With nobody there, with a capture of everything, and with a hook that leaves what it sees."""
    splice, expected = make(place).at(), model()(IDS)
    with torch.set_grad_enabled(gradients):
        if gradients:
            splice.sae.requires_grad_()
        assert torch.equal(model().run_with_hooks(IDS, splices=[splice]), expected)
        logits, seen = model().run_with_cache(IDS, names_filter=f"{place}.*", splices=[splice])
        assert torch.equal(logits, expected)
        assert set(seen) == set(splice.points)
        acts = f"{place}.hook_sae_acts"
        assert torch.equal(
            model().run_with_hooks(IDS, fwd_hooks=[(acts, lambda x, hook: None)], splices=[splice]), expected
        )
        with model().hooks(splices=[splice]):
            assert torch.equal(model()(IDS), expected)
    assert torch.equal(model()(IDS), expected)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_seen(place: str) -> None:
    sae = make(place)
    _, plain = model().run_with_cache(IDS, names_filter=place)
    _, seen = model().run_with_cache(IDS, names_filter=[f"{place}.*", place], splices=[sae.at()])
    x = plain[place].flatten(2)
    assert torch.equal(seen[f"{place}.hook_sae_input"], x)
    torch.testing.assert_close(seen[f"{place}.hook_sae_acts"], sae.encode(x))
    torch.testing.assert_close(seen[f"{place}.hook_sae_recons"], sae(x))
    torch.testing.assert_close(seen[f"{place}.hook_sae_error"], x - sae(x))
    assert torch.equal(seen[f"{place}.hook_sae_output"], x)
    assert torch.equal(seen[place], plain[place])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_edits_of_latents(place: str, error: Any) -> None:
    """What goes on is the formula, written with plain hooks at the place itself."""
    sae = make(place)

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        flat = x.flatten(2)
        acts = sae.encode(flat)
        left = acts.clone()
        left[:, -1, :] = 0
        left[..., 3] += 2
        out = sae.decode(left) + (flat - sae.decode(acts) if error == "keep" else 0)
        return out.view_as(x)

    def edit(acts: Tensor) -> Tensor:
        return acts + 2 * torch.nn.functional.one_hot(torch.tensor(3), 200)

    name = f"{place}.hook_sae_acts"
    expected = model().run_with_hooks(IDS, fwd_hooks=[(place, by_hand)])
    found = model().run_with_hooks(
        IDS, edits=[edits.Zero(name, pos=-1), edits.Custom(name, edit)], splices=[sae.at(error=error)]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(found, model()(IDS))


@pytest.mark.parametrize("word", ["input", "acts_pre", "acts", "recons", "error", "output"])
def test_every_point_is_alive(word: str) -> None:
    found = model().run_with_hooks(
        IDS, fwd_hooks=[(f"{PLACE}.hook_sae_{word}", lambda x, hook: x * 1.5)], splices=[make().at()]
    )
    assert not torch.allclose(found, model()(IDS), atol=1e-3)


def test_an_edit_of_one_row_leaves_the_others_bits() -> None:
    expected = model()(IDS)
    found = model().run_with_hooks(IDS, edits=[edits.Zero(ACTS, rows=[1])], splices=[make().at()])
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


def test_gradients_flow_through_the_latents() -> None:
    """The error is a constant: the gradient at a latent is that of the formula, by autograd."""
    sae = make()
    seen: dict[str, Tensor] = {}
    loss = model().run_with_hooks(
        IDS, return_type="loss", bwd_hooks=[(ACTS, lambda g, hook: seen.__setitem__(hook.name, g))], splices=[sae.at()]
    )
    loss.backward()
    stream = model()(IDS, stop_at_layer=2)
    acts = sae.encode(stream).requires_grad_()
    out = sae.decode(acts) + (stream - sae.decode(acts)).detach()
    expected = model().run_with_hooks(IDS, return_type="loss", fwd_hooks=[(PLACE, lambda x, hook: out)])
    [gradient] = torch.autograd.grad(expected, acts)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen[ACTS], gradient, atol=1e-6, rtol=1e-3)
    _, cache = model().run_with_cache(IDS, return_type="loss", incl_bwd=True, names_filter=ACTS, splices=[sae.at()])
    torch.testing.assert_close(cache[f"{ACTS}_grad"], gradient, atol=1e-6, rtol=1e-3)


def test_names_are_there_only_while_it_listens() -> None:
    splice = make().at()
    with pytest.raises(HookNameError, match="hook_sae_acts"):
        model().run_with_cache(IDS, names_filter=ACTS)
    with model().hooks(splices=[splice]):
        assert ACTS in model().run_with_cache(IDS, names_filter=ACTS)[1]
        assert ACTS in model().run_with_cache(IDS, names_filter="sae_acts")[1]
        assert not any("sae" in name for name in model().run_with_cache(IDS)[1])
    with pytest.raises(HookNameError):
        model().run_with_cache(IDS, names_filter=ACTS)
    assert not any("sae" in name for name in model().hook_points())


def test_threads_have_their_own() -> None:
    """Two threads put different autoencoders at one place of one model."""
    found: dict[str, Tensor] = {}
    barrier = threading.Barrier(2)

    def run(architecture: str) -> None:
        with torch.no_grad(), model().hooks(splices=[make(architecture=architecture).at(error="drop")]):
            for _ in range(5):
                barrier.wait()
                found[architecture] = model()(IDS)

    threads = [threading.Thread(target=run, args=(kind,)) for kind in ("jumprelu", "standard")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind, logits in found.items():
        alone = model().run_with_hooks(IDS, splices=[make(architecture=kind).at(error="drop")])
        assert torch.equal(logits, alone)
    assert not torch.equal(found["jumprelu"], found["standard"])


def test_several_at_once_and_nested() -> None:
    first, second = make().at(error="drop"), make("blocks.0.hook_mlp_out").at(error="drop")
    together = model().run_with_hooks(IDS, splices=[first, second])
    with model().hooks(splices=[second]):
        assert torch.equal(model().run_with_hooks(IDS, splices=[first]), together)
    with pytest.raises(InputError, match="two of them have points called"):
        model().run_with_hooks(IDS, splices=[first, make().at()])


def test_caches_padding_and_generation() -> None:
    """A frozen prefix and steps equal the whole, and padding changes no row, with latents edited."""
    splice, edit = make().at(), edits.Scale(ACTS, 1.3)
    whole = model().run_with_hooks(IDS, edits=[edit], splices=[splice])
    with model().hooks(edits=[edit], splices=[splice]):
        prefix = model().prefill(IDS[:1, :3])
        torch.testing.assert_close(model()(IDS[:1, 3:], past_kv_cache=prefix), whole[:1, 3:], atol=1e-4, rtol=1e-4)
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[:, :2] = 0
        padded = model()(torch.nn.functional.pad(IDS, (2, 0)), attention_mask=mask)
        torch.testing.assert_close(padded[:, 2:], whole, atol=1e-4, rtol=1e-4)
        out = model().generate("When Mary", max_new_tokens=4, do_sample=False, verbose=False)
        assert out == model().generate(
            "When Mary", max_new_tokens=4, do_sample=False, verbose=False, use_past_kv_cache=False
        )


def test_a_transcoder_takes_a_layers_place() -> None:
    read, given = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    training = SAETraining(hook_name=read, hook_name_out=given)
    sae = SAE(SAEConfig(d_in=128, d_sae=50, d_out=128, training=training)).requires_grad_(False)
    _, plain = model().run_with_cache(IDS, names_filter=[read, given])
    out = sae(plain[read])
    expected = model().run_with_hooks(IDS, fwd_hooks=[(given, lambda x, hook: out)])
    torch.testing.assert_close(model().run_with_hooks(IDS, splices=[sae.at(error="drop")]), expected)
    assert torch.equal(model().run_with_hooks(IDS, splices=[sae.at(error="keep")]), model()(IDS))
    _, seen = model().run_with_cache(IDS, names_filter=f"{given}.*", splices=[sae.at()])
    assert torch.equal(seen[f"{given}.hook_sae_input"], plain[read])
    torch.testing.assert_close(seen[f"{given}.hook_sae_error"], plain[given] - out)


def test_one_head() -> None:
    place = "blocks.2.attn.hook_z"
    sae = SAE(SAEConfig(d_in=32, d_sae=20, training=SAETraining(hook_name=place, head=1))).requires_grad_(False)

    def by_hand(z: Tensor, hook: Any) -> Tensor:
        left = z.clone()
        left[:, :, 1] = sae(z[:, :, 1])
        return left

    expected = model().run_with_hooks(IDS, fwd_hooks=[(place, by_hand)])
    torch.testing.assert_close(model().run_with_hooks(IDS, splices=[sae.at(error="drop")]), expected)


def test_half_precision() -> None:
    half = HookedCausalLM.from_pretrained("bundled:tiny-llama", dtype="bfloat16")
    expected = half(IDS)
    logits, seen = half.run_with_cache(IDS, names_filter=ACTS, splices=[make().at()])
    assert torch.equal(logits, expected)
    assert seen[ACTS].dtype is torch.float32
    assert half.run_with_hooks(IDS, splices=[make().at(error="drop")]).dtype is torch.bfloat16


def test_a_model_that_does_not_fit_is_refused() -> None:
    narrow = SAE(SAEConfig(d_in=64, d_sae=3, training=SAETraining(hook_name=PLACE)))
    with pytest.raises(InputError, match=r"reads vectors of width 64, and 'blocks.1.hook_resid_post' has 128"):
        model().run_with_hooks(IDS, splices=[narrow.at()])
    sae = make(context_size=9000, processing=("center_writing_weights",), prepend_bos=False)
    with pytest.raises(InputError, match=r"trained on 9000 tokens.*been through center_writing_weights.*without a BOS"):
        model().run_with_hooks(IDS, splices=[sae.at()])
    assert torch.equal(model().run_with_hooks(IDS, splices=[sae.at(check=False)]), model()(IDS))
    with pytest.raises(InputError, match=r"'blocks.0.hook_resid_post' in the place of 'blocks.1.hook_resid_post'"):
        make().at("blocks.0.hook_resid_post")
    with pytest.raises(InputError, match="do not say which hook point"):
        SAE(SAEConfig(d_in=128, d_sae=3)).at()
    with pytest.raises(HookNameError, match="hook_resid_pots"):
        model().run_with_hooks(IDS, splices=[SAE(SAEConfig(d_in=128, d_sae=3)).at("blocks.0.hook_resid_pots")])
    with pytest.raises(InputError, match="'keep' or 'drop'"):
        make().at(error="throw")
    with pytest.raises(InputError, match="splices"):
        model().run_with_hooks(IDS, splices=make().at())  # type: ignore[arg-type]


def last_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1, 9]


@pytest.mark.parametrize("by_position", [False, True])
def test_latents_swept_and_estimated(*, by_position: bool) -> None:
    """Every patch by hand; and in the last layer, whose norm's scale hardly moves, the estimate comes close to it."""
    place = "blocks.3.hook_resid_post"
    splice = make(place).at()
    clean, corrupted = IDS[:1], IDS[1:]
    swept = sweep_latents(
        model(), splice, clean, corrupted, last_difference, latents=[1, 5, 9], by_position=by_position, progress=False
    )
    name = f"{place}.hook_sae_acts"
    acts = model().run_with_cache(clean, names_filter=name, splices=[splice])[1][name]
    before = last_difference(model()(corrupted))
    for row in swept.itertuples():

        def patch(x: Tensor, hook: Any, row: Any = row) -> Tensor:
            at = slice(row.pos, row.pos + 1) if by_position else slice(None)
            x[:, at, row.latent] = acts[:, at, row.latent]
            return x

        after = last_difference(model().run_with_hooks(corrupted, fwd_hooks=[(name, patch)], splices=[splice]))
        assert row.effect == pytest.approx(float(after - before), abs=1e-5)
    every = sweep_latents(model(), splice, clean, corrupted, last_difference, by_position=by_position, progress=False)
    estimate = attribute_latents(model(), splice, clean, corrupted, last_difference, by_position=by_position)
    keys = ["latent", "pos"] if by_position else ["latent"]
    joined = every.merge(estimate, on=keys)
    assert len(joined) == len(every) == len(estimate)
    assert joined["effect_x"].corr(joined["effect_y"]) > 0.95
    assert every["effect"].abs().is_monotonic_decreasing


def test_prompts_that_do_not_fit_each_other() -> None:
    with pytest.raises(InputError, match=r"clean is \[1, 6\] tokens and corrupted \[1, 5\]"):
        attribute_latents(model(), make().at(), IDS[:1], IDS[:1, :5], last_difference)
    with pytest.raises(InputError, match="latents: '400' are not there"):
        sweep_latents(model(), make().at(), IDS[:1], IDS[1:], last_difference, latents=[400])
    with pytest.raises(InputError, match="expected a value for each row"):
        attribute_latents(model(), make().at(), IDS[:1], IDS[1:], lambda logits: logits.sum())
