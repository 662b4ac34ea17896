"""Tests of hooklens.model.placement.offloading: files of weights, and networks whose parts lie in them.

Where weights are frozen a call is the same, bit for bit: PyTorch takes other ways through a product where a gradient of
the weight is recorded.
"""

import copy
import errno
import gc
import shutil
import weakref
from collections import namedtuple

import pytest
import torch

from hooklens import edits
from hooklens.errors import CheckpointError, ConfigError, InputError, TransformError, UnsupportedModelError
from hooklens.model.placement.offloading import OffloadFolder
from hooklens.weights.offloaded import OffloadedTensor, lies_on_disk, offloaded_parameters
from tests.model.networks import ALL_CONFIGS, make_model, random_tokens
from tests.model.placement.test_placed import CONFIGS
from tests.pretended_devices import FIRST, SECOND, pretending

IDS = random_tokens(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
KINDS = ("grouped", "learned, tied", "alibi, grouped", "shortformer", "experts")
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "offloaded"


def frozen(network):
    return make_model(CONFIGS[network]).requires_grad_(False)


def on_disk(network, folder):
    return make_model(CONFIGS[network]).dispatch({"": "disk"}, offload_folder=folder)


def same(found, expected):
    torch.testing.assert_close(found.detach().cpu(), expected.detach().cpu(), rtol=0, atol=0)


# Files.


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3),
        torch.randn(3, 5).T,
        torch.randn(2, 3, 5).permute(1, 2, 0),
        torch.randn(4, 1, 3),
        torch.randn(6).bfloat16(),
        torch.tensor(2.5),
        torch.randn(0, 3),
        torch.arange(6).reshape(2, 3) > 2,
        torch.randn(6, 4)[1:3],
    ],
    ids=lambda one: f"{list(one.shape)} {one.dtype}",
)
def test_what_is_mapped_is_what_was_written(tensor, folder):
    mapped = OffloadFolder(folder, 0).write("w", tensor)
    assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
    assert mapped.stride() == tensor.stride() or 1 in tensor.shape
    assert torch.equal(mapped, tensor)
    assert not tensor.numel() or mapped.data_ptr() != tensor.data_ptr()
    # Its file has lost its name: nobody can damage it, and nothing is left of it.
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_a_folder_that_cannot_be_made_is_refused(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"offload_folder='.*' cannot be written to .*expected a folder on a disk"):
        OffloadFolder(tmp_path / name, 0)


def test_a_folder_without_leave_to_write_is_refused(folder, monkeypatch):
    """The user of tests may write anywhere, so the system's answer is put in."""

    def refuse(**keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match="Read-only file system"):
        make_model("rotary").dispatch({"": "disk"}, offload_folder=folder)


def test_a_disk_without_room_is_refused_before_anything_is_written(folder, monkeypatch):
    model = make_model("rotary")
    needed = sum(parameter.nbytes for parameter in model.parameters())
    usage = namedtuple("usage", "total used free")
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if free < needed:
            with pytest.raises(InputError, match=r"the parts on the disk take .* are free there"):
                model.dispatch({"": "disk"}, offload_folder=folder)
            assert model.offloaded == {}
    assert set(model.dispatch({"": "disk"}, offload_folder=folder).offloaded.values()) == {"disk"}


# Networks on the CPU.


@pytest.mark.parametrize("network", CONFIGS)
def test_a_network_on_the_disk_computes_the_same(network, folder):
    plain, offloaded = frozen(network), on_disk(network, folder)
    assert list(folder.iterdir()) == []
    assert all(lies_on_disk(parameter) for parameter in offloaded.parameters())
    assert offloaded.devices == (CPU,)
    logits, cache = offloaded.run_with_cache(IDS, attention_mask=MASK, names_filter="*")
    expected, wanted = plain.run_with_cache(IDS, attention_mask=MASK, names_filter="*")
    same(logits, expected)
    assert list(cache) == list(wanted)
    for name in wanted:
        same(cache[name], wanted[name])
    for name, weight in plain.named_weights().items():
        assert torch.equal(offloaded.named_weights()[name], weight), name


