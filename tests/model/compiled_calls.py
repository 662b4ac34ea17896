"""`torch.compile` without a graph break: plain forwards, and forwards with declared captures and edits.

test_compile.py runs these in an interpreter of their own: the tracer cannot follow the checks of annotations that
every other test puts on the package.
"""

import pytest
import torch

from hooklens import edits
from hooklens.errors import HookLensError
from hooklens.weights.offloaded import offload
from tests.model.networks import ALL_CONFIGS, make_model, random_tokens


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def calls(model):
    points = () if model is None else model.hook_points()
    wanted = ["resid_post", "pattern", "z", "mlp_out"]
    names = [word for word in wanted if any(name.endswith(f"hook_{word}") for name in points)]
    declared = [
        edits.Zero("blocks.0.attn.hook_z", pos=-1, head=1),
        edits.Add("blocks.1.hook_resid_pre", 0.5),
        edits.Replace("blocks.1.hook_mlp_out", 0.25, pos=[0, 2]),
        edits.Scale("blocks.1.attn.hook_pattern", 0.5, head=[0, 2]),
    ]
    declared = [edit for edit in declared if edit.name in points]
    return {
        "plain": lambda ids: (model(ids), {}),
        "captures": lambda ids: model.run_with_cache(ids, names_filter=names),
        "everything": lambda ids: model.run_with_cache(ids),  # noqa: PLW0108 -- the names are read without a model
        "edits": lambda ids: (model.run_with_hooks(ids, edits=declared), {}),
        "both": lambda ids: model.run_with_cache(ids, names_filter="resid_post", edits=declared, logits_at=-1),
        "everything, edited": lambda ids: model.run_with_cache(ids, edits=declared),
        "to a layer": lambda ids: model.run_with_cache(ids, names_filter="resid_pre", stop_at_layer=1),
    }


# A call that holds the rest: every capture, and edits of each kind. Of one network `long` makes each call.
ALL_IN_ONE = "everything, edited"
BY_DEFAULT = ("grouped", "alibi", "latent attention")


def mark(network, call):
    if call == ALL_IN_ONE:
        return () if network in BY_DEFAULT else pytest.mark.long
    return pytest.mark.long if network == "grouped" else pytest.mark.slow


CASES = [pytest.param(network, call, marks=mark(network, call)) for network in ALL_CONFIGS for call in calls(None)]


@pytest.mark.parametrize(("network", "call"), CASES)
def test_no_graph_break(network, call):
    """fullgraph=True raises at a graph break; the eager backend runs what was traced."""
    model, tokens = make_model(network, dtype=torch.float32), random_tokens(2, 6)
    run = calls(model)[call]
    with torch.no_grad():
        expected, kept = run(tokens)
        logits, cache = torch.compile(run, fullgraph=True, backend="eager")(tokens)
    # 1e-5: watched tensors of a traced graph are computed the explicit way.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert list(cache) == list(kept)
    for name in kept:
        torch.testing.assert_close(cache[name], kept[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("said", ["document_ids", pytest.param("document_borders", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "network",
    ["alibi", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grouped", "learned, tied", "capped"))],
)
def test_documents_break_no_graph(network, said):
    cfg = ALL_CONFIGS[network]
    model = make_model(cfg.replace(causal=network == "alibi"), dtype=torch.float32)
    tokens, ids = random_tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, -1], [3, 2, 2, 2, 2, 2]])
    given = ids if said == "document_ids" else torch.tensor([False, False, True, False, True, False])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected = model(tokens, **{said: given}, return_type="both")
        found = compiled(tokens, **{said: given}, return_type="both")
    real = ids >= 0
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_compiled_code_and_its_gradients():
    """With the compiler's own code; one network, since that takes its time."""
    model, tokens = make_model("grouped", dtype=torch.float32), random_tokens(2, 6)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        logits, cache = torch.compile(calls(model)["both"], fullgraph=True)(tokens)
        expected, kept = calls(model)["both"](tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache["resid_post", 1], kept["resid_post", 1], rtol=1e-5, atol=1e-5)
    compiled(tokens, return_type="loss").backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(tokens, return_type="loss").backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("lies", ["disk", "cpu"])
def test_offloaded_weights_break_no_graph(lies, tmp_path):
    model, tokens = make_model("grouped", dtype=torch.float32), random_tokens(2, 6)
    expected = model(tokens, return_type="loss")
    if lies == "disk":
        model.dispatch({"": "disk"}, offload_folder=tmp_path)
    else:
        for part in model.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    # As on an accelerator, but that it is the CPU.
                    part._parameters[name] = offload(parameter.detach(), torch.device("cpu"), "cpu")
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(tokens, return_type="loss")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    stream = torch.full((2, 6, model.cfg.d_model), 0.5, requires_grad=True)
    torch.compile(model, fullgraph=True, backend="aot_eager")(stream, start_at_layer=0).sum().backward()
    (gradient,) = torch.autograd.grad(model(stream, start_at_layer=0).sum(), stream)
    torch.testing.assert_close(stream.grad, gradient, rtol=1e-4, atol=1e-5)


def test_hooks_that_outlive_a_call_are_seen_or_refused():
    """A compiled call that was traced without hooks must not go on without them."""
    model, tokens = make_model("rotary", dtype=torch.float32), random_tokens(1, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(tokens)
        with model.add_hook("blocks.0.hook_mlp_out", lambda t, hook: t * 0):
            torch.testing.assert_close(compiled(tokens), model(tokens))
            assert not torch.allclose(compiled(tokens), plain)
        assert torch.equal(compiled(tokens), plain)
        with (
            model.hooks([("blocks.0.hook_mlp_out", lambda t, hook: t * 0)]),
            pytest.raises(Exception, match="a compiled model does not see the hooks of a `with` block") as caught,
        ):
            compiled(tokens)
        assert isinstance(caught.value, HookLensError | torch._dynamo.exc.TorchDynamoException)
        assert torch.equal(compiled(tokens), plain)
