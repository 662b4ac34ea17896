"""Models of which parts lie on the disk: loading them, what that takes of memory, and what is left behind."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hooklens as hl
from hooklens import HookedCausalLM, analysis, patching
from hooklens.adapters.checkpoint import Checkpoint
from hooklens.causal_lm.memory.plan import _add, _count_brought
from hooklens.errors import InputError
from hooklens.evaluation.fingerprint import model_fingerprint
from tests.adapted_models import TOKENS, load, make_adapted
from tests.forks import needs_fork, run_in_child, wait_for
from tests.model.networks import make_model, random_tokens
from tests.pretended_devices import FIRST, pretending

SOURCE, TEXT = "bundled:tiny-llama", "When Mary and John went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, John gave a drink to"
CPU = torch.device("cpu")


def aligned(model):
    """The model in memory: the last bits of a product depend on how its weights lie to the processor's lines."""
    return copy.deepcopy(model).requires_grad_(False)


@pytest.fixture(scope="module")
def plain():
    return aligned(HookedCausalLM.from_pretrained(SOURCE))


@pytest.fixture
def offloaded(tmp_path):
    return HookedCausalLM.from_pretrained(SOURCE, device_map={"": "disk"}, offload_folder=tmp_path / "weights")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float64"])
@pytest.mark.parametrize("variant", ["gpt2", None])
def test_it_is_the_model_that_is_loaded_whole(dtype, variant, tmp_path):
    """GPT-2's maps lie by columns in its files, and go on doing so."""
    source = SOURCE if variant is None else make_adapted(variant, tmp_path / "made").base
    expected = aligned(HookedCausalLM.from_pretrained(source, dtype=dtype))
    model = HookedCausalLM.from_pretrained(
        source, dtype=dtype, device_map={"": "disk"}, offload_folder=str(tmp_path / "weights")
    )
    assert set(model.offloaded.values()) == {"disk"}
    assert list((tmp_path / "weights").iterdir()) == []
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype), name
        assert torch.equal(one, other), name
    ids = TOKENS if variant else expected.to_tokens(TEXT)
    found, wanted = model.run_with_cache(ids)[1], expected.run_with_cache(ids)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_it_says_of_itself(offloaded, plain):
    assert model_fingerprint(offloaded) == model_fingerprint(plain)
    assert "3.16 MB of them on the disk" in str(offloaded)
    with pretending():
        there = HookedCausalLM.from_pretrained(SOURCE, device_map={"": "cpu"}, execution_device=FIRST)
        assert "3.16 MB of them on the CPU for other devices" in str(there)
        largest = max(one.nbytes for one in plain.parameters())
        assert _count_brought(there) == {FIRST: largest}
        assert _add({CPU: 5, FIRST: 7}, {FIRST: largest}) == {CPU: 5, FIRST: 7 + largest}


def test_a_plan_counts_nothing_for_the_disk(tmp_path):
    """Without rotary tables, which are kept for all models, and other tests pretend to have on other devices."""
    whole = make_model("learned, tied").requires_grad_(False)
    model = copy.deepcopy(whole).dispatch({"": "disk"}, offload_folder=tmp_path)
    ids = random_tokens(2, 6)
    planned, expected = (hl.plan(one, ids, grad=False) for one in (model, whole))
    assert (planned.weights, expected.weights) == (0, sum(one.nbytes for one in whole.parameters()))
    assert planned.peak == pytest.approx(expected.peak, rel=0.05)