def gradients(model):
    _, cache = model.run_with_cache(
        IDS, attention_mask=MASK, names_filter=["resid_pre", "resid_post"], incl_bwd=True, return_type="loss"
    )
    return cache


@pytest.mark.parametrize("network", KINDS)
def test_gradients_edits_caches_and_generation(network, folder):
    plain, offloaded = frozen(network), on_disk(network, folder)
    found, expected = gradients(offloaded), gradients(plain)
    assert sum(name.endswith("_grad") for name in expected) >= 2
    for name in expected:
        same(found[name], expected[name])
    offloaded.gradient_checkpointing_enable()
    streams = [IDS.new_zeros(2, 7, plain.cfg.d_model, dtype=torch.float64).add_(0.5).requires_grad_() for _ in "ab"]
    for model, stream in zip((plain, offloaded), streams, strict=True):
        model(stream, start_at_layer=0).sum().backward()
    same(streams[1].grad, streams[0].grad)
    offloaded.gradient_checkpointing_disable()
    changes = [edits.Scale("resid_post", 0.5, pos=[0, -1])]
    same(offloaded.run_with_hooks(IDS, edits=changes), plain.run_with_hooks(IDS, edits=changes))
    prefix, suffix = IDS[:1, :4], IDS[:, 4:]
    same(offloaded(suffix, past_kv_cache=offloaded.prefill(prefix)), plain(suffix, past_kv_cache=plain.prefill(prefix)))
    asked = {"max_new_tokens": 4, "do_sample": False, "return_type": "tokens", "verbose": False}
    assert torch.equal(offloaded.generate(IDS[:1], **asked), plain.generate(IDS[:1], **asked))


def test_parts_on_the_disk_beside_parts_that_are_trained(folder):
    model = make_model("grouped")
    places = dict.fromkeys(model.device_map, "cpu") | {"blocks.1": "disk"}
    model.dispatch(places, offload_folder=folder)
    assert model.offloaded == {"blocks.1": "disk"}
    model(IDS, return_type="loss").backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("blocks.1."), name


def test_copies_share_what_lies_on_the_disk(folder):
    offloaded = on_disk("grouped", folder)
    copied = copy.deepcopy(offloaded)
    assert copied.offloaded == offloaded.offloaded
    for (_, one), (_, other) in zip(offloaded_parameters(offloaded), offloaded_parameters(copied), strict=True):
        assert one.data_ptr() == other.data_ptr()
    expected = offloaded(IDS)
    del offloaded
    gc.collect()
    same(copied(IDS), expected)


def test_weights_come_back(folder):
    plain, offloaded = frozen("learned, tied"), on_disk("learned, tied", folder)
    offloaded.dispatch({"": "cpu"})
    assert offloaded.offloaded == {}
    assert not any(isinstance(one, OffloadedTensor) for one in offloaded.parameters())
    assert all(parameter.requires_grad for parameter in offloaded.parameters())
    with torch.no_grad():
        same(offloaded(IDS), plain(IDS))
        offloaded.embed.W_E.mul_(2)
    offloaded.double()


def test_state_dicts(folder):
    plain, offloaded = frozen("grouped"), on_disk("grouped", folder)
    state = offloaded.state_dict()
    for name, value in plain.state_dict().items():
        assert type(state[name]) is torch.Tensor
        assert torch.equal(state[name], value)
    assert isinstance(offloaded.state_dict(keep_vars=True)["embed.table.weight"], OffloadedTensor)
    other = make_model("grouped", seed=3)
    other.load_state_dict(state)
    same(other.requires_grad_(False)(IDS), plain(IDS))
    taken = type(plain).from_state_dict(dict(offloaded.named_weights()), offloaded.cfg)
    assert taken.offloaded == {}
    # What is read under the field's names cannot be changed either, and is copied.
    taken.embed.W_E.data.zero_()
    same(offloaded(IDS), plain(IDS))


