"""Networks with a factor or a projection, against the same networks with it in the weights: everything has to agree.

A factor on branches can stand in `W_O`, `b_O`, `W_out` and `b_out`, one on logits in `W_U` and `b_U`, and the
projections of a narrow embedding in `W_E` and `W_U`. Whatever is read of such a network, or done to it, is what the
network without the option gives: decompositions, attributions, sweeps, paths, circuits, lenses, weight processing.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM, analysis, patching
from hooklens.config import HookedConfig, LearnedPositions, NormConfig, RotaryPositions
from hooklens.errors import CacheError, ConfigError, InputError, TransformError
from tests.annotations import unchecked
from tests.model.networks import RMS_NORM, make_config, make_model, random_tokens
from tests.patching.naive import patch_naively

# Sums in another order, in float64.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
CLEAN, CORRUPTED = random_tokens(2, 5), random_tokens(2, 5, seed=2)
METRIC = patching.LogitDiff([1, 2], [3, 4])


def in_branches(state: dict[str, Tensor], cfg: HookedConfig) -> dict[str, object]:
    writing = ("W_O", "b_O", "W_out", "b_out")
    state |= {name: weight * cfg.residual_scale for name, weight in state.items() if name.endswith(writing)}
    return {"residual_scale": 1.0}


def in_unembedding(state: dict[str, Tensor], cfg: HookedConfig) -> dict[str, object]:
    for name in ("unembed.W_U", "unembed.b_U"):
        state[name] = state[name] * cfg.logits_scale
    return {"logits_scale": 1.0}


def in_embeddings(state: dict[str, Tensor], cfg: HookedConfig) -> dict[str, object]:
    state["embed.W_E"] = state["embed.W_E"] @ state.pop("embed.W_proj_in")
    state["unembed.W_U"] = state.pop("unembed.W_proj_out") @ state["unembed.W_U"]
    return {"d_embed": None, "tied_unembed": False}


OPTIONS: dict[str, tuple[dict[str, object], Callable[..., dict[str, object]]]] = {
    "residual scale": ({"residual_scale": 0.6, "positions": RotaryPositions(dim=4)}, in_branches),
    "residual scale, parallel": ({"residual_scale": 0.6, "wiring": "parallel", "n_kv_heads": 2}, in_branches),
    "logits scale": ({"logits_scale": 1.7, "unembed_bias": True}, in_unembedding),
    "narrow embedding": ({"d_embed": 5, "norm": RMS_NORM, "positions": LearnedPositions()}, in_embeddings),
    "narrow embedding, tied": ({"d_embed": 5, "tied_unembed": True, "norm": RMS_NORM}, in_embeddings),
}


@pytest.fixture(scope="module", params=OPTIONS)
def twins(request) -> tuple[HookedCausalLM, HookedCausalLM]:
    """A network with an option, and the one that has it in its weights."""
    changes, move = OPTIONS[request.param]
    model = make_model(make_config(**changes))
    state = {name: weight.clone() for name, weight in model.named_weights().items()}
    fields = move(state, model.cfg)
    return model, HookedCausalLM.from_state_dict(state, model.cfg.replace(**fields))


def check(twins, read: Callable[[HookedCausalLM], Tensor]) -> None:
    with unchecked(), torch.no_grad():
        found, expected = (read(model) for model in twins)
    assert expected.isfinite().all()
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, **CLOSE)


def run(model: HookedCausalLM):
    return model.run_with_cache(CLEAN, names_filter="*")[1]


def test_logits(twins):
    check(twins, lambda model: model(CLEAN))


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: cache.decompose_resid(mode="all", apply_ln=True),
        lambda cache: cache.stack_head_results(),
        lambda cache: cache.stack_head_results(project_output_onto=torch.ones(12, dtype=torch.float64)),
        lambda cache: cache.stack_neuron_results(layer=-1),
        lambda cache: cache.get_full_resid_decomposition(expand_neurons=False),
        lambda cache: cache.get_full_resid_decomposition(expand_neurons=True).sum(0),
        lambda cache: cache.logit_attrs(cache.decompose_resid(), tokens=torch.tensor([3, 4])),
    ],
)
def test_decompositions(twins, read):
    check(twins, lambda model: read(run(model)))


def test_parts_sum_to_the_stream(twins):
    """Heads, neurons and biases are what is really added."""
    with unchecked(), torch.no_grad():
        cache = run(twins[0])
        torch.testing.assert_close(
            cache.get_full_resid_decomposition(expand_neurons=True).sum(0), cache["resid_post", -1], **CLOSE
        )


def test_logit_attributions_sum_to_the_logit(twins):
    with unchecked(), torch.no_grad():
        cache = run(twins[0])
        whole = cache.logit_attrs(cache.get_full_resid_decomposition(), tokens=torch.tensor([3, 4])).sum(0)
        logits = cache["unembed.hook_out"][torch.arange(2), :, torch.tensor([3, 4])]
        torch.testing.assert_close(whole + cache.logit_attr_bias(torch.tensor([3, 4]))[:, None], logits, **CLOSE)


def test_biases_of_the_stream(twins):
    check(twins, lambda model: model.accumulated_bias(2))


def test_directions_of_tokens(twins):
    check(twins, lambda model: model.tokens_to_residual_directions(torch.arange(4)))


@pytest.mark.parametrize("site", ["z", "result", "attn_out", "mlp_out", "resid_pre", "hook_embed"])
def test_sweeps(twins, site):
    check(twins, lambda model: patching.sweep(model, CLEAN, CORRUPTED, site, METRIC, progress=False).values)


def test_paths(twins):
    check(
        twins,
        lambda model: patching.path_patch(model, CLEAN, CORRUPTED, ["a0.h1", "m0", "embed"], ["logits"], METRIC).values,
    )


def test_edges(twins):
    check(twins, lambda model: patching.edge_attribution(model, CLEAN, CORRUPTED, METRIC, progress=False).scores)


@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_circuits(twins, ablation):
    def read(model: HookedCausalLM) -> Tensor:
        scores = patching.edge_attribution(model, CLEAN, CORRUPTED, METRIC, progress=False)
        circuit = scores.circuit(20)
        result = patching.evaluate_circuits(
            model, CLEAN, CORRUPTED, {"one": circuit}, METRIC, ablation=ablation, progress=False
        )
        return result.per_pair

    check(twins, read)


def test_lens(twins):
    check(twins, lambda model: torch.stack([one.logprobs for one in analysis.lens.read_streams(model, run(model))]))


def test_weight_processing(twins):
    def read(model: HookedCausalLM) -> Tensor:
        steps = {"fold_ln": True, "fold_value_biases": True, "center_unembed": True}
        if model.cfg.norm.kind == "layer":
            steps["center_writing_weights"] = True
        return model.process_weights(**steps)(CLEAN).log_softmax(-1)

    check(twins, read)
    check(twins[:1] * 2, read)
    with unchecked(), torch.no_grad():
        torch.testing.assert_close(read(twins[0]), twins[0](CLEAN).log_softmax(-1), **CLOSE)


def test_a_norm_of_the_embedding_folds_into_nothing_and_is_refused_as_a_writer():
    from_norm = make_model(make_config(embed_norm=NormConfig(kind="layer", eps=1e-5)))
    with unchecked(), torch.no_grad():
        torch.testing.assert_close(from_norm.process_weights(fold_ln=True)(CLEAN), from_norm(CLEAN), **CLOSE)
    with pytest.raises(Exception, match=r"cfg\.embed_norm: a norm, not weights, writes"):
        from_norm.process_weights(center_writing_weights=True)


ON_STREAM = {"norm_stream": True, "norm_before": False, "final_norm": None, "positions": RotaryPositions(dim=4)}


@pytest.mark.parametrize(
    "site", ["z", "attn_out", "mlp_out", "resid_mid", "*ln1_stream*normalized", "*ln2_stream*scale"]
)
def test_sweeps_where_norms_stand_on_the_stream(site):
    """Each cell is that of a run with the patch; an MLP's output is no longer what the next layer adds."""
    model = make_model(make_config(**ON_STREAM))
    with unchecked(), torch.no_grad():
        result = patching.sweep(model, CLEAN, CORRUPTED, patching.grid(site, positions="all"), METRIC, progress=False)
        cells = result.cells.values() if isinstance(result.cells, dict) else result.cells
        expected = torch.stack([patch_naively(model, CLEAN, CORRUPTED, cell, METRIC).mean() for cell in cells])
    torch.testing.assert_close(result.values.flatten(), expected, **CLOSE)


