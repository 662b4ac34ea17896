"""Tests of hooklens.hooks.call: who listens to a call, in threads, inside hooks, and after an exit at any line."""

import copy
import functools
import gc
import inspect
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import hooklens
from hooklens import HookedModule, HookPoint, edits
from hooklens.config import RotaryPositions
from hooklens.errors import HookLensError
from hooklens.hooks import call as call_module
from hooklens.hooks.call import (
    Call,
    Hook,
    Listening,
    join_listeners,
    open_call,
    switched,
    thread_listeners,
    thread_switches,
)
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, make_config, make_model, random_tokens


def is_clean(model):
    """Whether nothing listens, at any point or in this thread."""
    if call_module._all_entries:
        # An error's traceback holds the frames, and so the blocks, that it passed.
        gc.collect()
    return (
        model.list_hooks() == {}
        and not any(point.listening for point in model.hook_points().values())
        and thread_listeners() == {}
        and call_module._entries.get() == ()
        and call_module._all_entries == {}
        and not torch.is_inference_mode_enabled()
        and torch.is_grad_enabled()
    )


def noted(seen):
    return lambda tensor, hook: seen.append(hook.name)


def start(fn):
    """Run a function in a thread of its own; its result, or its error."""
    return ThreadPoolExecutor(1).submit(fn)


class TestListeners:
    def test_a_call_by_itself_hears_the_threads_blocks(self):
        model, seen = make_model("bare"), []
        assert open_call().listeners == {}
        assert open_call().tokens is None
        with model.hooks([("hook_embed", noted(seen))]):
            (point,) = open_call().listeners
            assert point is model.hook_embed
            assert point.listens(open_call())
            assert not point.listens(Call())
            assert not point.listening

    def test_groups_are_joined_in_order(self):
        point, other = HookPoint(), HookPoint()
        hooks = [Hook(lambda t, hook: None, point) for _ in range(2)]
        first, second = Listening(hooks[:1]), Listening(hooks[1:])
        joined = join_listeners([{point: first}, {}, {point: second, other: second}])
        assert joined[point].hooks == hooks
        assert joined[other] is second
        assert first.hooks == hooks[:1], "a group handed to a call never changes"

    @pytest.mark.parametrize("pairs", ["fwd_hooks", "edits"])
    def test_own_hooks_run_before_those_of_blocks_and_those_of_the_call_last(self, pairs):
        model, tokens = make_model("bare"), random_tokens(1, 3)
        name, seen = "blocks.0.hook_resid_post", []

        def note(word):
            return lambda tensor, hook: seen.append((word, tensor[0, 0, 0].item()))

        plain = model.run_with_cache(tokens)[1][name][0, 0, 0].item()
        model.add_hook(name, lambda t, hook: t + 1)
        model.add_hook(name, note("own"))
        with model.hooks([(name, lambda t, hook: t * 2), (name, note("block"))]):
            if pairs == "fwd_hooks":
                model.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t + 3), (name, note("call"))])
            else:
                _, cache = model.run_with_cache(tokens, edits=[edits.Add(name, 3.0)])
                seen.append(("call", cache[name][0, 0, 0].item()))
        numbers = [plain + 1, (plain + 1) * 2, (plain + 1) * 2 + 3]
        assert seen == list(zip(("own", "block", "call"), numbers, strict=True))


@pytest.mark.parametrize(
    "fn",
    [lambda: None, lambda x, hook, more: x, lambda x, point, *, hooks: x, lambda *, tensor, hook: None],
)
def test_what_cannot_be_called_as_a_hook_is_refused_when_it_is_attached(fn):
    """It was a TypeError about positional arguments, in the middle of a forward."""
    model = make_model("bare")
    with pytest.raises(HookLensError, match=r"or fn\(tensor, hook=point\); <lambda>\(.*\) cannot be"):
        model.run_with_hooks(IDS, fwd_hooks=[("hook_embed", fn)])
    with pytest.raises(HookLensError, match=r"a hook is called as fn\(tensor\)"):
        model.add_hook("hook_embed", fn)
    assert is_clean(model)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, hook: None,
        lambda x, point: None,
        lambda *both: None,
        lambda x, more=1, hook=None: None,
        functools.partial(lambda more, x, hook: None, 1),
    ],
)
def test_forms_of_hooks(fn):
    make_model("bare").run_with_hooks(IDS, fwd_hooks=[("hook_embed", fn)])


