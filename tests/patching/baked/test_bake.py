import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedCausalLM, patching
from hooklens.errors import InputError
from hooklens.patching import KL, Circuit, SiteError
from hooklens.patching.graph.nodes import list_edges, list_writers
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens

NETWORKS = ["rotary", "alibi, grouped", "learned, tied", "attention only", "heads and MLPs apart"]
MODELS = {network: make_model(network) for network in NETWORKS}
MODELS["scaled branches"] = make_model(make_config(residual_scale=0.7))
GROUPED = make_model("grouped")
TOKENS = random_tokens(3, 6, seed=1)


def draw_constants(model, seed=0):
    """Random constants at all hook points where nodes write."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"hook_result": (model.cfg.n_heads, model.cfg.d_model), "hook_mlp_out": (model.cfg.d_model,)}
    sizes["hook_post"] = (model.cfg.d_mlp,)
    return {
        name: torch.randn(1, 1, *sizes[name.rpartition(".")[2]], generator=generator, dtype=torch.float64)
        for name in model.hook_points()
        if name.endswith(("hook_result", "hook_mlp_out", "hook_post"))
    }


def run_ablated(model, nodes, constants):
    """The logits with outputs overwritten by hooks."""
    hooks = []
    for node in nodes:
        layer = int(node[1:].partition(".")[0])
        if node.startswith("a"):
            name, place = f"blocks.{layer}.attn.hook_result", (..., int(node.rpartition("h")[2]), slice(None))
        elif ".n" in node:
            name, place = f"blocks.{layer}.mlp.hook_post", (..., int(node.rpartition("n")[2]))
        else:
            name, place = f"blocks.{layer}.hook_mlp_out", ...

        def put(tensor, hook, name=name, place=place):
            changed = tensor.clone()
            changed[place] = constants[name].expand_as(tensor)[place] if constants else 0.0
            return changed

        hooks.append((name, put))
    return model.run_with_hooks(TOKENS, fwd_hooks=hooks)


@pytest.mark.parametrize("network", MODELS)
@settings(max_examples=6)
@given(data=st.data())
def test_baked_models_do_what_hooks_do(network, data):
    model = MODELS[network]
    known = [str(writer) for writer in list_writers(model.cfg)[1:]]
    mlps = [name for name in known if name.startswith("m")]
    nodes = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=5))
    free = [f"{mlp}.n{place}" for mlp in mlps if mlp not in nodes for place in (0, 3, 19)]
    nodes += data.draw(st.lists(st.sampled_from(free), unique=True, max_size=4)) if free else []
    constants = draw_constants(model, data.draw(st.integers(0, 99))) if data.draw(st.booleans()) else None
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    baked = patching.bake_ablation(model, nodes, ablation=constants or "zero")
    # Sums of some twenty terms in another order, in float64.
    torch.testing.assert_close(baked(TOKENS), run_ablated(model, nodes, constants), rtol=0, atol=1e-10)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("network", ["grouped", "rotary", "attention only"])
def test_a_baked_circuit_is_what_evaluation_runs(network):
    model = GROUPED if network == "grouped" else MODELS[network]
    kept = {"embed", "a0.h1", "a1.h0", "a1.h2", "m0", "m1"}
    circuit = Circuit(edge for edge in list_edges(model.cfg) if edge[0] in kept)
    constants = {"blocks.0.hook_resid_pre": torch.zeros(1, 1, model.cfg.d_model, dtype=torch.float64)}
    constants |= draw_constants(model)
    for ablation in ("zero", constants)[: 1 if network == "grouped" else 2]:
        baked = patching.bake_circuit(model, circuit, ablation=ablation)
        # The divergence from the baked model's own predictions is 0 where the circuit's run predicts the same.
        result = patching.evaluate_circuits(
            model,
            TOKENS,
            TOKENS.flip(1),
            [circuit],
            KL(reference=baked(TOKENS), pos=None),
            ablation=ablation,
            progress=False,
        )
        assert float(result.per_pair.abs().max()) < 1e-10
        assert float(result.full_per_pair.min()) > 1e-4


def test_edges_into_what_is_left_out_do_not_count():
    model = MODELS["rotary"]
    kept = {"embed", "a0.h1", "m1"}
    whole = Circuit(edge for edge in list_edges(model.cfg) if edge[0] in kept)
    spare = Circuit(edge for edge in whole if edge[1] in ("a0.h1.q", "a0.h1.k", "a0.h1.v", "m1", "logits"))
    assert len(spare) < len(whole)
    torch.testing.assert_close(
        patching.bake_circuit(model, whole)(TOKENS), patching.bake_circuit(model, spare)(TOKENS), rtol=0, atol=0
    )


def test_fitted_constants_are_written_and_the_model_is_saved(tmp_path):
    model = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    # Past the ids that pad.
    clean, corrupted, ids = (random_tokens(4, 8, seed=seed) + 20 for seed in (1, 2, 3))
    kept = {"embed", "a0.h1", "a1.h0", "m2"}
    circuit = Circuit(edge for edge in list_edges(model.cfg) if edge[0] in kept)
    constants = patching.fit_optimal_ablation(model, clean, corrupted, circuit, steps=2, progress=False)
    baked = patching.bake_circuit(model, circuit, ablation=constants)
    baked.save_pretrained(tmp_path / "baked")
    read = HookedCausalLM.from_pretrained(tmp_path / "baked")
    assert torch.equal(read(ids), baked(ids))
    for writer in list_writers(model.cfg)[1:]:
        block = read.block_list()[writer.layer]
        rows = block.attn.W_O[writer.head] if writer.kind == "head" else block.mlp.W_out
        assert bool(rows.any()) == (str(writer) in kept)


def test_refusals():
    model = MODELS["rotary"]
    full = Circuit.full(model.cfg)
    for call, error, text in [
        (lambda: patching.bake_circuit(model, full.without_edges([("a0.h0", "m1")])), InputError,
         "the circuit lacks 1 of the .* edges between its nodes, such as a0.h0 -> m1; weights can"),
        (lambda: patching.bake_circuit(model, [("embed", "logits")]), InputError, "circuit is .*, expected a patching"),
        (lambda: patching.bake_circuit(model, Circuit([("a9.h0", "logits")])), SiteError, "does not fit the network"),
        (lambda: patching.bake_ablation(model, ["a0.h0"], ablation="mean"), InputError,
         "ablation is 'mean', expected 'zero' or tensors by hook name: what it puts in goes with the prompts"),
        (lambda: patching.bake_ablation(model, ["a0.h0"], ablation=3), InputError, "ablation is 3, expected 'zero' or"),
        (lambda: patching.bake_ablation(model, "a0.h0"), InputError, "nodes are 'a0.h0', expected a list of names"),
        (lambda: patching.bake_ablation(model, ["a0.h7"]), SiteError, "'a0.h7' writes nothing to the stream"),
        (lambda: patching.bake_ablation(model, ["m0.n99"]), SiteError, "no neurons 'm0.n99'"),
        (lambda: patching.bake_ablation(model, ["embed"]), InputError, "the embeddings cannot be ablated"),
        (lambda: patching.bake_ablation(model, ["m0"], ablation={}), SiteError,
         "no tensor for 'blocks.0.hook_mlp_out', where m0 writes"),
        (lambda: patching.bake_ablation(GROUPED, ["a0.h0"], ablation=draw_constants(GROUPED)), InputError,
         "a0.h0 is ablated to a constant other than 0, and this architecture has no b_O"),
        (lambda: patching.bake_ablation(make_model("capped"), ["m0"]), InputError, "a norm follows each branch"),
    ]:  # fmt: skip
        with unchecked(), pytest.raises(error, match=text):
            call()
    moving = draw_constants(model)
    moving["blocks.0.hook_mlp_out"] = torch.randn(1, 6, model.cfg.d_model, dtype=torch.float64)
    with pytest.raises(InputError, match="differs between prompts or positions, and weights hold one constant for m0"):
        patching.bake_ablation(model, ["m0"], ablation=moving)


def test_zeros_need_no_bias_and_the_mode_stays():
    zeros = {name: torch.zeros_like(tensor) for name, tensor in draw_constants(GROUPED).items()}
    baked = patching.bake_ablation(GROUPED, ["a0.h0", "m1"], ablation=zeros)
    torch.testing.assert_close(baked(TOKENS), run_ablated(GROUPED, ["a0.h0", "m1"], None), rtol=0, atol=1e-10)
    assert baked.training == GROUPED.training
