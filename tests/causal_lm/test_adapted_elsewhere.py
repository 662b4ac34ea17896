"""Adapters beside weights that lie on several devices, or are kept as a checkpoint has them quantised."""

import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.model.parts.adapted import adapted_maps
from hooklens.model.parts.quantised import quantised_maps
from tests.adapted_models import CASES, TOKENS, load, make_adapted
from tests.causal_lm.test_keeping import FORMATS, quantise_folder
from tests.pretended_devices import FIRST, SECOND, pretending

# float64, the same numbers by the same kernels.
SAME = {"rtol": 0, "atol": 1e-12}
KINDS = {
    "llama": {"embedding": True, "unembedding": True},
    "neox": {"use_dora": True},
    "gpt2": {},
    "tied": {"embedding": True},
    "falcon": {"modules_to_save": ["lm_head"], "bias": "lora_only"},
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    made = {}

    def make(case):
        if case not in made:
            made[case] = make_adapted(case, tmp_path_factory.mktemp(case), **KINDS[case])
        return made[case]

    return make


def places_of(model):
    """Layers by turns, whatever there is."""
    places = {f"blocks.{layer}": (SECOND, FIRST)[layer % 2] for layer in range(model.cfg.n_layers)}
    last = FIRST if model.cfg.tied_unembed else SECOND
    return {**{part: FIRST for part in model.device_map if "blocks" not in part}, **places, "unembed": last}


WAYS = {
    "loaded there": lambda one, places: HookedCausalLM.from_pretrained(
        one.base, adapter={"one": one.adapter}, merge=False, device_map=places
    ),
    "added there": lambda one, places: load(one, device_map=places),
    "moved there": lambda one, places: load(one).dispatch(places),
}


# Every case in one way, and every way in one case; the others are slow.
@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, marks=() if way == "loaded there" or case == "neox" else pytest.mark.slow)
        for case in KINDS
        for way in WAYS
    ],
)
def test_on_several_devices(adapted, case, way, tmp_path):
    one = adapted(case)
    plain = load(one)
    asked = {"max_new_tokens": 3, "do_sample": False, "return_type": "tokens", "verbose": False}
    expected, generated = plain(TOKENS), plain.generate(TOKENS, **asked)
    plain(TOKENS, return_type="loss").backward()
    name = "blocks.1.attn.o_proj.hook_lora_out" if case != "gpt2" else "blocks.1.mlp.out_proj.hook_lora_out"
    edited = plain.run_with_hooks(TOKENS, edits=[edits.Scale(name, 0.5)])
    with plain.disable_adapter():
        off = plain(TOKENS)
    with pretending():
        model = WAYS[way](one, places_of(plain))
        assert model.devices == (FIRST, SECOND)
        for path, layer in adapted_maps(model).items():
            assert len({parameter.device for parameter in layer.parameters()}) == 1, path
        torch.testing.assert_close(model(TOKENS).cpu(), expected, **SAME)
        torch.testing.assert_close(model.run_with_hooks(TOKENS, edits=[edits.Scale(name, 0.5)]).cpu(), edited, **SAME)
        assert model.generate(TOKENS, **asked).tolist() == generated.tolist()
        past = model.prefill(TOKENS[:, :4])
        torch.testing.assert_close(model(TOKENS[:, 4:], past_kv_cache=past).cpu(), expected[:, 4:], **SAME)
        with model.disable_adapter():
            torch.testing.assert_close(model(TOKENS).cpu(), off, **SAME)
        model(TOKENS, return_type="loss").backward()
        wanted = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name].cpu(), gradient, **SAME)
        merged = model.merge_adapter()
        torch.testing.assert_close(merged(TOKENS).cpu(), expected, rtol=1e-9, atol=1e-9)
        model.save_adapter(tmp_path, "one")
    again = HookedCausalLM.from_pretrained(one.base, adapter={"one": tmp_path}, merge=False)
    assert torch.equal(again(TOKENS), expected)


@pytest.mark.parametrize("way", ["gptq, inputs in any order of groups", "compressed, rows"])
@pytest.mark.parametrize("case", ["neox", "llama"])
def test_beside_weights_that_are_kept_quantised(case, way, tmp_path):
    one = make_adapted(case, tmp_path, dtype=torch.float32)
    quantise_folder(one.base, *FORMATS[way])
    options = {"quantize": "keep", "dtype": torch.float32}
    model = HookedCausalLM.from_pretrained(one.base, adapter={"one": one.adapter}, merge=False, **options)
    kept = HookedCausalLM.from_pretrained(one.base, **options)
    dense = HookedCausalLM.from_pretrained(one.base, adapter={"one": one.adapter}, merge=False, dtype=torch.float32)
    assert len(quantised_maps(model)) == len(quantised_maps(kept)) > 0
    assert len(adapted_maps(model)) == len(adapted_maps(dense)) >= len(CASES[case].targets)
    # float32 logits of some ten, of two orders of the same sums.
    close = {"rtol": 5e-5, "atol": 5e-5}
    torch.testing.assert_close(model(TOKENS), dense(TOKENS), **close)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), kept(TOKENS))
    added = load(one, **options)
    assert torch.equal(added(TOKENS), model(TOKENS))
    torch.testing.assert_close(model.merge_adapter()(TOKENS), dense(TOKENS), **close)
    for name, value in model.named_weights().items():
        torch.testing.assert_close(value, dense.named_weights()[name], **close)
    losses = [each(TOKENS, return_type="loss") for each in (model, dense)]
    for loss in losses:
        loss.backward()
    grads = [{name: p.grad for name, p in each.named_parameters() if "lora_" in name} for each in (model, dense)]
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[1].items():
        # Sums of some hundred products of either sign.
        torch.testing.assert_close(grads[0][name], gradient, rtol=1e-3, atol=1e-5)