REFUSED = {
    "assignment": (lambda model: setattr(model.blocks[0].attn, "W_Q", model.blocks[0].attn.W_Q * 2), ConfigError),
    "assignment of a norm's": (lambda model: setattr(model.blocks[0].ln1, "w", torch.ones(16)), ConfigError),
    "in place": (lambda model: model.blocks[0].attn.W_Q.mul_(2), InputError),
    "load_state_dict": (lambda model: model.load_state_dict(model.state_dict()), CheckpointError),
    "initialize": (lambda model: model.initialize(seed=0), InputError),
    "requires_grad_": (lambda model: model.requires_grad_(), InputError),
    "to": (lambda model: model.to("cpu"), InputError),
    "half": (lambda model: model.half(), InputError),
    "process_weights": (lambda model: model.process_weights(center_unembed=True), TransformError),
    "dequantize": (lambda model: model.dequantize(), InputError),
    "to_hf": (lambda model: model.to_hf(), UnsupportedModelError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_weights_or_hold_them_all_is_refused(what, folder):
    model = on_disk("grouped", folder)
    expected = frozen("grouped")
    change, error = REFUSED[what]
    with torch.no_grad(), pytest.raises(error, match=r"on the disk \(offloaded\)"):
        change(model)
    assert set(model.offloaded.values()) == {"disk"}
    same(model(IDS), expected(IDS))


def test_placements_that_do_not_go_together_are_refused(folder):
    model = make_model("learned, tied")
    parts = dict.fromkeys(model.device_map, "cpu")
    for places, options, message in (
        ({"": "disk"}, {}, "on 'disk', and no offload_folder was given"),
        ({"": "cpu"}, {"offload_folder": folder}, "device_map puts none there"),
        ({**parts, "embed": "disk"}, {"offload_folder": folder}, "'unembed' on cpu, but the unembedding is tied"),
        ({"": "disk"}, {"offload_folder": folder, "execution_device": "meta"}, "'meta', where tensors have no values"),
        ({"": "disk"}, {"offload_folder": 3}, "offload_folder"),
    ):
        with pytest.raises(InputError, match=message):
            model.dispatch(places, **options)
    assert model.offloaded == {}
    assert not folder.exists()
    with pretending(), pytest.raises(InputError, match="execution_device='lazy:0' says where parts on 'cpu'"):
        model.dispatch({"": SECOND}, execution_device=FIRST)


# Networks that compute on another device.

PLACES = {
    "the disk": (lambda parts: dict.fromkeys(parts, "disk"), {"execution_device": FIRST}),
    "the CPU": (lambda parts: dict.fromkeys(parts, "cpu"), {"execution_device": FIRST}),
    "blocks on the disk": (
        lambda parts: {part: "disk" if part.startswith("blocks") else FIRST for part in parts},
        {},
    ),
}


# Every network in one place, and one in every place; the others are slow.
@pytest.mark.parametrize(
    ("network", "where"),
    [
        pytest.param(network, where, marks=() if where == "the disk" or network == "grouped" else pytest.mark.slow)
        for network in CONFIGS
        for where in PLACES
    ],
)
def test_weights_are_brought_to_the_device(network, where, folder):
    make_places, options = PLACES[where]
    with pretending():
        plain = frozen(network).to(FIRST)
        model = make_model(CONFIGS[network]).requires_grad_(False)
        places = make_places(model.device_map)
        if "disk" in places.values():
            options = {**options, "offload_folder": folder}
        model.dispatch(places, **options)
        assert model.devices == (FIRST,)
        assert set(model.offloaded.values()) == {"cpu" if where == "the CPU" else "disk"}
        logits, cache = model.run_with_cache(IDS, attention_mask=MASK, names_filter="*")
        expected, wanted = plain.run_with_cache(IDS, attention_mask=MASK, names_filter="*")
        assert logits.device == FIRST
        same(logits, expected)
        for name in wanted:
            assert cache[name].device == FIRST
            same(cache[name], wanted[name])
        found, wanted = gradients(model), gradients(plain)
        compared = [name for name in wanted if name.endswith("_grad")][:2]
        assert len(compared) == 2
        for name in compared:
            same(found[name], wanted[name])
        prefix = IDS[:1, :4]
        same(
            model(IDS[:, 4:], past_kv_cache=model.prefill(prefix)),
            plain(IDS[:, 4:], past_kv_cache=plain.prefill(prefix)),
        )
        for name, weight in plain.named_weights().items():
            assert model.named_weights()[name].device == FIRST
            same(model.named_weights()[name] * 1, weight)
        back = copy.deepcopy(model).dispatch({"": SECOND})
        assert (back.offloaded, back.devices) == ({}, (SECOND,))
        same(back.requires_grad_(False)(IDS, attention_mask=MASK), expected)


def test_where_parts_compute(folder):
    """A part on the CPU computes there, unless a device is named; one on the disk on the first accelerator."""
    with pretending():
        parts = list(make_model("rotary").device_map)
        for places, options, devices, lies in (
            (("cpu", "disk", SECOND, FIRST, FIRST), {}, (CPU, SECOND, SECOND, FIRST, FIRST), {"blocks.0": "disk"}),
            (("cpu", "disk", "cpu", "cpu", "cpu"), {}, (CPU,) * 5, {"blocks.0": "disk"}),
            (
                ("cpu", "disk", SECOND, FIRST, FIRST),
                {"execution_device": FIRST},
                (FIRST, FIRST, SECOND, FIRST, FIRST),
                {"embed": "cpu", "blocks.0": "disk"},
            ),
            (
                (SECOND, "disk", SECOND, FIRST, "cpu"),
                {"execution_device": "cpu"},
                (SECOND, CPU, SECOND, FIRST, CPU),
                {"blocks.0": "disk"},
            ),
        ):
            model = make_model("rotary").dispatch(
                dict(zip(parts, places, strict=True)), offload_folder=folder, **options
            )
            assert tuple(model.device_map.values()) == devices
            assert model.offloaded == lies
            torch.testing.assert_close(model(IDS).cpu(), frozen("rotary")(IDS), rtol=0, atol=1e-10)


def test_one_weight_at_a_time_is_on_the_device(monkeypatch):
    """In the forward and in the backward pass: autograd keeps the weight where it lies, and not what was brought."""
    alive, most, brought = weakref.WeakSet(), [], OffloadedTensor.bring

    def bring(tensor):
        made = brought(tensor)
        alive.add(made)
        most.append(len(alive))
        return made

    with pretending():
        model = make_model("grouped").dispatch({"": "cpu"}, execution_device=FIRST)
        monkeypatch.setattr(OffloadedTensor, "bring", bring)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            stream = torch.full((2, 7, model.cfg.d_model), 0.5, dtype=torch.float64).to(FIRST).requires_grad_()
            loss = model(stream, start_at_layer=0).sum()
        n_brought = len(most)
        assert n_brought >= 7 * model.cfg.n_layers
        loss.backward()
        assert len(most) > n_brought
    # A map reads its weight and its bias.
    assert max(most) <= 2
    shapes = {tuple(one.shape) for one in model.parameters() if one.ndim > 1}
    weights = [one for one in kept if tuple(one.shape) in shapes or tuple(one.shape)[::-1] in shapes]
    assert len(weights) >= 6
    assert all(isinstance(one, OffloadedTensor) for one in weights)


def test_every_config_is_tried():
    assert set(ALL_CONFIGS) <= set(CONFIGS)
