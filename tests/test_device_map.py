"""Models loaded onto several devices, and what reads them: caches taken apart, analyses, scores, saved folders."""

import math

import pandas as pd
import pytest
import torch

import hooklens
from hooklens import HookedCausalLM, analysis, edits, evaluation, patching
from hooklens.adapters.checkpoint import Checkpoint
from hooklens.errors import InputError
from tests.pretended_devices import FIRST, SECOND, pretending

SOURCE, TEXT = "bundled:tiny-llama", "When Mary and John went to the store, John gave a drink to"
BY_TURNS = {
    "embed": FIRST, "blocks.0": SECOND, "blocks.1": FIRST, "blocks.2": SECOND, "blocks.3": SECOND, "ln_final": FIRST,
    "unembed": SECOND,
}  # fmt: skip
CLOSE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture
def devices():
    with pretending():
        yield


@pytest.fixture(scope="module")
def plain():
    return HookedCausalLM.from_pretrained(SOURCE, dtype="float64")


@pytest.fixture
def placed(devices):
    return HookedCausalLM.from_pretrained(SOURCE, dtype="float64", device_map=BY_TURNS)


def test_weights_are_read_to_their_devices(placed, plain):
    assert placed.device_map == BY_TURNS
    assert placed.devices == (FIRST, SECOND)
    assert placed.device == FIRST
    for name, parameter in placed.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.partition(".")[0]
        assert parameter.device == BY_TURNS[part], name
    torch.testing.assert_close(placed(TEXT).cpu(), plain(TEXT), **CLOSE)


def test_one_device_by_a_mapping_is_one_device(devices):
    model = HookedCausalLM.from_pretrained(SOURCE, device_map={"": "lazy:1"}, layers=[0, 1])
    assert model.placement is None
    assert model.device == SECOND


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_automatic_placement_on_a_machine_without_accelerators(device_map, monkeypatch, plain):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = HookedCausalLM.from_pretrained(SOURCE, dtype="float64", device_map=device_map)
    assert model.devices == (torch.device("cpu"),)
    torch.testing.assert_close(model(TEXT), plain(TEXT), rtol=0, atol=0)


def test_what_does_not_fit_is_refused_before_a_weight_is_read(monkeypatch):
    def read(*given, **keywords):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(Checkpoint, "tensors", read)
    for options, message in (
        ({"device_map": {"embed": "cpu", "blocks.9": "cpu"}}, r"no part 'blocks.9'.*no device for 'blocks.0'"),
        ({"device_map": "everywhere"}, "'sequential', or devices by part"),
        ({"device_map": {"": "disk"}}, "on 'disk', and no offload_folder was given"),
        ({"device_map": "auto", "max_memory": {"cpu": 1000}}, "no room for 'embed'"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "max_memory goes with an automatic device_map"),
        ({"max_memory": {"cpu": 1}}, "no device_map was given"),
        ({"device_map": {"": "cpu"}, "device": "meta"}, "both say where weights go"),
    ):
        with pytest.raises(InputError, match=message):
            HookedCausalLM.from_pretrained(SOURCE, **options)


def test_a_cache_of_several_devices_is_taken_apart(placed, plain):
    _, cache = placed.run_with_cache(TEXT)
    _, expected = plain.run_with_cache(TEXT)
    assert cache["resid_post", 0].device == SECOND
    assert cache["resid_post", 1].device == FIRST
    for method, options in (
        ("decompose_resid", {}),
        ("accumulated_resid", {"apply_ln": True, "incl_mid": True}),
        ("stack_head_results", {"incl_remainder": True}),
        ("get_full_resid_decomposition", {"apply_ln": True, "project_output_onto": placed.W_U[:, 5]}),
        ("stack_activation", {"activation_name": "pattern"}),
    ):
        if "project_output_onto" in options:
            wanted = expected.get_full_resid_decomposition(apply_ln=True, project_output_onto=plain.W_U[:, 5])
        else:
            wanted = getattr(expected, method)(**options)
        found = getattr(cache, method)(**options)
        assert found.device == cache["embed"].device
        torch.testing.assert_close(found.cpu(), wanted, **CLOSE)
    stack = cache.decompose_resid(pos_slice=-1)
    torch.testing.assert_close(
        cache.logit_attrs(stack.to(SECOND), 7, pos_slice=-1).cpu(),
        expected.logit_attrs(expected.decompose_resid(pos_slice=-1), 7, pos_slice=-1),
        **CLOSE,
    )
    _, on_host = placed.run_with_cache(TEXT, device="cpu")
    assert {tensor.device.type for tensor in on_host.values()} == {"cpu"}


