"""Tests of hooklens.hooks.point on points of their own, outside any model."""

import functools

import pytest
import torch

from hooklens.axes import find_site
from hooklens.errors import HookLensError, HookNameError, HookOutputError
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.call import Hook, Listening
from tests.annotations import unchecked


def in_place(edit):
    """A hook that edits its tensor and returns nothing."""

    def hook_fn(tensor, hook):
        edit(tensor)

    return hook_fn


def named_point(name="blocks.1.hook_resid_post", **options):
    point = HookPoint(find_site(name), **options)
    point.name = name
    return point


class Keeper:
    """A watcher that keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def keep(self, tensor, point, call):
        self.seen.append(tensor)


def test_nobody_listening_gives_the_very_tensor():
    x = torch.randn(2, 3)
    point = HookPoint()
    assert point(x) is x
    assert not point.listening


def test_hooks_run_in_order_and_see_what_earlier_ones_made():
    point, seen = HookPoint(), []
    point.add_hook(lambda t, hook: t + 1)
    point.add_hook(lambda t, hook: seen.append(t.clone()))
    point.add_hook(lambda t, hook: t * 2, prepend=True)
    assert point(torch.tensor([3.0])) == 7
    assert seen == [7]


def test_in_place_edits_and_none_keep_the_tensor():
    point = HookPoint()
    point.add_hook(in_place(torch.Tensor.zero_))
    point.add_hook(lambda t, hook: None)
    x = torch.ones(2)
    x_before = x.clone()
    with point.add_hook(lambda t, hook: t.add_(5)):
        out = point(x.clone())
    assert out.tolist() == [5, 5]
    assert torch.equal(x, x_before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda tensor, hook: tensor * 2,
        lambda: lambda tensor, point: tensor * 2,
        lambda: functools.partial(lambda factor, tensor, hook: tensor * factor, 2),
        lambda: functools.partial(lambda tensor, factor, hook: tensor * factor, factor=2),
    ],
    ids=["hook", "other word", "partial", "partial by keyword"],
)
def test_signatures(make):
    point = HookPoint()
    point.add_hook(make())
    assert point(torch.ones(1)) == 2


def test_layer_and_context():
    point = named_point("blocks.12.attn.hook_z")
    point.add_hook(lambda t, hook: hook.ctx.setdefault("seen", []).append((hook.name, hook.layer())))
    point(torch.zeros(1))
    point(torch.zeros(1))
    assert point.ctx == {"seen": [("blocks.12.attn.hook_z", 12)] * 2}
    with pytest.raises(HookNameError, match="hook point 'hook_embed' does not belong to a layer"):
        named_point("hook_embed").layer()
    with pytest.raises(HookNameError, match="hook point None does not belong"):
        HookPoint().layer()


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (torch.zeros(1, 3, 4), r"shape \[1, 3, 4\], torch.float32 on cpu"),
        (torch.zeros(2, 3), r"shape \[2, 3\]"),
        (
            torch.zeros(2, 3, 4, dtype=torch.float64),
            r"torch.float64 on cpu; expected \[2, 3, 4\], torch.float32 on cpu",
        ),
        (torch.zeros(2, 3, 4, device="meta"), r"torch.float32 on meta"),
    ],
)
def test_a_replacement_must_be_like_the_tensor(returned, found):
    """A hook that returned [1, ...] for a batch of 2 was broadcast without a word."""
    point = named_point()
    point.add_hook(lambda t, hook: returned)
    with pytest.raises(HookOutputError, match=found) as caught:
        point(torch.zeros(2, 3, 4))
    text = str(caught.value)
    assert text.startswith("hook at 'blocks.1.hook_resid_post' [batch=2, pos=3, d_model=4] returned")
    assert "Nothing is broadcast, cast or moved" in text


@pytest.mark.parametrize("returned", [3.0, (torch.zeros(2),), True, [torch.zeros(2)]])
def test_a_replacement_must_be_a_tensor(returned):
    point = named_point()
    point.add_hook(lambda t, hook: returned)
    with (
        unchecked(),
        pytest.raises(HookOutputError, match=rf"returned a {type(returned).__name__}; expected None \(keep"),
    ):
        point(torch.zeros(2, 3, 4))


def test_a_backward_replacement_must_be_like_the_gradient():
    point = named_point()
    point.add_hook(lambda g, hook: g[:1], dir="bwd")
    x = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(
        HookOutputError, match=r"backward hook at 'blocks.1.hook_resid_post' .*returned shape \[1, 3, 4\]"
    ):
        point(x * 1).sum().backward()


def test_what_is_no_hook_is_refused():
    with unchecked():
        with pytest.raises(HookLensError, match=r"a hook must be a function fn\(tensor, hook\), got int"):
            HookPoint().add_hook(3)
        with pytest.raises(HookLensError, match="hook direction is 'both'; expected 'fwd' or 'bwd'"):
            HookPoint().add_hook(print, dir="both")


def test_handles_remove_once_and_as_context_managers_on_any_exception():
    point = HookPoint()
    handle = point.add_hook(lambda t, hook: t + 1)
    other = point.add_hook(lambda t, hook: t + 10)
    handle.remove()
    handle.remove()
    assert point(torch.zeros(1)) == 10
    with pytest.raises(KeyboardInterrupt), other:
        raise KeyboardInterrupt
    assert not point.listening


def test_the_same_function_twice_is_two_hooks():
    point = HookPoint()

    def add_one(t, hook):
        return t + 1

    first, second = point.add_hook(add_one), point.add_hook(add_one)
    assert point(torch.zeros(1)) == 2
    first.remove()
    assert point(torch.zeros(1)) == 1
    second.remove()
    assert not point.listening


def test_a_hook_may_remove_itself_while_it_runs():
    point, handles = HookPoint(), []
    handles.append(point.add_hook(lambda t, hook: handles[0].remove()))
    point.add_hook(lambda t, hook: t + 1)
    assert [point(torch.zeros(1)).item() for _ in range(2)] == [1, 1]


def test_remove_hooks_keeps_permanent_ones_unless_asked():
    point = HookPoint()
    point.add_hook(lambda t, hook: t + 1, is_permanent=True)
    point.add_hook(lambda t, hook: t + 10)
    point.remove_hooks(dir="bwd")
    assert point(torch.zeros(1)) == 11
    point.remove_hooks()
    assert point(torch.zeros(1)) == 1
    point.remove_hooks(including_permanent=True)
    assert not point.listening


class TestShared:
    def test_an_in_place_edit_does_not_reach_the_tensor_that_came_in(self):
        point = HookPoint(shared=True)
        point.add_hook(in_place(torch.Tensor.zero_))
        x = torch.ones(3)
        assert point(x).sum() == 0
        assert x.sum() == 3

    def test_watching_gives_the_very_tensor_back(self):
        point = HookPoint(shared=True)
        point.add_hook(lambda t, hook: None)
        x = torch.ones(3)
        assert point(x) is x

    def test_a_gradient_hook_sees_only_its_own_branch(self):
        point, seen = HookPoint(shared=True), []
        point.add_hook(lambda g, hook: seen.append(g.clone()), dir="bwd")
        x = torch.ones(3, requires_grad=True) * 1
        (point(x) * 5 + x * 2).sum().backward()
        assert seen[0].tolist() == [5, 5, 5]


class TestWatch:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize(
        ("fn", "changed"),
        [
            (lambda t, hook: None, False),
            (lambda t, hook: t, False),
            (lambda t, hook: t.mul_(2), True),
            (in_place(lambda t: t[0].zero_()), True),
            (in_place(lambda t: t.detach().view(-1)[1:].zero_()), True),
            (lambda t, hook: t.clone(), True),
            (lambda t, hook: t * 2, True),
        ],
    )
    def test_verdict(self, mode, fn, changed):
        with mode():
            point = HookPoint()
            point.add_hook(fn)
            x = torch.arange(1.0, 7.0).view(2, 3)
            out, verdict = point.watch(x, Call())
            assert verdict is changed
            if not changed:
                assert out is x

    def test_several_hooks_make_one_verdict(self):
        point = HookPoint()
        point.add_hook(in_place(lambda t: t.mul_(2)))
        point.add_hook(lambda t, hook: None)
        assert point.watch(torch.ones(1), Call())[1]

    def test_captures_are_no_change_and_see_the_edited_tensor(self):
        point, keeper = HookPoint(), Keeper()
        call = Call({point: Listening(watchers=[keeper])})
        x = torch.ones(2)
        out, changed = point.watch(x, call)
        assert out is x
        assert not changed
        point.add_hook(lambda t, hook: t + 1)
        assert point.watch(x, call)[1]
        assert keeper.seen[0] is x
        assert keeper.seen[1].tolist() == [2, 2]

    def test_hooks_of_a_call_come_after_the_points_own(self):
        point, seen = HookPoint(), []
        late = Hook(lambda t, hook: seen.append(t.clone()), point)
        point.add_hook(lambda t, hook: t + 1)
        point.watch(torch.ones(1), Call({point: Listening([late])}))
        assert seen == [2]

    def test_retain_grad_and_register_hook_ask_for_the_graph(self):
        for tap in (lambda t: t.retain_grad(), lambda t: t.register_hook(lambda g: None)):
            point = HookPoint()
            point.add_hook(in_place(tap))
            assert point.watch(torch.ones(2, requires_grad=True) * 1, Call())[1]


class TestGradientHooks:
    def test_a_gradient_can_be_replaced(self):
        point = HookPoint()
        point.add_hook(lambda g, hook: g * 10, dir="bwd")
        x = torch.ones(2, requires_grad=True)
        point(x * 3).sum().backward()
        assert x.grad.tolist() == [30, 30]

    def test_a_removed_hook_is_silent_in_a_backward_that_comes_later(self):
        """Backward hooks leaked: the graph of an earlier forward still called them after the `with` block."""
        point, seen = HookPoint(), []
        x = torch.ones(2, requires_grad=True)
        with point.add_hook(lambda g, hook: seen.append(g), dir="bwd"):
            out = point(x * 3).sum()
        out.backward()
        assert seen == []
        assert x.grad.tolist() == [3, 3]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_no_gradient_is_an_error_for_a_hook_that_was_just_asked_for(self, mode):
        point = named_point()
        handle = point.add_hook(print, dir="bwd")
        with mode():
            with pytest.raises(HookLensError, match=r"'blocks.1.hook_resid_post' \[batch=1.*no gradient flows here"):
                point(torch.zeros(1, 1, 1))
            handle.remove()
            point.add_hook(print, dir="bwd", is_permanent=True)
            x = torch.zeros(1, 1, 1)
            assert point(x) is x

    def test_what_nothing_trainable_leads_to_has_a_gradient(self):
        """A value that an edit put in, or the output of a frozen network, raised "no gradient flows here"."""
        point, seen = named_point(), []
        point.add_hook(lambda g, hook: seen.append(g), dir="bwd")
        x = torch.ones(1, 1, 2)
        (point(x) * 3).sum().backward()
        assert seen[0].tolist() == [[[3, 3]]]
        assert not x.requires_grad


def test_a_point_prints_its_name():
    assert repr(named_point("hook_embed")) == "HookPoint('hook_embed')"
    assert repr(HookPoint()) == "HookPoint()"
