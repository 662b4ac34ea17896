"""Modules of others in the place of hook points and parts of a network."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooklens import HookedCausalLM, HookPoint, edits
from hooklens.errors import HookLensError, HookOutputError, InputError
from hooklens.hooks import Call
from tests.slow_cases import slow_but

MODELS = ("tiny-gpt-neox", "tiny-llama", "tiny-falcon")
IDS = torch.tensor([[0, 27, 99, 12, 5, 40]])


class Times(nn.Module):
    """Multiplies; with a hook point of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.hook_inside = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hook_inside(x * self.factor)
        return out


@cache
def _load(name: str) -> HookedCausalLM:
    return HookedCausalLM.from_pretrained(f"bundled:{name}").double()


def fresh(name: str) -> HookedCausalLM:
    return copy.deepcopy(_load(name))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    place, _, name = path.rpartition(".")
    setattr(model.get_submodule(place), name, module)


@pytest.mark.parametrize("name", MODELS)
def test_at_every_hook_point(name: str) -> None:
    """A module that gives what it takes changes nothing; one that doubles is the edit that does."""
    model = HookedCausalLM.from_pretrained(f"bundled:{name}", layers=[0, 1]).double()
    expected = model(IDS)
    for point in model.hook_points():
        if point == "hook_tokens":
            continue
        before = model.get_submodule(point)
        doubled = model.run_with_hooks(IDS, edits=[edits.Scale(point, 2)])
        put(model, point, Times(1.0))
        assert point not in model.hook_points()
        torch.testing.assert_close(model(IDS), expected, atol=1e-9, rtol=1e-9)
        put(model, point, Times(2.0))
        torch.testing.assert_close(model(IDS), doubled, atol=1e-9, rtol=1e-9)
        put(model, point, HookPoint())
        after: Any = model.get_submodule(point)
        assert (after.site, after.shared, after.name) == (before.site, before.shared, before.name)  # type: ignore[union-attr]
        assert torch.equal(model(IDS), expected)
        assert torch.equal(model.run_with_hooks(IDS, edits=[edits.Scale(point, 2)]), doubled)


def test_it_is_itself() -> None:
    model, module = fresh("tiny-llama"), Times(1.0)
    model.blocks[0].hook_resid_post = module
    assert model.blocks[0].hook_resid_post is module
    assert isinstance(module, Times)
    assert dict(model.named_modules())["blocks.0.hook_resid_post"] is module
    assert torch.equal(module(torch.ones(2)), torch.ones(2))


def test_points_inside_hear_the_call() -> None:
    model = fresh("tiny-llama")
    model.blocks[0].hook_resid_post = Times(2.0)
    inside = "blocks.0.hook_resid_post.hook_inside"
    assert inside in model.hook_points()
    logits, cache = model.run_with_cache(IDS, names_filter=[inside, "blocks.1.hook_resid_pre"])
    assert torch.equal(cache[inside], cache["blocks.1.hook_resid_pre"])
    halved = model.run_with_hooks(IDS, fwd_hooks=[(inside, lambda x, hook: x / 2)])
    torch.testing.assert_close(halved, fresh("tiny-llama")(IDS))
    seen: list[str] = []
    with model.hooks([(inside, lambda x, hook: seen.append(hook.name))]):
        model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: None)])
    assert seen == [inside]
    assert not torch.equal(logits, halved)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["blocks.1.mlp", "blocks.0.ln1", "ln_final", "unembed"])
def test_in_the_place_of_a_part(name: str, part: str) -> None:
    """What is inside is the part that was there, and its points go on hearing the call."""

    class Around(nn.Module):
        def __init__(self, old: nn.Module) -> None:
            super().__init__()
            self.hook_in, self.old, self.hook_out = HookPoint(), old, HookPoint()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.hook_out(self.old(self.hook_in(x)))
            return out

    model = fresh(name)
    expected = model(IDS)
    old = model.get_submodule(part)
    put(model, part, Around(old))
    assert torch.equal(model(IDS), expected)
    names = [one for one in model.hook_points() if one.startswith(f"{part}.")]
    assert {f"{part}.hook_in", f"{part}.hook_out"} <= set(names)
    logits, cache = model.run_with_cache(IDS, names_filter=names)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert set(cache) == set(names)
    zeroed = model.run_with_hooks(IDS, fwd_hooks=[(f"{part}.hook_out", lambda x, hook: x * 0)])
    assert not torch.allclose(zeroed, expected)


def test_the_embedding_stays() -> None:
    """The network asks it for its device and dtype, and reads positions and ids by it."""
    model = fresh("tiny-llama")
    with pytest.raises(InputError, match="embed: only a part of the network's own kind can stand there"):
        model.embed = Times(1.0)
    assert torch.equal(model(IDS), _load("tiny-llama")(IDS))


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama"])
def test_attention_takes_more_than_a_tensor(name: str) -> None:
    """It was called with all that attention takes, and failed there."""

    class Around(nn.Module):
        def __init__(self, old: nn.Module) -> None:
            super().__init__()
            self.old, self.hook_given = old, HookPoint()

        def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
            call = next(one for one in (*arguments, *keywords.values()) if isinstance(one, Call))
            out: Tensor = self.hook_given(self.old(*arguments, **keywords), call)
            return out

    model = fresh(name)
    with pytest.raises(InputError, match=r"attn: only a part .* got a Identity"):
        model.blocks[0].attn = nn.Identity()
    assert torch.equal(model(IDS), _load(name)(IDS))
    model.blocks[0].attn = Around(model.blocks[0].attn)
    assert torch.equal(model(IDS), _load(name)(IDS))
    doubled = model.run_with_hooks(IDS, edits=[edits.Scale("blocks.0.attn.hook_given", 2)])
    assert torch.equal(doubled, _load(name).run_with_hooks(IDS, edits=[edits.Scale("blocks.0.hook_attn_out", 2)]))


