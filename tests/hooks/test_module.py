"""Tests of hooklens.hooks.module on people's own modules, and on the network: nothing leaks, nothing goes stale."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from hooklens import edits
from hooklens.errors import HookLensError, HookNameError, InputError
from hooklens.hooks.call import open_call
from tests.annotations import unchecked
from tests.hooks.toys import Toy, told_names
from tests.model.networks import make_model, pad_rows, random_tokens


def snapshot(module):
    """Everything about the hook points that a leak would change."""
    return {
        name: point.own and [list(point.own.hooks), list(point.own.gradient_hooks), list(point.own.watchers)]
        for name, point in module.hook_points().items()
    }


class TestToyModules:
    def test_names_are_attribute_paths(self):
        toy = Toy()
        assert list(toy.hook_points()) == ["hook_in", "layers.0.hook_out", "layers.1.hook_out", "head.1"]
        assert told_names(toy) == list(toy.hook_points())

    def test_points_have_no_name_of_their_own_until_a_model_gives_it(self):
        """Listing the points of a part renamed them for the model that the part belongs to."""
        toy = Toy()
        toy.hook_points()
        assert [point.name for point in toy.hook_points().values()] == [None] * 4
        toy.name_hook_points()
        assert [point.name for point in toy.hook_points().values()] == list(toy.hook_points())

    def test_hooks_edits_and_captures(self):
        toy, x = Toy(), torch.randn(2, 4)
        plain = toy(x)
        silenced = toy.run_with_hooks(x, fwd_hooks=[("layers.1.hook_out", lambda t, hook: torch.zeros_like(t))])
        assert torch.equal(silenced, toy.head[0].bias.expand(2, 3))
        assert torch.equal(toy.run_with_hooks(x, edits=[edits.Zero("layers.1.*")]), silenced)
        assert torch.equal(toy.run_with_hooks(x, fwd_hooks=[], scale=2.0), 2 * plain)
        with toy.capture("layers.*") as captured:
            assert torch.equal(toy(x), plain)
        assert list(captured) == ["layers.0.hook_out", "layers.1.hook_out"]
        assert torch.equal(toy.head(captured["layers.1.hook_out"]), plain)

    def test_run_with_cache(self):
        toy, x = Toy(), torch.randn(2, 4)
        out, cache = toy.run_with_cache(x, scale=3.0)
        assert torch.equal(out, toy(x, scale=3.0))
        assert list(cache) == list(toy.hook_points())
        assert torch.equal(cache["hook_in"], x)
        out, cache = toy.run_with_cache(
            x, names_filter="layers.0.hook_out", dtype=torch.float64, fwd_hooks=[("hook_in", lambda t, hook: t * 0)]
        )
        assert list(cache) == ["layers.0.hook_out"]
        assert torch.equal(cache["layers.0.hook_out"], torch.relu(toy.layers[0].linear.bias).double().expand(2, 4))
        with pytest.raises(TypeError, match="scael"):
            toy.run_with_cache(x, scael=1.0)

    def test_positions_need_axes_that_are_known(self):
        toy, x = Toy(), torch.randn(2, 4)
        with pytest.raises(HookLensError, match=r"the axes of this point are not known.*use edits.Custom"):
            toy.run_with_hooks(x, edits=[edits.Zero("layers.0.hook_out", pos=0)])
        doubled = toy.run_with_hooks(x, edits=[edits.Custom("head.1", lambda t: t * 2)])
        assert torch.equal(doubled, 2 * toy(x))

    def test_a_copy_has_hooks_of_its_own(self):
        toy, x = Toy(), torch.randn(2, 4)
        toy.hook_points()
        toy.add_hook("head.1", lambda t, hook: t + 1)
        twin = copy.deepcopy(toy)
        assert torch.equal(twin(x), toy(x))
        twin.reset_hooks()
        torch.testing.assert_close(twin(x), toy(x) - 1)
        assert toy.hook_points()["head.1"].listening
        assert twin.hook_points()["hook_in"] is twin.hook_in
        assert twin.hook_in is not toy.hook_in
        twin.head = nn.Identity()
        assert "head.1" in toy.hook_points()

    def test_pickle(self):
        toy, x = Toy(), torch.randn(2, 4)
        toy.add_edit(edits.Scale("head.1", 2.0))
        twin = pickle.loads(pickle.dumps(toy))
        assert torch.equal(twin(x), toy(x))


class TestNothingLeaks:
    """After any exit the hook points, and so the logits, are what they were."""

    @staticmethod
    def run_into(fail, model, tokens, way):
        """One way of hooking a model with a function that raises."""
        pairs = [("pattern", lambda t, hook: t * 2), ("blocks.1.attn.hook_z", fail)]
        if way == "run_with_hooks":
            model.run_with_hooks(tokens, fwd_hooks=pairs, edits=[edits.Zero("z")])
        elif way == "run_with_cache":
            model.run_with_cache(tokens, names_filter="*", fwd_hooks=pairs)
        elif way == "hooks":
            with model.hooks(fwd_hooks=pairs, edits=[edits.Zero("mlp_out")]):
                model(tokens)
        elif way == "nested":
            with model.hooks(fwd_hooks=pairs[:1]), model.hooks(fwd_hooks=pairs[1:]), model.capture("*"):
                model(tokens)
        elif way == "add_hook":
            with model.add_hook("v", fail):
                model(tokens)
        elif way == "incl_bwd":
            model.run_with_cache(tokens, incl_bwd=True, return_type="loss", bwd_hooks=[("z", fail)])
        else:
            with model.hooks(bwd_hooks=[("z", fail)]):
                model(tokens).sum().backward()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    @pytest.mark.parametrize(
        "way", ["run_with_hooks", "run_with_cache", "hooks", "nested", "add_hook", "incl_bwd", "bwd"]
    )
    def test_after_an_exception(self, way, error):
        model, tokens = make_model("rotary"), random_tokens(2, 4)
        model.add_hook("hook_embed", lambda t, hook: None, is_permanent=True)
        model.add_hook("resid_post", lambda t, hook: t * 1.5)
        plain, before = model(tokens), snapshot(model)

        def fail(tensor, hook):
            raise error

        with pytest.raises(error):
            self.run_into(fail, model, tokens, way)
        assert snapshot(model) == before
        assert open_call().listeners == {}
        assert open_call().tokens is None
        assert torch.equal(model(tokens), plain)

    def test_after_an_unknown_name_in_the_middle(self):
        model = make_model("bare")
        before = snapshot(model)
        pairs = [("hook_embed", print), ("hook_embd", print)]
        for run in (
            lambda: model.run_with_hooks(random_tokens(1, 3), fwd_hooks=pairs),
            lambda: model.run_with_cache(random_tokens(1, 3), fwd_hooks=pairs),
            lambda: model.run_with_cache(random_tokens(1, 3), names_filter=["resid_post", "hook_embd"]),
            lambda: model.run_with_hooks(random_tokens(1, 3), fwd_hooks=pairs[:1], edits=[edits.Zero("hook_embd")]),
        ):
            with pytest.raises(HookNameError, match=r"no hook point is called 'hook_embd'\. Did you mean 'hook_embed'"):
                run()
            assert snapshot(model) == before

    def test_all_unknown_names_are_listed_at_once(self):
        model = make_model("bare")
        pairs = [("hook_embd", print), ("resid_pre", print), ("patern", print)]
        with pytest.raises(HookNameError, match=r"'hook_embd'.*; .*'patern'.*; the glob '\*.nope' matches"):
            model.run_with_hooks(random_tokens(1, 3), fwd_hooks=pairs, edits=[edits.Zero("*.nope")])

    def test_the_users_own_hooks_survive(self):
        """run_with_cache removed all hooks, the user's own among them."""
        model, tokens, seen = make_model("rotary"), random_tokens(1, 3), []
        model.add_hook("hook_embed", lambda t, hook: seen.append("own"))
        model.add_hook("hook_embed", lambda t, hook: seen.append("permanent"), is_permanent=True)
        model.add_hook("hook_embed", lambda g, hook: seen.append("gradient"), dir="bwd", is_permanent=True)
        before = snapshot(model)
        model.run_with_cache(tokens)
        model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
        model.run_with_hooks(tokens, fwd_hooks=[("resid_post", lambda t, hook: None)])
        assert seen == ["own", "permanent", "own", "permanent", "gradient", "own", "permanent"]
        assert snapshot(model) == before
        model.reset_hooks()
        model(tokens)
        assert seen[-1:] == ["permanent"]
        model.reset_hooks(including_permanent=True)
        assert not any(point.listening for point in model.hook_points().values())

    def test_backward_hooks_are_silent_after_the_with_block(self):
        """The graph of a forward inside the block still called them in a later backward."""
        model, tokens, seen = make_model("rotary"), random_tokens(2, 4), []
        with model.hooks(bwd_hooks=[("*", lambda g, hook: seen.append(hook.name))]):
            inside = model(tokens).sum()
        inside.backward()
        with model.capture("resid_post", incl_bwd=True) as captured:
            inside = model(tokens).sum()
        inside.backward()
        assert seen == []
        assert not any(name.endswith("_grad") for name in captured)

    def test_hooks_nest(self):
        toy, x = Toy(), torch.ones(1, 4)
        seen = []
        with toy.hooks([("hook_in", lambda t, hook: seen.append("outer"))]):
            with toy.hooks([("hook_in", lambda t, hook: seen.append("inner"))]):
                toy(x)
            toy(x)
        toy(x)
        assert seen == ["outer", "inner", "outer"]

    def test_hooks_left_in_another_order_than_entered(self):
        toy, x, seen = Toy(), torch.ones(1, 4), []
        first = contextlib.ExitStack()
        first.enter_context(toy.hooks([("hook_in", lambda t, hook: seen.append(1))]))
        second = contextlib.ExitStack()
        second.enter_context(toy.hooks([("hook_in", lambda t, hook: seen.append(2))]))
        first.close()
        toy(x)
        second.close()
        toy(x)
        assert seen == [2]

    def test_reset_hooks_empties_contexts(self):
        toy = Toy()
        toy.hook_in.ctx["kept"] = 1
        toy.reset_hooks(clear_contexts=False)
        assert toy.hook_in.ctx == {"kept": 1}
        toy.reset_hooks()
        assert toy.hook_in.ctx == {}