def test_analyses_experiments_and_saving(offloaded, plain, tmp_path):
    sweeps = [
        patching.sweep(model, TEXT, OTHER, "resid_pre", patching.LogitDiff(" Mary", " John"), progress=False)
        for model in (offloaded, plain)
    ]
    assert torch.equal(sweeps[0].values, sweeps[1].values)
    caches = [model.run_with_cache(TEXT)[1] for model in (offloaded, plain)]
    lenses = [analysis.lens.logit_lens(model, cache) for model, cache in zip((offloaded, plain), caches, strict=True)]
    assert lenses[0].equals(lenses[1])
    assert torch.equal(offloaded.W_Q, plain.W_Q)
    assert torch.equal(offloaded.QK[1, 2].AB, plain.QK[1, 2].AB)
    offloaded.save_pretrained(tmp_path / "saved")
    again = aligned(HookedCausalLM.from_pretrained(tmp_path / "saved"))
    assert torch.equal(again(TEXT), plain(TEXT))
    with pytest.raises(InputError, match=r"verify changes copies of the weights.*model.dispatch"):
        hl.verify(offloaded, progress=False)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_adapters_beside_weights_on_the_disk(case, tmp_path):
    """The adapter is in memory, and trained; what it stands beside is not."""
    one = make_adapted(case, tmp_path / "adapted")
    expected = load(one)
    places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "weights"}
    beside = load(one, **places)
    assert set(beside.offloaded.values()) == {"disk"}
    torch.testing.assert_close(beside(TOKENS), expected(TOKENS), rtol=0, atol=1e-12)
    beside(TOKENS, return_type="loss").backward()
    expected(TOKENS, return_type="loss").backward()
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters() if "lora_" in name}
    assert gradients
    for name, parameter in beside.named_parameters():
        assert (parameter.grad is not None) == (name in gradients), name
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match=r"merge_adapter.*merges while it offloads"):
        beside.merge_adapter()
    merged = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter, dtype="float64", **places)
    assert set(merged.offloaded.values()) == {"disk"}
    torch.testing.assert_close(merged(TOKENS), expected(TOKENS), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="quantised weights, or with adapters beside them"):
        load(one).dispatch({"": "disk"}, offload_folder=tmp_path)


@pytest.mark.parametrize("kind", ["auto", "sequential"])
def test_what_finds_no_room_in_memory_goes_to_the_disk(kind, plain, tmp_path):
    block = sum(parameter.nbytes for parameter in plain.blocks[0].parameters())
    table = plain.embed.W_E.nbytes
    room = {"cpu": table + 2 * block + 1000}
    model = HookedCausalLM.from_pretrained(SOURCE, device_map=kind, max_memory=room, offload_folder=tmp_path)
    on_disk = [part for part, lies in model.offloaded.items() if lies == "disk"]
    assert on_disk
    assert "embed" not in on_disk
    assert sum(one.nbytes for one in model.parameters() if one.requires_grad) <= room["cpu"]
    with torch.no_grad():
        assert torch.equal(model(TEXT), plain(TEXT))
    with pytest.raises(
        InputError, match=r"no room for 'blocks.*Give a folder on the disk for the rest \(offload_folder="
    ):
        HookedCausalLM.from_pretrained(SOURCE, device_map=kind, max_memory=room)


def test_with_room_for_everything_nothing_is_written(plain, tmp_path):
    model = HookedCausalLM.from_pretrained(SOURCE, device_map="auto", offload_folder=tmp_path / "weights")
    assert (model.offloaded, (tmp_path / "weights").exists()) == ({}, False)


def test_arguments_are_refused_before_a_weight_is_read(monkeypatch, tmp_path):
    def read(*given, **keywords):
        raise AssertionError("weights were asked for")

    for method in ("tensors", "kept_tensors"):
        monkeypatch.setattr(Checkpoint, method, read)
    (tmp_path / "file").touch()
    for options, message in (
        ({"device_map": {"": "disk"}}, "on 'disk', and no offload_folder was given"),
        ({"offload_folder": tmp_path}, "offload_folder goes with device_map"),
        ({"execution_device": "cpu"}, "execution_device goes with device_map"),
        ({"device_map": {"": "cpu"}, "offload_folder": tmp_path}, "device_map puts none there"),
        ({"device_map": {"": "disk"}, "offload_folder": tmp_path, "quantize": "int8"}, "quantised weights are not off"),
        ({"device_map": {"": "disk"}, "offload_folder": tmp_path / "file"}, "cannot be written to"),
        ({"device_map": {"": "disk"}, "offload_dir": tmp_path}, "offload_folder"),
    ):
        with pytest.raises((InputError, TypeError), match=message):
            HookedCausalLM.from_pretrained(SOURCE, **options)


# Processes of their own: what a process has of memory, and what it leaves behind.