class TestThreads:
    @pytest.mark.parametrize("way", ["run_with_hooks", "hooks", "capture", "run_with_cache", "edits"])
    @pytest.mark.parametrize("network", ["rotary", "learned, tied"])
    def test_two_threads_on_one_model_get_what_they_get_alone(self, network, way):
        """Hooks of one thread acted in the calls of another, and removed them there."""
        model, tokens = make_model(network), random_tokens(2, 5)
        entered, other_ran = threading.Event(), threading.Event()

        def wait_and_double(tensor, hook):
            # The other thread runs a whole call while this one stands in the middle of its own.
            entered.set()
            assert other_ran.wait(60)
            return tensor * 2

        def hooked():
            pairs = [("blocks.0.hook_resid_post", wait_and_double)]
            with torch.no_grad():
                if way == "hooks":
                    with model.hooks(pairs, edits=[edits.Zero("z1")]):
                        return model(tokens), {}
                if way == "capture":
                    with model.hooks(pairs), model.capture("*") as captured:
                        return model(tokens), captured
                if way == "run_with_cache":
                    return model.run_with_cache(tokens, names_filter="*", fwd_hooks=pairs)
                if way == "edits":
                    edit = edits.Custom("resid_post0", lambda region: wait_and_double(region, None))
                    return model.run_with_hooks(tokens, edits=[edit]), {}
                return model.run_with_hooks(tokens, fwd_hooks=pairs, edits=[edits.Zero("z1")]), {}

        def plain():
            with torch.no_grad():
                assert entered.wait(60)
                try:
                    logits = [model(tokens), model.run_with_hooks(tokens, edits=[edits.Zero("mlp_out0")])]
                    return [*logits, model.run_with_cache(tokens, names_filter="*")]
                finally:
                    other_ran.set()

        entered.set()
        other_ran.set()
        alone, (unhooked, edited, (_, everything)) = hooked(), plain()
        entered.clear()
        other_ran.clear()
        with unchecked():
            first, second = start(hooked), start(plain)
            (logits, kept), (plain_logits, plain_edited, (_, plain_kept)) = first.result(60), second.result(60)
        assert torch.equal(logits, alone[0])
        assert torch.equal(plain_logits, unhooked)
        assert torch.equal(plain_edited, edited)
        assert list(kept) == list(alone[1])
        for name in kept:
            assert torch.equal(kept[name], alone[1][name]), name
        assert list(plain_kept) == list(everything)
        for name in everything:
            assert torch.equal(plain_kept[name], everything[name]), name
        assert is_clean(model)

    def test_a_block_of_another_thread_does_not_act_here(self):
        model, tokens, seen = make_model("rotary"), random_tokens(1, 3), []
        inside, leave = threading.Event(), threading.Event()

        def stay_inside():
            with model.hooks([("*", noted(seen))], bwd_hooks=[("*", noted(seen))]), model.capture("*") as captured:
                inside.set()
                assert leave.wait(60)
            return captured

        plain = model(tokens)
        other = start(stay_inside)
        assert inside.wait(60)
        try:
            assert torch.equal(model(tokens), plain)
            model(tokens).sum().backward()
            assert torch.equal(
                model.blocks[0].mlp(torch.ones(1, 1, 12).double()), model.blocks[0].mlp(torch.ones(1, 1, 12).double())
            )
        finally:
            leave.set()
        assert other.result(60) == {}
        assert seen == []
        assert is_clean(model)

    def test_a_thread_started_inside_a_block_is_outside_of_it(self):
        model, tokens, seen = make_model("rotary"), random_tokens(1, 3), []
        with model.hooks([("hook_embed", noted(seen))]):
            start(lambda: model(tokens)).result(60)
        assert seen == []

    def test_hooks_added_to_the_model_act_in_every_thread(self):
        model, tokens = make_model("rotary"), random_tokens(1, 3)
        handle = model.add_hook("resid_post0", lambda t, hook: t * 2)
        assert torch.equal(start(lambda: model(tokens)).result(60), model(tokens))
        handle.remove()
        assert is_clean(model)