class TestRefusals:
    def test_add_hook(self):
        toy = Toy()
        with pytest.raises(HookNameError, match=r"no hook point named; give a name, a glob \('\*' is everything\)"):
            toy.add_hook(None, print)
        with pytest.raises(HookNameError, match=r"the glob 'layer\.\*' matches no hook point"):
            toy.add_hook("layer.*", print)
        with pytest.raises(TypeError):
            toy.add_hook("hook_in", print, "bwd")

    @pytest.mark.parametrize("wrong", ["hook_in", ("hook_in",), ("hook_in", 3), ("a", "b", "c")])
    def test_pairs(self, wrong):
        with (
            unchecked(),
            pytest.raises(InputError, match=r"fwd_hooks: entry 0 is .*, expected pairs \(name or filter, function\)"),
        ):
            Toy().run_with_hooks(torch.ones(1, 4), fwd_hooks=[wrong])

    def test_edits(self):
        with unchecked(), pytest.raises(InputError, match=r"edits: entry 0 is \('hook_in', .*, expected values"):
            Toy().run_with_hooks(torch.ones(1, 4), edits=[("hook_in", print)])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_backward_hooks_without_gradients(self, mode):
        model = make_model("bare")
        with mode():
            with pytest.raises(HookLensError, match="bwd_hooks needs gradients, which are disabled here"):
                model.run_with_hooks(random_tokens(1, 3), bwd_hooks=[("hook_embed", print)])
            with pytest.raises(HookLensError, match="incl_bwd needs gradients"):
                model.run_with_cache(random_tokens(1, 3), incl_bwd=True, return_type="loss")