_MEASURE = """
import json, os, pathlib, sys, threading
import torch
import hooklens as hl

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])

def measure(options):
    before, peak, ended = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = hl.HookedCausalLM.from_pretrained(source, dtype="float32", **options)
    with torch.no_grad():
        for _ in range(2):
            model(torch.arange(16)[None])
    peak = max(peak, anonymous())
    ended.set()
    watcher.join()
    return peak - before, sum(one.nbytes for one in model.parameters())

source, ways = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")(torch.arange(5)[None])
# A process for each way, which finds nothing that another has left.
for way, options in ways.items():
    child = os.fork()
    if not child:
        print(json.dumps([way, *measure(options)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint in bfloat16: computing in float32, no file of it can stand for the weights."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_weights(large, tmp_path):
    """While loading and running; the same of the whole model shows that it is seen."""
    places = {"embed": "cpu", "blocks": "disk", "ln_final": "cpu", "unembed": "cpu"}
    ways = {"whole": {}, "disk": {"device_map": places, "offload_folder": str(tmp_path)}}
    command = [sys.executable, "-c", _MEASURE, str(large), json.dumps(ways)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    taken, weights = {}, 0
    for line in done.stdout.splitlines()[-2:]:
        way, peak, weights = json.loads(line)
        taken[way] = peak
    assert weights > 100e6
    assert taken["whole"] > weights
    # What the call itself takes, and what a process takes as it goes on.
    assert taken["disk"] < weights / 10


@needs_fork
def test_a_process_that_is_killed_leaves_nothing_behind(tmp_path):
    def work():
        model = HookedCausalLM.from_pretrained(SOURCE, device_map={"": "disk"}, offload_folder=tmp_path / "weights")
        assert len(model.offloaded) == 7
        kill = ("blocks.1.hook_resid_pre", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        model.run_with_hooks("When", fwd_hooks=[kill])

    assert wait_for(run_in_child(work)) == -signal.SIGKILL
    assert list((tmp_path / "weights").iterdir()) == []


@needs_fork
def test_a_file_that_cannot_be_written_whole_is_told(tmp_path):
    """The system refuses to go on inside a file, as a full disk does."""
    resource = pytest.importorskip("resource")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(InputError, match=r"'embed\.W_E' of 127 kB could not be written there(.|\n)*File too large"):
            HookedCausalLM.from_pretrained(SOURCE, device_map={"": "disk"}, offload_folder=tmp_path / "weights")

    assert wait_for(run_in_child(work)) == 0
    assert list((tmp_path / "weights").iterdir()) == []


# Accelerators.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("places", "options"),
    [
        ({"": "disk"}, {"execution_device": 0}),
        ({"": "cpu"}, {"execution_device": "cuda:0"}),
        ({"embed": 0, "blocks": "disk", "ln_final": 0, "unembed": 0}, {}),
    ],
    ids=["disk", "cpu", "blocks"],
)
def test_weights_are_brought_to_an_accelerator(places, options, tmp_path):
    """The same kernels on the same device: bit for bit what the model that lies there gives."""
    if "disk" in places.values():
        options = {**options, "offload_folder": tmp_path}
    expected = HookedCausalLM.from_pretrained(SOURCE, device="cuda:0").requires_grad_(False)
    model = HookedCausalLM.from_pretrained(SOURCE, device_map=places, **options)
    assert {device.type for device in model.devices} == {"cuda"}
    found, wanted = model.run_with_cache(TEXT)[1], expected.run_with_cache(TEXT)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    gradients = [
        one.run_with_cache(TEXT, names_filter="resid_pre", incl_bwd=True, return_type="loss")[1]
        for one in (model, expected)
    ]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1])
    asked = {"max_new_tokens": 5, "do_sample": False, "verbose": False}
    assert model.generate(TEXT, **asked) == expected.generate(TEXT, **asked)


@pytest.mark.gpu
def test_an_accelerator_holds_one_weight_at_a_time(large, tmp_path):
    """Forward and backward; what is planned bounds what is measured."""
    ids = torch.arange(16)[None]
    model = HookedCausalLM.from_pretrained(
        large, dtype="float32", device_map={"": "disk"}, offload_folder=tmp_path, execution_device=0
    )
    weights = sum(one.nbytes for one in model.parameters())
    planned = hl.plan(model, ids, capture=False, grad=False)
    with torch.no_grad():
        model(ids)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < weights / 8
    assert planned.weights == 0
    assert taken <= 1.1 * max(planned.peaks.values()) + 2**20
    stream = torch.randn(1, 16, 512, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    model(stream, start_at_layer=0).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < weights / 4
