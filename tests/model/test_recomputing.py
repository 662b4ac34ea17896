"""Tests of gradient checkpointing: the same gradients, bit for bit, and every listener hears a block once."""

import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.config import RotaryPositions
from hooklens.errors import HookLensError, InputError
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens

TOKENS = random_tokens(2, 5)
POINTS = [
    "hook_embed",
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_pattern",
    "blocks.2.mlp.hook_post",
    "*ln2*scale",
]


def build(**changes) -> HookedCausalLM:
    return make_model(make_config(n_layers=4, positions=RotaryPositions(dim=4), **changes)).train()


def gradients_of(model, run, *, checkpoints: bool):
    """What a run and its backward pass give, with the same random numbers."""
    (model.gradient_checkpointing_enable if checkpoints else model.gradient_checkpointing_disable)()
    model.zero_grad()
    torch.manual_seed(3)
    loss = run(model)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters()), torch.rand(1)]


def plain(model):
    return model(TOKENS, return_type="loss")


def edited(model):
    some = [edits.Scale("blocks.1.hook_resid_post", 1.5), edits.Zero("blocks.2.attn.hook_z", head=1)]
    return model.run_with_hooks(TOKENS, return_type="loss", edits=some)


def captured(model):
    return model.run_with_cache(TOKENS, return_type="loss", names_filter=POINTS)[0]


@pytest.mark.parametrize("run", [plain, edited, captured])
@pytest.mark.parametrize(
    "changes", [{}, {"wiring": "parallel"}, {"resid_dropout": 0.3, "attn_dropout": 0.2, "embed_dropout": 0.1}]
)
def test_gradients_are_those_without(changes, run):
    model = build(**changes)
    found, expected = (gradients_of(model, run, checkpoints=flag) for flag in (True, False))
    assert all(map(torch.equal, found, expected))


def test_blocks_are_recomputed_and_keep_only_the_stream():
    """Every block runs a second time in the backward pass, but the one that somebody listens inside of."""
    model = build()
    model.gradient_checkpointing_enable()
    runs = []
    for layer, block in enumerate(model.block_list()):
        block.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
    heard = []
    hooks = [
        ("blocks.2.hook_mlp_out", lambda tensor, hook: heard.append(hook.name)),
        ("blocks.*.hook_resid_post", lambda tensor, hook: heard.append(hook.name)),
    ]
    loss = model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks)
    assert runs == [0, 1, 2, 3]
    before = list(heard)
    loss.backward()
    assert runs == [0, 1, 2, 3, 3, 1, 0]
    assert heard == before
    assert sorted(heard) == sorted(["blocks.2.hook_mlp_out", *(f"blocks.{i}.hook_resid_post" for i in range(4))])


def test_gradients_at_hook_points_are_those_without():
    model = build()
    caches = []
    for flag in (True, False):
        (model.gradient_checkpointing_enable if flag else model.gradient_checkpointing_disable)()
        _, cache = model.run_with_cache(TOKENS, return_type="loss", names_filter=POINTS, incl_bwd=True)
        caches.append(cache)
    assert caches[0].keys() == caches[1].keys()
    assert all(torch.equal(caches[0][name], caches[1][name]) for name in caches[0])


def test_a_hook_of_the_model_fires_once():
    model, heard = build(), []
    model.gradient_checkpointing_enable()
    model.add_hook("blocks.*.hook_resid_pre", lambda tensor, hook: heard.append(hook.name))
    model(TOKENS, return_type="loss").backward()
    assert heard == [f"blocks.{layer}.hook_resid_pre" for layer in range(4)]


def test_a_hook_attached_between_the_passes_is_refused():
    """It would hear a block in the backward pass of a call that it was not part of."""
    model = build()
    model.gradient_checkpointing_enable()
    loss = model(TOKENS, return_type="loss")
    model.add_hook("blocks.1.hook_mlp_out", lambda tensor, hook: None)
    with pytest.raises(HookLensError, match="Attach hooks before the call"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (({"use_reentrant": True},), "has use_reentrant=True; expected False. The reentrant way"),
        (
            ({"use_reentrant": 1, "debug": True},),
            "has use_reentrant=1, debug=True; what is done is use_reentrant=False",
        ),
        (({"preserve_rng_state": False},), "has preserve_rng_state=False; what is done"),
        (([],), r"gradient_checkpointing_kwargs is \[\], expected a mapping of options, or None"),
    ],
)
def test_other_ways_to_recompute_are_refused(options, said):
    """`Trainer` gives options of torch's function; they are done or refused, and leave the model as it was."""
    model = build()
    with unchecked(), pytest.raises(InputError, match=said):
        model.gradient_checkpointing_enable(*options)
    for every, match in ((0, "every_n_layers is 0, expected"), (True, "every_n_layers is True, expected")):
        with unchecked(), pytest.raises(InputError, match=match):
            model.gradient_checkpointing_enable(every_n_layers=every)
    with pytest.raises(InputError, match=r"offload=True is not offered; .*save_on_cpu"):
        model.gradient_checkpointing_enable(offload=True)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": None, "preserve_rng_state": True})
    assert model.is_gradient_checkpointing


def test_every_nth_block_is_recomputed():
    model = build()
    expected = gradients_of(model, plain, checkpoints=False)
    runs = []
    for layer, block in enumerate(model.block_list()):
        block.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
    model.gradient_checkpointing_enable(every_n_layers=3)
    model.zero_grad()
    torch.manual_seed(3)
    model(TOKENS, return_type="loss").backward()
    assert runs == [0, 1, 2, 3, 3, 0]
    assert all(map(torch.equal, [p.grad for p in model.parameters()], expected[1:-1]))