def test_an_edit_moves_to_the_copy_of_its_model():
    """The copied model's edit asked the original model which tokens run, and so took padding for tokens."""
    model = make_model("rotary")
    ids, mask = pad_rows([random_tokens(1, 5)[0], random_tokens(1, 3)[0]], "left")
    model.add_edit(edits.Zero("resid_post", pos=0), is_permanent=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids, attention_mask=mask), model(ids, attention_mask=mask))


def test_list_hooks_lists_what_is_attached_to_any_point():
    """With None, as other filters read it, hooks at points on request were left out."""
    model = make_model("rotary")

    def watch(tensor, hook):
        return None

    model.add_hook("blocks.0.attn.hook_result", watch)
    model.add_hook("blocks.1.hook_resid_post", watch, dir="bwd")
    edit = edits.Zero("blocks.1.hook_resid_post")
    model.add_edit(edit)
    expected = {"blocks.0.attn.hook_result": [watch], "blocks.1.hook_resid_post": [edit, watch]}
    assert model.list_hooks() == model.list_hooks(None) == model.list_hooks("*") == expected
    assert model.list_hooks("result") == {"blocks.0.attn.hook_result": [watch]}
    assert model.list_hooks("blocks.0.hook_resid_post") == {}
    with pytest.raises(HookNameError, match="hook_nothing"):
        model.list_hooks("hook_nothing")