class TestCallsInsideHooks:
    @pytest.mark.parametrize("way", ["call", "block", "cache"])
    def test_the_inner_call_has_no_listeners_of_the_outer_one(self, way):
        """The outer call's hooks, captures and tokens stood in the modules, where the inner call found them."""
        model, tokens, other = make_model("rotary"), random_tokens(2, 5), random_tokens(1, 3, seed=9)
        model.add_hook("hook_embed", lambda t, hook: t * 1.5)
        expected, _ = model.run_with_cache(other, names_filter="*")
        inner, depth = [], []

        def call_again(tensor, hook):
            assert not depth, "the hook of the outer call ran in the inner one"
            depth.append(1)
            inner.append(model(other))
            inner.append(model.run_with_hooks(other, edits=[edits.Zero("z", pos=2)]))
            depth.pop()
            return tensor * 2

        pairs, doubled = [("blocks.0.attn.hook_z", call_again)], [("z0", lambda t, hook: t * 2)]
        # The edit behind it counts positions, of the outer call's tokens.
        acts = [edits.Zero("resid_post1", pos=-1)]
        alone, alone_cache = model.run_with_cache(tokens, names_filter="*", fwd_hooks=doubled, edits=acts)
        if way == "call":
            logits, cache = model.run_with_cache(tokens, names_filter="*", fwd_hooks=pairs, edits=acts)
        elif way == "block":
            with model.hooks(pairs, edits=acts), model.capture("*") as cache:
                logits = model(tokens)
        else:
            kv = model.prefill(tokens[:, :2])
            alone = model.run_with_hooks(tokens[:, 2:], past_kv_cache=kv, fwd_hooks=doubled, edits=acts)
            logits = model.run_with_hooks(tokens[:, 2:], past_kv_cache=kv, fwd_hooks=pairs, edits=acts)
            cache = {}
        assert torch.equal(inner[0], expected)
        assert torch.equal(inner[1], model.run_with_hooks(other, edits=[edits.Zero("z", pos=2)]))
        assert torch.equal(logits, alone)
        for name in cache:
            assert torch.equal(cache[name], alone_cache[name]), name
        model.reset_hooks()
        assert is_clean(model)

    def test_in_a_gradient_hook(self):
        model, tokens, inner = make_model("rotary"), random_tokens(1, 3), []

        def call_again(gradient, hook):
            inner.append(model(tokens))

        expected, seen = model(tokens), []
        with model.hooks([("hook_embed", noted(seen))], bwd_hooks=[("z0", call_again)]):
            model(tokens).sum().backward()
        assert seen == ["hook_embed"]
        assert torch.equal(inner[0], expected)

    def test_of_a_module_of_ones_own(self):
        class Toy(HookedModule):
            def __init__(self):
                super().__init__()
                self.hook_a, self.hook_b = HookPoint(), HookPoint()

            def forward(self, x):
                return self.hook_b(self.hook_a(x) * 3)

        toy, seen = Toy(), []

        def call_again(tensor, hook):
            seen.append(float(toy(torch.ones(1))))
            return tensor + 1

        toy.add_hook("hook_b", lambda t, hook: t + 10)
        out = toy.run_with_hooks(torch.ones(1), fwd_hooks=[("hook_a", call_again), ("hook_b", lambda t, hook: t * 2)])
        assert seen == [13]
        assert float(out) == ((1 + 1) * 3 + 10) * 2