READINGS = {
    "lens": lambda model, cache: analysis.lens.logit_lens(model, cache, sublayers=True),
    "lens losses": lambda model, cache: analysis.lens.lens_losses(model, [TEXT], progress=False),
    "tuned lens": lambda model, cache: analysis.lens.logit_lens(
        model,
        cache,
        transport=analysis.lens.TunedLens.fit(model, [TEXT, TEXT], steps=2, progress=False),
    ),
    "Jacobian lens": lambda model, cache: analysis.lens.logit_lens(
        model, cache, transport=analysis.lens.JacobianLens.fit(model, [TEXT], skip_first=0, progress=False)
    ),
    "report": lambda model, cache: analysis.report(model, TEXT)["heads"],
    "components": lambda model, cache: analysis.attribution.attribute_to_components(model, cache, " Mary", " John"),
    "heads": lambda model, cache: analysis.attribution.attribute_to_heads(model, cache, " Mary"),
    "neurons": lambda model, cache: analysis.attribution.attribute_to_neurons(model, cache, " Mary", k=5),
    "sources": lambda model, cache: analysis.sources.attribute_to_sources(model, cache, " Mary"),
    "head scores": lambda model, cache: analysis.heads.detect_heads(model, TEXT, "previous_token"),
    "ov": lambda model, cache: analysis.circuits.top_ov_pairs(model, 1, 1, k=4),
    "qk": lambda model, cache: analysis.circuits.top_qk_pairs(model, 2, 1, k=4),
    "neuron tokens": lambda model, cache: analysis.circuits.neuron_tokens(model, 2, [0, 1]),
    "copying": lambda model, cache: analysis.copying.copying_scores(model, k=3),
    "scores": lambda model, cache: evaluation.score_continuations(
        model, TEXT, [" Mary", " John gave"], edits=[edits.Zero("blocks.1.attn.hook_z", head=0)], progress=False
    ),
}


def test_analyses_and_scores(placed, plain):
    caches = placed.run_with_cache(TEXT)[1], plain.run_with_cache(TEXT)[1]
    for read in READINGS.values():
        found, expected = read(placed, caches[0]), read(plain, caches[1])
        pd.testing.assert_frame_equal(found, expected, rtol=1e-6, atol=1e-8)
    directions = [model.tokens_to_residual_directions(" Mary") for model in (placed, plain)]
    torch.testing.assert_close(directions[0].cpu(), directions[1], rtol=0, atol=0)
    assert placed.generate(TEXT, verbose=False, do_sample=False) == plain.generate(TEXT, verbose=False, do_sample=False)
    assert math.isclose(
        analysis.sanity.corpus_loss(placed, [TEXT, TEXT + " Mary"]).loss,
        analysis.sanity.corpus_loss(plain, [TEXT, TEXT + " Mary"]).loss,
        abs_tol=1e-9,
    )


def test_saving_and_converting(placed, plain, tmp_path):
    placed.save_pretrained(tmp_path)
    again = HookedCausalLM.from_pretrained(tmp_path)
    for name, weight in plain.named_weights().items():
        assert torch.equal(again.named_weights()[name], weight), name
    ids = plain.to_tokens(TEXT)
    with torch.no_grad():
        torch.testing.assert_close(placed.to_hf()(ids).logits, plain.to_hf()(ids).logits, rtol=0, atol=0)


def test_what_runs_single_blocks_asks_for_one_device(placed):
    for run in (
        lambda: patching.sweep(placed, TEXT, TEXT, "resid_pre", patching.LogitDiff(" Mary", " John"), progress=False),
        lambda: hooklens.verify(placed, progress=False),
    ):
        with pytest.raises(InputError, match=r"lies on several devices.*lazy:0, lazy:1.*model.to\(device\)"):
            run()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("device_map", ["balanced", {"embed": 0, "blocks.0": 0, "blocks.1": "cuda:1", "blocks.2": 0,
                                                     "blocks.3": 1, "ln_final": 0, "unembed": 1}])  # fmt: skip
def test_two_cuda_devices(device_map):
    plain = HookedCausalLM.from_pretrained(SOURCE, device="cuda:0")
    placed = HookedCausalLM.from_pretrained(SOURCE, device_map=device_map, max_memory=None)
    ids = plain.to_tokens([TEXT, TEXT + " Mary"])
    # The same kernels on devices of the same kind.
    torch.testing.assert_close(placed(ids).to("cuda:0"), plain(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(placed(ids, return_type="loss").to("cuda:0"), plain(ids, return_type="loss"))
    kv, reference = placed.prefill(ids[:1, :4]), plain.prefill(ids[:1, :4])
    suffix = ids[:, 4:]
    torch.testing.assert_close(
        placed(suffix, past_kv_cache=kv).to("cuda:0"), plain(suffix, past_kv_cache=reference), rtol=1e-4, atol=1e-4
    )
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False}
    assert placed.generate(TEXT, **options) == plain.generate(TEXT, **options)
    placed(ids, return_type="loss").backward()
    assert all(parameter.grad.device == parameter.device for parameter in placed.parameters())


@pytest.mark.gpu
def test_a_cuda_device_and_the_cpu():
    plain = HookedCausalLM.from_pretrained(SOURCE)
    places = {"embed": 0, "blocks.0": 0, "blocks.1": "cpu", "blocks.2": 0, "blocks.3": "cpu", "ln_final": 0}
    placed = HookedCausalLM.from_pretrained(SOURCE, device_map={**places, "unembed": "cpu"})
    # Other kernels, in float32.
    torch.testing.assert_close(placed(TEXT), plain(TEXT), rtol=1e-3, atol=1e-3)
    placed(TEXT, return_type="loss").backward()
    kv = placed.prefill("When Mary")
    assert {entry.device.type for entry in kv.entries} == {"cuda", "cpu"}