def test_what_needs_a_sum_is_refused_where_norms_stand_on_the_stream():
    model = make_model(make_config(**ON_STREAM))
    cache = run(model)
    for read in (cache.decompose_resid, cache.stack_head_results, cache.get_full_resid_decomposition):
        with pytest.raises(CacheError, match=r"goes through norms \(cfg\.norm_stream\), so it is no sum"):
            read()
    torch.testing.assert_close(cache.accumulated_resid()[-1], cache["resid_post", -1])
    with pytest.raises(ConfigError, match="no bias stays in it"):
        model.accumulated_bias(1)
    with pytest.raises(InputError, match="edges and paths need a stream that is the sum"):
        patching.edge_attribution(model, CLEAN, CORRUPTED, METRIC, progress=False)
    with pytest.raises(TransformError, match="they read the stream with its mean"):
        model.process_weights(center_writing_weights=True)
    with unchecked(), torch.no_grad():
        torch.testing.assert_close(model.process_weights(fold_ln=True)(CLEAN), model(CLEAN), **CLOSE)


@pytest.mark.parametrize("wrong", [{"wiring": "parallel"}, {"norm": None, "final_norm": None}])
def test_norms_on_the_stream_need_their_place(wrong):
    with pytest.raises(ConfigError, match="norm_stream needs wiring='sequential', and a norm in every layer"):
        make_config(**{**ON_STREAM, **wrong})


@pytest.mark.parametrize(
    "biases", [{"q_bias": False}, {"k_bias": False, "v_bias": False}, {"mlp_in_bias": False}, {"mlp_out_bias": False}]
)
def test_weight_processing_where_some_maps_have_biases(biases):
    """Biases that a step needs come into being, whatever single flags say."""
    steps = {"fold_ln": True, "center_writing_weights": True, "refactor_factored_attn_matrices": True}
    for norm in (NormConfig(kind="layer", eps=1e-5), NormConfig(kind="layer", eps=1e-5, bias=False)):
        model = make_model(make_config(norm=norm, positions=LearnedPositions(), **biases))
        with unchecked(), torch.no_grad():
            torch.testing.assert_close(model.process_weights(**steps)(CLEAN), model(CLEAN), **CLOSE)