class TestBlocks:
    def test_a_generator_left_half_way_leaves_nothing(self):
        model, tokens, seen = make_model("rotary"), random_tokens(1, 3), []

        def steps():
            with model.hooks([("hook_embed", noted(seen))]):
                yield model(tokens)
                yield model(tokens)

        plain = model(tokens)
        generator = steps()
        next(generator)
        del generator
        gc.collect()
        assert seen == ["hook_embed"]
        assert torch.equal(model(tokens), plain)
        assert seen == ["hook_embed"]
        assert is_clean(model)

    def test_a_stream_left_half_way_leaves_nothing(self):
        model, tokens = make_model("rotary"), random_tokens(1, 3)
        plain = model(tokens)
        stream = model.generate_stream(tokens, max_new_tokens=6, edits=[edits.Zero("z")], do_sample=False)
        next(stream)
        assert torch.equal(model(tokens), plain), "between two steps the caller's own calls are untouched"
        next(stream)
        del stream
        assert torch.equal(model(tokens), plain)
        assert is_clean(model)

    @pytest.mark.parametrize("first_left", [0, 1, 2])
    def test_left_out_of_order(self, first_left):
        model, tokens = make_model("rotary"), random_tokens(1, 3)
        plain, seen = model(tokens), []
        blocks = [model.hooks([("hook_embed", lambda t, hook, i=i: seen.append(i))]) for i in range(3)]
        for block in blocks:
            block.__enter__()
        left = blocks.pop(first_left)
        left.__exit__(None, None, None)
        model(tokens)
        assert seen == [i for i in range(3) if i != first_left]
        for block in blocks:
            block.__exit__(None, None, None)
        assert torch.equal(model(tokens), plain)
        assert len(seen) == 2
        assert is_clean(model)

    def test_one_block_entered_again(self):
        model, tokens, seen = make_model("bare"), random_tokens(1, 3), []
        block = model.hooks([("hook_embed", noted(seen))])
        for _ in range(2):
            with block as entered:
                assert entered is model
                model(tokens)
        model(tokens)
        assert seen == ["hook_embed"] * 2
        assert is_clean(model)

    def test_one_block_entered_again_while_it_is_open(self):
        """Leaving the inner one closed the outer one, too."""
        model = make_model("bare")
        seen = []
        block = model.hooks([("hook_embed", noted(seen))])
        with block:
            with block:
                model(random_tokens(1, 2))
            assert len(seen) == 2
            model(random_tokens(1, 2))
            assert len(seen) == 3
        model(random_tokens(1, 2))
        assert len(seen) == 3

    def test_one_block_entered_by_two_threads(self):
        """The thread that left first silenced the hooks of the other."""
        model, seen = make_model("bare"), []
        block = model.hooks([("hook_embed", noted(seen))])
        inside, go_on = threading.Event(), threading.Event()

        def other():
            with block:
                inside.set()
                assert go_on.wait(60)
                model(random_tokens(1, 2))

        waiting = start(other)
        assert inside.wait(60)
        with block:
            pass
        go_on.set()
        waiting.result(60)
        assert seen == ["hook_embed"]

    def test_a_submodule_in_a_block_of_the_model(self):
        model, x, seen = make_model("rotary"), torch.randn(1, 2, 12, dtype=torch.float64), []
        with model.hooks([("blocks.1.*", noted(seen))]):
            model.blocks[1].mlp(x)
            model.blocks[0].mlp(x)
            model.blocks[1].ln1(x)
        assert seen == [f"blocks.1.{name}" for name in ("mlp.hook_pre", "mlp.hook_post", "ln1.hook_scale",
                                                        "ln1.hook_normalized")]  # fmt: skip


