"""Hook points and their modules, as code for TransformerLens 2.x uses them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooklens.compat.transformer_lens.hook_points import HookedRootModule, HookPoint


class Twice(HookedRootModule):
    """A module of one's own: x + 2 x, each half at a point."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.linear.weight)
        self.hook_in = HookPoint()
        self.inside = nn.Module()
        self.inside.hook_out = HookPoint()
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_in(self.linear(x))
        out: Tensor = self.inside.hook_out(2 * x)
        return x + out


def seen_by(model: HookedRootModule) -> tuple[list[str], Any]:
    seen: list[str] = []

    def see(activation: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        seen.append(hook.name)

    return seen, see


def test_setup_names_modules_and_points() -> None:
    model = Twice()
    assert list(model.hook_dict) == ["hook_in", "inside.hook_out"]
    assert set(model.mod_dict) == {"linear", "hook_in", "inside", "inside.hook_out"}
    assert model.hook_dict["inside.hook_out"].name == "inside.hook_out"
    assert list(model.hook_points()) == list(model.hook_dict.values())


def test_hooks_replace_and_edit_in_place() -> None:
    model, x = Twice(), torch.ones(1, 3)

    def edit(activation: Tensor, hook: HookPoint) -> None:
        activation[:, 0] = 0

    assert model.run_with_hooks(x, fwd_hooks=[("inside.hook_out", lambda a, hook: a * 0)]).tolist() == [[1, 1, 1]]
    assert model.run_with_hooks(x, fwd_hooks=[("inside.hook_out", edit)]).tolist() == [[1, 3, 3]]
    assert model(x).tolist() == [[3, 3, 3]]


def test_a_filter_function_chooses_points() -> None:
    model = Twice()
    seen, see = seen_by(model)
    model.run_with_hooks(torch.ones(1, 3), fwd_hooks=[(lambda name: name.endswith("out"), see)])
    assert seen == ["inside.hook_out"]


def test_levels() -> None:
    """A hook at level 1 is removed by the next run of hooks; one without a level, and a permanent one, stay."""
    model = Twice()
    seen, see = seen_by(model)
    model.add_hook("hook_in", see)
    model.add_hook("hook_in", see, "fwd", level=1)
    model.add_perma_hook("inside.hook_out", see)
    counts = []
    for run in (model, model.run_with_hooks, model, model.run_with_cache):
        seen.clear()
        run(torch.ones(1, 3))
        counts.append(len(seen))
    assert counts == [3, 3, 2, 2]
    model.reset_hooks()
    assert [point.has_hooks() for point in model.hook_points()] == [False, True]
    assert model.hook_dict["inside.hook_out"].has_hooks(including_permanent=False) is False
    model.reset_hooks(including_permanent=True)
    assert not any(point.has_hooks() for point in model.hook_points())


def test_context_levels_nest() -> None:
    model = Twice()
    seen, see = seen_by(model)
    with model.hooks([("hook_in", see)]):
        assert model.context_level == 1
        assert model.hook_dict["hook_in"].has_hooks(level=1)
        with model.hooks([("inside.hook_out", see)]):
            assert model.hook_dict["inside.hook_out"].has_hooks(level=2)
            model(torch.ones(1, 3))
        model(torch.ones(1, 3))
    model(torch.ones(1, 3))
    assert seen == ["hook_in", "inside.hook_out", "hook_in"]
    assert model.context_level == 0


def test_hooks_go_when_a_block_fails() -> None:
    model = Twice()
    with pytest.raises(RuntimeError, match="stop"), model.hooks([("hook_in", lambda a, hook: None)]):
        raise RuntimeError("stop")
    assert model.context_level == 0
    assert not model.hook_dict["hook_in"].has_hooks()


def test_reset_hooks_end_leaves_hooks(caplog: pytest.LogCaptureFixture) -> None:
    model = Twice()
    model.run_with_hooks(torch.ones(1, 3), fwd_hooks=[("hook_in", lambda a, hook: a * 2)], reset_hooks_end=False)
    assert model(torch.ones(1, 3)).tolist() == [[6, 6, 6]]
    model.reset_hooks()
    model.run_with_hooks(torch.ones(1, 3), bwd_hooks=[("hook_in", lambda a, hook: a)])
    assert "reset_hooks_end=False" in caplog.text


@pytest.mark.parametrize("wrap", [lambda gradient: gradient, lambda gradient: (gradient,)])
def test_backward_hooks(wrap: Any) -> None:
    """The gradient comes bare, and goes back bare or as a tuple of one."""
    model, x = Twice(), torch.ones(1, 3, requires_grad=True)
    found = []

    def double(gradient: Tensor, hook: HookPoint) -> Any:
        found.append(gradient.tolist())
        return wrap(gradient * 2)

    with model.hooks(bwd_hooks=[("hook_in", double)]):
        model(x).sum().backward()
    assert found == [[[3, 3, 3]]]
    assert x.grad is not None
    assert x.grad.tolist() == [[6, 6, 6]]


def test_prepend_and_order() -> None:
    model, order = Twice(), []
    point = model.hook_dict["hook_in"]
    for name, prepend in (("a", False), ("b", False), ("c", True)):
        point.add_hook(lambda a, hook, name=name: order.append(name), prepend=prepend)
    model(torch.ones(1, 3))
    assert order == ["c", "a", "b"]
    assert len(point.fwd_hooks) == 3
    point.fwd_hooks[0].hook.remove()
    assert len(point.fwd_hooks) == 2


def test_directions_are_checked() -> None:
    point = HookPoint()
    for act in (lambda: point.add_hook(print, dir="sideways"), lambda: point.remove_hooks(dir="sideways")):
        with pytest.raises(ValueError, match="Invalid direction sideways"):
            act()
    with pytest.raises(ValueError, match="None"):
        point.layer()
    with pytest.raises(KeyError):
        Twice().add_hook("hook_typo", print)


def test_contexts() -> None:
    model = Twice()
    point = model.hook_dict["hook_in"]
    point.ctx["kept"] = 1
    model.reset_hooks(clear_contexts=False)
    assert point.ctx == {"kept": 1}
    model.clear_contexts()
    assert point.ctx == {}


def test_caching() -> None:
    model, x = Twice(), torch.ones(2, 3, requires_grad=True)
    out, cache = model.run_with_cache(x)
    assert list(cache) == ["hook_in", "inside.hook_out"]
    assert not cache["hook_in"].requires_grad
    assert torch.equal(out, cache["hook_in"] + cache["inside.hook_out"])
    assert list(model.run_with_cache(x, names_filter="hook_in")[1]) == ["hook_in"]
    assert list(model.run_with_cache(x, names_filter=["inside.hook_out"])[1]) == ["inside.hook_out"]
    kept = model.add_caching_hooks(lambda name: name.startswith("inside"))
    model(x)
    assert list(kept) == ["inside.hook_out"]


def test_a_name_that_is_no_point_is_told(caplog: pytest.LogCaptureFixture) -> None:
    _, cache = Twice().run_with_cache(torch.ones(1, 3), names_filter=["hook_in", "hook_typo"])
    assert list(cache) == ["hook_in"]
    assert "hook_typo" in caplog.text


def test_caching_gradients() -> None:
    class Sum(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    _, cache = Sum().run_with_cache(torch.ones(1, 3), incl_bwd=True)
    assert list(cache) == ["hook_in", "inside.hook_out", "inside.hook_out_grad", "hook_in_grad"]
    assert cache["hook_in_grad"].tolist() == [[3, 3, 3]]


def test_modules_of_ones_own_may_change_shapes() -> None:
    point = HookPoint()
    point.add_hook(lambda a, hook: a[:1])
    assert point(torch.ones(2, 3)).shape == (1, 3)