def test_a_forward_of_ones_own() -> None:
    model = fresh("tiny-llama")
    expected = model(IDS)
    mlp = model.blocks[1].mlp
    mlp.hook_in = HookPoint()
    original: Callable[..., Tensor] = mlp.forward
    mlp.forward = lambda x: original(mlp.hook_in(x))
    assert torch.equal(model(IDS), expected)
    _, cache = model.run_with_cache(IDS, names_filter=["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"])
    assert len(cache) == 2
    assert not torch.allclose(model.run_with_hooks(IDS, edits=[edits.Zero("blocks.1.mlp.hook_in")]), expected)


def test_gradients_and_copies() -> None:
    model = fresh("tiny-llama")
    model.blocks[0].hook_mlp_out = nn.Linear(model.cfg.d_model, model.cfg.d_model).double()
    other = copy.deepcopy(model)
    loss = other(IDS, return_type="loss")
    loss.backward()
    assert other.blocks[0].hook_mlp_out.weight.grad is not None
    assert model.blocks[0].hook_mlp_out.weight.grad is None
    assert "blocks.0.hook_mlp_out.weight" in model.state_dict()


def test_another_shape_at_a_side_tensor_is_refused() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1]

    model = fresh("tiny-llama")
    model.blocks[0].attn.hook_pattern = Cut()
    with pytest.raises(Exception, match=r"Cut in the place of a hook point gave \[1, 1, 6, 6\]"):
        model(IDS)


class Wrapped(nn.Module):
    """A part, doubled."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.old = old

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self.old(x)
        return out


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_it_is_pickled_as_it_was(way: str) -> None:
    """Its class, made for the place, could not be found again."""
    model = fresh("tiny-gpt-neox")
    model.blocks[0].hook_resid_post, model.blocks[1].mlp = Times(1.5), Wrapped(model.blocks[1].mlp)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert torch.equal(again(IDS), model(IDS))
    assert list(again.hook_points()) == list(model.hook_points())
    alone = pickle.loads(pickle.dumps(model.blocks[0].hook_resid_post))
    assert type(alone) is Times
    again.blocks[0].hook_resid_post = HookPoint()
    again.blocks[1].mlp = again.blocks[1].mlp.old
    assert torch.equal(again(IDS), _load("tiny-gpt-neox")(IDS))


def test_another_dtype_is_refused() -> None:
    """Its half precision went on unseen, and was cast where the next sum was taken."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half()

    model = fresh("tiny-gpt-neox")
    model.blocks[0].hook_mlp_out = Half()
    with pytest.raises(HookOutputError, match=r"Half .* gave \[1, 6, 128\], torch.float16 .* Nothing is broadcast"):
        model(IDS)


def test_an_edit_in_place_reaches_what_follows_only() -> None:
    """It reached what had been captured before it."""

    class Cleared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.zero_()

    model = fresh("tiny-gpt-neox")
    name = "blocks.0.hook_resid_post"
    _, expected = model.run_with_cache(IDS, names_filter=name)
    model.blocks[1].hook_resid_pre = Cleared()
    _, cache = model.run_with_cache(IDS, names_filter=name)
    assert torch.equal(cache[name], expected[name])


def test_what_cannot_stand_in_a_place_is_refused() -> None:
    """It ended in an error of Python's inside the call, or was called otherwise than it says."""

    class Listening(nn.Module):
        def listens(self) -> bool:
            return True

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = fresh("tiny-gpt-neox")
    with pytest.raises(HookLensError, match=r"Block.mlp: a Listening has \['listens'\]"):
        model.blocks[0].mlp = Listening()
    model.blocks[0].hook_mlp_out = both = nn.Identity()
    with pytest.raises(HookLensError, match="already stands in the place of a HookPoint"):
        model.blocks[1].mlp = both
    assert model(IDS).isfinite().all()


class Double(nn.Module):
    """Takes the place of a part, and has nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("part", "name"),
    slow_but(
        product(["blocks.1.mlp", "blocks.0.ln1", "ln_final"], MODELS),
        [("blocks.1.mlp", "tiny-falcon"), ("blocks.0.ln1", "tiny-llama"), ("ln_final", "tiny-gpt-neox")],
    ),
)
def test_weights_of_what_was_there_are_let_go(part: str, name: str) -> None:
    """They stayed in memory and in pickles as long as the model did."""
    model = fresh(name)
    size = len(pickle.dumps(model))
    held = [weakref.ref(one) for one in model.get_submodule(part).parameters()]
    n_bytes = sum(one.nbytes for one in model.get_submodule(part).parameters())
    assert held
    put(model, part, Double())
    gc.collect()
    assert not [one for one in held if one() is not None]
    assert len(pickle.dumps(model)) < size - n_bytes + 60_000
    expected = model(IDS)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(IDS), expected)
        put(again, part, copy.deepcopy(_load(name).get_submodule(part)))
        assert torch.equal(again(IDS), _load(name)(IDS))


def test_weights_that_are_gone_are_not_read() -> None:
    """Those of the part that had stood there were given as the new one's."""
    model = fresh("tiny-gpt-neox")
    model.blocks[1].mlp = Double()
    with pytest.raises(AttributeError, match=r"Double has no 'W_in'; the weights of the MLP that stood in its place"):
        _ = model.blocks[1].mlp.W_in
    assert model.blocks[1].mlp.cfg == model.cfg, "what it was is still told"