class TestNames:
    def test_asking_a_submodule_for_its_hook_points_changes_nothing(self):
        """A submodule gave the model's points names of its own, and the model's hooks were told these."""
        model, tokens, seen = make_model("rotary"), random_tokens(1, 3), []
        names = {name: point.name for name, point in model.hook_points().items()}
        assert all(name == own for name, own in names.items())
        attn = model.blocks[1].attn
        assert "hook_z" in attn.hook_points()
        attn.select_hook_points("*")
        attn.reset_hooks()
        assert {name: point.name for name, point in model.hook_points().items()} == names
        model.run_with_hooks(tokens, fwd_hooks=[("z1", noted(seen))])
        assert seen == ["blocks.1.attn.hook_z"]
        _, cache = model.run_with_cache(tokens, names_filter="*")
        assert set(cache) == set(names) - {"hook_tokens"}

    def test_a_hook_is_told_the_name_of_the_module_that_it_was_attached_through(self):
        model, tokens, seen = make_model("rotary"), random_tokens(1, 3), []
        attn = model.blocks[1].attn
        with attn.hooks([("hook_z", noted(seen))]), model.hooks([("z1", noted(seen))]):
            model(tokens)
        attn.add_hook("hook_z", noted(seen))
        attn.hook_z.add_hook(noted(seen))
        model(tokens)
        assert seen == ["hook_z", "blocks.1.attn.hook_z", "hook_z", "blocks.1.attn.hook_z"]
        with attn.capture() as captured:
            model(tokens)
        assert set(captured) == set(attn.select_hook_points(None))


# An interrupt can come at every line that the package executes.
SOURCES = str(Path(hooklens.__file__).parent)


@functools.cache
def lines_of(code):
    """The numbers of the lines that a function has code on."""
    return frozenset(number for _, _, number in code.co_lines())


class Interrupter:
    """Raises where a run first reaches one line of the package; without such a line, notes all that it reaches.

    Attributes:
        at: the line, as (file, number).
        reached: the lines, in the order in which they were first reached.
    """

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at = at
        self.reached: dict[tuple[str, int], None] = {}

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, argument):
        code = frame.f_code
        if self.at is None:
            return self._note if code.co_filename.startswith(SOURCES) else None
        # Line by line through the one function only: tracing all of them takes several times as long as the run.
        return self._interrupt if code.co_filename == self.at[0] and self.at[1] in lines_of(code) else None

    def _note(self, frame, event, argument):
        if event == "line":
            self.reached.setdefault((frame.f_code.co_filename, frame.f_lineno))
        return self._note

    def _interrupt(self, frame, event, argument):
        if event == "line" and frame.f_lineno == self.at[1]:
            sys.settrace(None)
            raise KeyboardInterrupt(f"at {self.at}")
        return self._interrupt


TINY = make_config(
    n_layers=1, n_heads=2, n_kv_heads=1, d_model=6, d_head=2, d_mlp=4, d_vocab=7, positions=RotaryPositions(dim=2)
)
IDS = torch.tensor([[1, 2, 3, 4], [4, 0, 6, 5]])


def run_hooks(model):
    name = "blocks.0.hook_resid_post"
    model.run_with_hooks(
        IDS,
        fwd_hooks=[("pattern", lambda t, hook: t * 2), ("resid_mid", lambda t, hook: None)],
        bwd_hooks=[("z", lambda g, hook: g * 2)],
        edits=[edits.Zero("k", query_head=1, pos=0), edits.Add(name, 1.0, pos=-1, rows=0)],
    ).sum().backward()


def run_cache(model):
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    model.run_with_cache(IDS, names_filter="*", dtype=torch.float32, edits=[edits.Scale("z", 2.0)], attention_mask=mask)


def run_gradients(model):
    # Few points, because the checks of annotations make every gradient listener slow.
    names = ["resid_post", "pattern", "k_per_head"]
    model.run_with_cache(IDS, names_filter=names, incl_bwd=True, return_type="loss", pos_slice=-1)


def run_generate(model):
    model.generate(
        IDS, max_new_tokens=2, do_sample=False, edits=[edits.Zero("q", pos=-1), edits.Scale("mlp_out", 2.0)],
        names_filter=["resid_post", "pattern"], return_type="output", verbose=False, prepend_bos=False,
    )  # fmt: skip


def run_on_cache(model):
    model.run_with_hooks(IDS[:, 2:], past_kv_cache=model.prefill(IDS[:, :2]), edits=[edits.Zero("z", pos=3)])


OTHER_RUNS = (run_cache, run_gradients, run_generate, run_on_cache)


def reached_by(run, model):
    """The lines of the package that a run reaches, in the order in which it first does."""
    with Interrupter() as every:
        run(model)
    return every.reached


def break_off_everywhere(run, *, spared=lambda place: False):
    """Interrupt a run at each line that it reaches: these lines, those that left something, and how often it broke off.

    Of lines that are spared, it is at every tenth. What the process keeps (parsed names, shapes) is made in a first
    run. What a model keeps is made in its own first run: lines that only that one reaches have a new model each, all
    others one that has run, for as long as nothing is left on it.
    """
    pristine, broken_off, wrong = make_model(TINY), 0, []
    with unchecked(), warnings.catch_warnings():
        # generate says when it was interrupted.
        warnings.simplefilter("ignore")
        expected = make_model(TINY)(IDS)
        run(copy.deepcopy(pristine))
        model = copy.deepcopy(pristine)
        reached = reached_by(run, model)
        assert len(reached) > 100, "the trace sees the package's lines"
        again = reached_by(run, model)
        places = [place for number, place in enumerate(reached) if not spared(place) or number % 10 == 0]
        used = None
        for place in places:
            model = used if used is not None and place in again else copy.deepcopy(pristine)
            if place in again and model is not used:
                run(model)
                model.zero_grad()
                used = model
            try:
                with Interrupter(place):
                    run(model)
            except KeyboardInterrupt:
                broken_off += 1
            model.zero_grad()
            if not (torch.equal(model(IDS), expected) and is_clean(model)):
                wrong.append(place)
                call_module._entries.set(())
                call_module._all_entries.clear()
                used = None
    return places, wrong, broken_off


HOOKS = Path(call_module.__file__).parent
# What every forward runs through, whoever calls it; what the hooked run reaches beside it is in the fixture below.
NETWORK = [Path(SOURCES, name) for name in ("model", "kv_cache", "weights")]


@pytest.fixture(scope="module")
def is_of_the_network():
    """Whether a line is beside those that attach hooks and take them off: an exception leaves all in the same way."""
    model = make_model(TINY)
    with unchecked():
        run_hooks(copy.deepcopy(model))
        hooked = reached_by(run_hooks, model)

    def check(place):
        parents = Path(place[0]).parents
        return HOOKS not in parents and (place in hooked or any(folder in parents for folder in NETWORK))

    return check


@pytest.mark.parametrize(
    ("run", "every_line"),
    [
        (run_hooks, True),
        *((run, False) for run in OTHER_RUNS),
        *(pytest.param(run, True, marks=pytest.mark.slow) for run in OTHER_RUNS),
    ],
)
def test_an_interrupt_at_any_line_leaves_nothing(run, every_line, is_of_the_network):
    """An interrupt between attaching and the `try` left hooks on the model for good."""
    options = {} if every_line else {"spared": is_of_the_network}
    reached, wrong, broken_off = break_off_everywhere(run, **options)
    assert wrong == []
    # generate gives back what it has when it is interrupted between two tokens.
    assert broken_off == len(reached) if run is not run_generate else broken_off > 20


def test_an_interrupt_in_a_with_block_leaves_nothing(is_of_the_network):
    """Of the caller's own block: at any line but those of `__exit__` before its `try`, where Python looks for none."""

    def run(model):
        with model.hooks([("pattern", lambda t, hook: t * 2)], edits=[edits.Zero("z")]), model.capture("*"):
            model(IDS)

    reached, wrong, broken_off = break_off_everywhere(run, spared=is_of_the_network)
    assert broken_off == len(reached)
    lines, first = inspect.getsourcelines(inspect.unwrap(call_module.ListeningBlock.__exit__))
    in_exit = [place for place in reached if place[0] == call_module.__file__ and 0 <= place[1] - first < len(lines)]
    assert set(wrong) <= set(sorted(in_exit)[:2])


def test_an_interrupt_right_behind_the_entering_leaves_nothing():
    """Python may raise it after the call that opens the block, in the middle of a line."""
    model = make_model("bare")

    def trace(frame, event, arg):
        if frame.f_code is not inspect.unwrap(call_module.ListeningBlock.__enter__).__code__:
            return None
        frame.f_trace_opcodes = True
        return interrupt

    def interrupt(frame, event, arg):
        if event == "opcode" and call_module._entries.get():
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    def enter():
        sys.settrace(trace)
        with model.hooks([("hook_embed", lambda tensor, hook: None)]):
            pytest.fail("never reached")

    with unchecked(), pytest.raises(KeyboardInterrupt):
        enter()
    assert is_clean(model)


def test_interrupts_show_what_is_left(is_of_the_network):
    """The check itself: a hook that is taken off without a `finally` stays at every line of the call."""

    def run(model):
        handle = model.add_hook("hook_embed", lambda t, hook: None)
        model(IDS)
        handle.remove()

    reached, wrong, broken_off = break_off_everywhere(run, spared=is_of_the_network)
    assert broken_off == len(reached)
    in_model = [place for place in reached if "/hooklens/model/block.py" in place[0]]
    assert in_model
    assert set(in_model) <= set(wrong)


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_a_call_leaves_the_model_as_it_was(network):
    """Nothing about a call stands in a module: the modules' own dictionaries are the same afterwards."""
    model, tokens = make_model(network), random_tokens(1, 4)
    model(tokens)
    _ = model.run_with_cache(tokens, names_filter="*")

    def state():
        return {
            name: {key: value for key, value in module.__dict__.items() if key != "_hook_point_cache"}
            for name, module in model.named_modules()
        }

    before = state()
    model.run_with_hooks(tokens, fwd_hooks=[("*", lambda t, hook: None)], bwd_hooks=[("*", lambda g, hook: None)])
    model.run_with_cache(tokens, names_filter="*", edits=[edits.Zero("z")])
    after = state()
    for name in before:
        assert before[name].keys() == after[name].keys(), name
        assert all(before[name][key] is after[name][key] for key in before[name]), name


class TestSwitches:
    def test_blocks_nest_and_owners_are_apart(self):
        with switched("one", ("a",)):
            outer = Call()
            with switched("one", ()), switched("other", ("b", "c")):
                assert thread_switches() == {"one": (), "other": ("b", "c")}
                # A call keeps what it was opened with.
                assert outer.switches == {"one": ("a",)}
            assert thread_switches() == {"one": ("a",)}
        assert not thread_switches()
        assert not call_module._open_switches

    def test_other_threads_are_outside(self):
        with switched("one", ("a",)), ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lambda: Call().switches).result()

    def test_blocks_left_out_of_turn(self):
        def inside():
            with switched("one", ("a",)):
                yield

        first, second = inside(), inside()
        next(first)
        with switched("other", ("b",)):
            next(second)
            first.close()
            assert thread_switches() == {"other": ("b",), "one": ("a",)}
        second.close()
        assert not thread_switches()

    def test_a_compiled_call_does_not_see_them(self, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not thread_switches()
        with switched("one", ("a",)), pytest.raises(HookLensError, match="a compiled model does not see"):
            Call()
