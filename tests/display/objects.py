"""An object of every class that shows itself, small, and odd ones: empty, not a number, huge, with hostile names."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from hooklens import ActivationCache, FactoredMatrix, HookedCausalLM, HookedConfig, HookedKeyValueCache
from hooklens.adapters.lora.adapter import LoraAdapter, LoraModule
from hooklens.adapters.lora.settings import LoraSettings
from hooklens.alignment import AlignmentTable, Basis, CausalModel, Counterfactuals, DasResult, Site
from hooklens.alignment.das.result import Step
from hooklens.analysis.lens import JacobianLens, TunedLens
from hooklens.analysis.lens.losses import LayerLoss
from hooklens.analysis.lens.origin import Origin
from hooklens.causal_lm.memory.plan import MemoryPlan, plan
from hooklens.config import NoPositions, RotaryPositions
from hooklens.datasets import ActivationDataset
from hooklens.datasets.folder import LocalFolder
from hooklens.datasets.manifest import Manifest
from hooklens.datasets.probes import Probe
from hooklens.evaluation.items import ContinuationItem, ItemError, ItemFile
from hooklens.evaluation.stream import StreamSummary
from hooklens.generation.output import GenerationOutput, GenerationStep, GenerationTiming
from hooklens.optional import import_package
from hooklens.patching import (
    AttributionResult,
    Circuit,
    CircuitResult,
    EdgeScores,
    FaithfulnessCurve,
    LearnedCircuit,
    Pair,
    SweepResult,
    SweepStats,
)
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.circuits.discovery import Decision, Discovery, DiscoveryStats
from hooklens.patching.circuits.result import AblationResult
from hooklens.patching.estimates.check import EstimateCheck
from hooklens.patching.estimates.edge_estimate import EdgeAttributionResult
from hooklens.patching.graph.nodes import Graph
from hooklens.patching.known import KnownCheck, induction
from hooklens.patching.learned.constants import OptimalAblation
from hooklens.patching.learned.level import GateLayout
from hooklens.patching.mib.graph import ScoredGraph
from hooklens.patching.results.several import Results
from hooklens.patching.studies.completeness import Completeness
from hooklens.patching.studies.held_out import HeldOutCurve
from hooklens.patching.studies.minimality import Minimality
from hooklens.patching.studies.split import PairSplit
from hooklens.patching.studies.stability import Stability
from hooklens.patching.units.circuit import UnitCircuit
from hooklens.patching.units.evaluate import UnitResult
from hooklens.patching.units.scored import UnitScores
from hooklens.pool.causal_lm_pool import CausalLMPool
from hooklens.pool.comparing.result import ModelComparison
from hooklens.pool.lazy import LazyWeights
from hooklens.sae import SAE, SAEConfig
from hooklens.steering import DirectionSelection, Erasure, SteeringTable, SteeringVector, SteeringVectors
from hooklens.steering.erasure import PointErasure
from hooklens.steering.provenance import Provenance
from hooklens.steering.selected import Criteria
from hooklens.training.result import TrainResult
from hooklens.verification import CheckResult, VerificationReport
from hooklens.verification.conformance.cases import Outcome
from hooklens.verification.conformance.suite import ConformanceReport
from tests.model.networks import ALL_CONFIGS, make_config, make_model, random_tokens

HOSTILE = "</script><b>&\"'\x00\u2028\nnew"
CFG = make_config()
LARGE = make_config(n_layers=24, n_heads=32, d_model=64, d_head=2)
GRAPH = Graph.of(CFG)
STATS = SweepStats(cells=2, pairs=3, unchanged=0, forwards=4, tokens=5.5, naive_forwards=6, naive_tokens=7)
CIRCUIT = Circuit([("embed", "m0"), ("m0", "logits")])
NAN = float("nan")


def _sweep(n_layers: int = 3, n_pos: int = 4, *, kind: type[Any] = SweepResult, fill: float | None = None, **more: Any):
    values = torch.randn(n_layers, n_pos, 2, generator=torch.Generator().manual_seed(0))
    if fill is not None:
        values = torch.full_like(values, fill)
    cells = tuple(
        {"site": f"blocks.{layer}.hook_resid_pre", "layer": layer, "pos": pos, "head": None}
        for layer in range(n_layers)
        for pos in range(n_pos)
    )
    fields = {
        "per_pair": values,
        "axes": {"layer": tuple(range(n_layers)), "pos": tuple(range(n_pos))},
        "clean_per_pair": torch.tensor([2.0, 3.0]),
        "corrupted_per_pair": torch.tensor([-1.0, 0.0]),
        "cells": cells,
        "metric": "LogitDiff",
        "direction": "denoise",
        "stats": STATS,
    }
    return kind(**{**fields, **more})


def _check(n: int = 3) -> EstimateCheck:
    return EstimateCheck(
        cells=tuple({"layer": place, "head": None, "note": HOSTILE} for place in range(n)),
        estimated=torch.linspace(-1, 1, n),
        exact=torch.linspace(-1, 1.5, n),
        is_top=torch.arange(n) < 2,
        n_cells=n,
        method="atp",
    )


def _edges(graph: Graph = GRAPH, kind: type[Any] = EdgeScores, **more: Any) -> Any:
    exists = graph.exists().T
    scores = torch.randn(*exists.shape, 2, generator=torch.Generator().manual_seed(0)) * exists[..., None]
    fields = {
        "per_pair": scores,
        "writers": tuple(map(str, graph.writers)),
        "readers": tuple(map(str, graph.readers)),
        "exists": exists,
        "clean_per_pair": torch.tensor([2.0, 3.0]),
        "corrupted_per_pair": torch.tensor([-1.0, 0.0]),
        "metric": "LogitDiff",
        "method": "eap",
        "direction": "noise",
        "forwards": 3,
        "tokens": 12.0,
    }
    return kind(**{**fields, **more})


def _circuits(n: int = 2, kind: type[Any] = CircuitResult, **more: Any) -> Any:
    fields = {
        "labels": tuple(f"{HOSTILE}{place}" for place in range(n)),
        "per_pair": torch.randn(n, 3, generator=torch.Generator().manual_seed(0)),
        "full_per_pair": torch.tensor([4.0, 5.0, 6.0]),
        "empty_per_pair": torch.tensor([-1.0, 1.0, 0.0]),
        "metric": "LogitDiff",
        "ablation": "resample",
        "stats": STATS,
    }
    if kind is CircuitResult:
        fields["circuits"] = (CIRCUIT,) * n
    if kind is UnitResult:
        fields["circuits"] = (UnitCircuit({"blocks.0.mlp.hook_post": [1, 2]}),) * n
    return kind(**{**fields, **more})


def _scored() -> ScoredEdges:
    found = _edges()
    return ScoredEdges(scores=found.scores, writers=found.writers, readers=found.readers, exists=found.exists)


def _learned() -> LearnedCircuit:
    layout = GateLayout.of(GRAPH, "edge")
    gates = torch.randn(len(layout), generator=torch.Generator().manual_seed(0))
    return LearnedCircuit(
        log_alpha=layout.spread(gates, closed=-torch.inf, fixed=torch.inf),
        writers=tuple(map(str, GRAPH.writers)),
        readers=tuple(map(str, GRAPH.readers)),
        level="edge",
        size=6,
        losses=torch.linspace(1, 0.25, 9, dtype=torch.float64),
        sizes=torch.linspace(80, 7, 9, dtype=torch.float64),
        targets=torch.linspace(80, 6, 9, dtype=torch.float64),
        held_out_pairs=torch.tensor([False, True, False]),
        values=torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 4.0], [0.0, 1.0, 0.0]]),
        metric="KL",
        ablation="mean",
        method="lagrangian",
        stats=STATS,
    )


def _pair(n: int = 3, token: str = HOSTILE) -> Pair:
    ids = torch.arange(n)
    return Pair(ids, ids.flip(0), clean_tokens=(token,) * n, corrupted_tokens=(" x",) * n, answer=" Mary", wrong=[3, 4])


def _alignment(n_layers: int = 2, n_pos: int = 3) -> AlignmentTable:
    margins = torch.randn(n_layers, n_pos, 4, generator=torch.Generator().manual_seed(0))
    return AlignmentTable(
        method="das",
        site="resid_pre",
        variables=("a", HOSTILE),
        layers=tuple(range(n_layers)),
        positions=tuple(range(n_pos)),
        margins=margins,
        unpatched_margins=torch.tensor([-1.0, -1.0, 1.0, NAN]),
        training_accuracy=torch.full((n_layers, n_pos), NAN, dtype=torch.float64),
        bases={},
    )


def _basis() -> Basis:
    return Basis("blocks.0.hook_resid_pre", torch.eye(4)[:2], "das", {"seed": 1, "paper": HOSTILE})


def _das(**more: Any) -> DasResult:
    fields = {
        "site": Site("blocks.0.hook_resid_pre", 1),
        "bases": {"a": _basis()},
        "margins": torch.tensor([1.0, -1.0]),
        "unpatched_margins": torch.tensor([-1.0, -1.0]),
        "training_accuracy": 0.5,
        "history": tuple(Step(step=n, loss=1.0, validation_loss=1.5, validation_accuracy=0.5) for n in range(50)),
        "stopped": "the loss no longer fell",
    }
    return DasResult(**{**fields, **more})


def _counterfactuals() -> Counterfactuals:
    ids = torch.zeros(30, 3, dtype=torch.long)
    values = {"a": torch.arange(30)}
    return Counterfactuals(base=ids, sources={"a": ids}, labels=ids[:, 0], base_values=values, source_values=values)


PROVENANCE = Provenance(
    method="mean",
    model="ab" * 20,
    transforms=("fold_ln",),
    dtype="float32",
    positions=HOSTILE,
    prompts="p",
    counts=(3, 4),
)


def _vector(layer: int = 0, n_heads: int = 0) -> SteeringVector:
    shape = (n_heads, 4) if n_heads else (4,)
    levels = torch.tensor([0.5, 1.5])
    return SteeringVector(
        name=f"blocks.{layer}.hook_resid_pre",
        direction=torch.ones(shape),
        levels=levels[:, None].expand(2, n_heads) if n_heads else levels,
        share=torch.full(shape[:-1], 0.5),
        provenance=PROVENANCE,
    )


def _steering_table(n_vectors: int = 2, fill: float = 1.0) -> SteeringTable:
    shape = (n_vectors, 3)
    return SteeringTable(
        names=tuple(f"blocks.{layer}.hook_resid_pre" for layer in range(n_vectors)),
        strengths=(0.5, 1.0, 2.0),
        metric="LogitDiff",
        how="add",
        effect=torch.full(shape, fill),
        standard_error=torch.full(shape, NAN),
        kl=torch.full(shape, 0.25),
        perplexity=torch.full(shape, 12.0),
        plain_effect=0.5,
        plain_perplexity=11.0,
        n_prompts=4,
        n_neutral_tokens=100,
        provenance=PROVENANCE,
    )


def _selection(fill: float = 0.5) -> DirectionSelection:
    scores = torch.full((2, 3), fill)
    return DirectionSelection(
        directions=torch.ones(2, 3, 4),
        means=torch.zeros(2, 2, 3, 4),
        layers=(0, 1, 2),
        positions=(-1, -2),
        n_layers=4,
        bypass=scores,
        induce=scores,
        kl=scores / 10,
        positive=1.0,
        negative=-1.0,
        criteria=Criteria(max_kl=0.1, min_induce=0.0, deepest=0.8),
        held_out=(3, 4),
        provenance=PROVENANCE,
    )


def _erasure(n: int = 2) -> Erasure:
    points = tuple(
        PointErasure(
            name=f"blocks.{layer}.hook_resid_pre",
            mean=torch.zeros(4),
            readers=torch.ones(1, 4),
            writers=torch.ones(1, 4),
            removed=torch.tensor(0.25),
        )
        for layer in range(n)
    )
    return Erasure(points=points, classes=("he", HOSTILE), sequential=True, provenance=PROVENANCE)


def _generated(n_rows: int = 2, n_new: int = 3, *, has_text: bool = True) -> GenerationOutput:
    tokens = torch.arange(n_rows * (2 + n_new)).view(n_rows, 2 + n_new)
    return GenerationOutput(
        tokens=tokens,
        prompt_lengths=[2] * n_rows,
        n_new_tokens=[n_new] * n_rows,
        finish_reasons=["length"] * n_rows,
        logprobs=torch.full((n_rows, n_new), -0.5),
        text=["text"] * n_rows if has_text else None,
        cache=None,
        timing=GenerationTiming(time_to_first_token=0.1, total=0.5, n_steps=n_new),
        str_tokens=[[" the", HOSTILE] + [" a"] * n_new for _ in range(n_rows)] if has_text else None,
    )


def _comparison() -> ModelComparison:
    lines = [
        {"first": "one", "second": HOSTILE, "site": f"blocks.{layer}.hook_resid_pre", "layer": layer, "cosine": NAN}
        for layer in range(3)
    ]
    frame = import_package("pandas").DataFrame(lines)
    return ModelComparison(frame=frame, weights=None, names=("one", HOSTILE), n_prompts=2, n_tokens=9)


def _verification(n_failed: int = 1) -> VerificationReport:
    results = [
        CheckResult(check=f"check {n}", subject=HOSTILE, measured=float(n < n_failed), bound=0.5, message="look there")
        for n in range(n_failed + 2)
    ]
    return VerificationReport("a model", results, notes=["a note"])


def _conformance(n: int = 2) -> ConformanceReport:
    return ConformanceReport(
        tuple(Outcome(model=f"model {i}", check="c", verdict="failed", n_results=1, message=HOSTILE) for i in range(n))
    )


def _lens(kind: type[Any]) -> Any:
    origin = Origin.of(make_model("rotary", dtype=torch.float32))
    if kind is JacobianLens:
        return JacobianLens(layers=(0, 1), origin=origin, jacobians=torch.zeros(2, 12, 12), n_prompts=3)
    losses = tuple(LayerLoss(layer, 0.5, NAN) for layer in range(2))
    weight, bias = torch.zeros(2, 12, 12), torch.zeros(2, 12)
    return TunedLens(layers=(0, 1), origin=origin, weight=weight, bias=bias, before=losses, after=losses)


def _adapter() -> LoraAdapter:
    settings = LoraSettings(
        base=HOSTILE, base_revision=None, rank=2, alpha=4.0, rank_pattern={}, alpha_pattern={}, rslora=False,
        dora=False, target_parameters=(), turns_experts=False,
    )  # fmt: skip
    modules = tuple(
        LoraModule(f"model.layers.{layer}.self_attn.q_proj", torch.zeros(2, 4), torch.zeros(4, 2)) for layer in range(3)
    )
    return LoraAdapter(where="a folder", settings=settings, modules=modules, whole={}, config={})


def _cache(n_layers: int = 2, *, device: str = "cpu", n_points: int = 3) -> ActivationCache:
    cfg = make_config(n_layers=n_layers)
    words = ["hook_resid_pre", "attn.hook_z", "hook_resid_post", "hook_mlp_out", "hook_attn_out"][:n_points]
    tensors = {f"blocks.{i}.{word}": torch.zeros(1, 3, 12, device=device) for i in range(n_layers) for word in words}
    return ActivationCache(
        {"hook_embed": torch.zeros(1, 3, 12, device=device), **tensors, HOSTILE: torch.ones(1)}, cfg=cfg
    )


def _prefilled() -> HookedKeyValueCache:
    return make_model("grouped", dtype=torch.float32).prefill(random_tokens(2, 5))


def _hooked() -> HookedCausalLM:
    model = make_model("grouped", dtype=torch.float32)
    model.add_hook("blocks.0.attn.hook_z", lambda tensor, hook: None)
    return model


def _meta() -> HookedCausalLM:
    with torch.device("meta"):
        return HookedCausalLM(LARGE)


def _known_check() -> KnownCheck:
    changed = {("embed", "m0"): 1.0, ("m0", "logits"): 0.5, ("embed", "logits"): 0.0}
    return KnownCheck(
        name=HOSTILE, n_pairs=16, accuracy=1.0, interchange={"a": 0.5}, strictness=1.0, changed=changed, circuit=CIRCUIT
    )


def _curve() -> FaithfulnessCurve:
    return FaithfulnessCurve(result=_circuits(2), random=_circuits(4))


def _discovery() -> Discovery:
    return Discovery(
        circuit=CIRCUIT,
        decisions=(Decision(writer="embed", reader="logits", verdict="removed", damage=0.1, increase=0.0),),
        damage=0.1,
        threshold=0.01,
        metric="KL",
        stats=DiscoveryStats(
            edges=81,
            decided=60,
            unreachable=3,
            circuits_run=9,
            forwards=9,
            tokens=2.0,
            naive_forwards=99,
            naive_tokens=9,
        ),
        held_out_damage=NAN,
        held_out_pairs=torch.tensor([False, True]),
    )


def _constants() -> OptimalAblation:
    return OptimalAblation(
        outputs={f"blocks.{layer}.hook_mlp_out": torch.zeros(1, 1, 12) for layer in range(2)},
        circuit=CIRCUIT,
        losses={"zero": 2.0, "optimal": NAN},
        history=torch.linspace(1, 0, 4),
        metric="KL",
    )


def _pool() -> CausalLMPool:
    return CausalLMPool(models={"_pretrained_": "a/b", HOSTILE: "c/d", "memory": nn.Linear(2, 2)})


def _lazy() -> LazyWeights:
    return LazyWeights(
        tuple(f"blocks.{layer}.mlp.W_in" for layer in range(3)), lambda name: torch.zeros(2), cfg=None, transforms=()
    )


def _attribution(**more: Any) -> AttributionResult:
    found = _sweep(kind=AttributionResult, method="atp", rules="gradient", **more)
    object.__setattr__(found, "checked", _check())
    return found


def _on_meta() -> SAE:
    with torch.device("meta"):
        return SAE(SAEConfig(d_in=4, d_sae=16, architecture="topk", k=2))


def _dataset() -> ActivationDataset:
    with TemporaryDirectory() as folder:
        sites = {f"blocks.{layer}.hook_resid_pre": (12,) for layer in range(40)}
        Manifest(run={}, sites=sites, dtype="float32").write(LocalFolder(Path(folder)))
        return ActivationDataset(folder)


OBJECTS: dict[type[Any], Callable[[], Any]] = {
    HookedCausalLM: _hooked,
    HookedConfig: lambda: CFG,
    MemoryPlan: lambda: plan(_hooked(), [[1, 2, 3]]),
    type(CFG.block(0)): lambda: CFG.block(1),
    type(CFG.description): lambda: CFG.description,
    ActivationCache: _cache,
    HookedKeyValueCache: _prefilled,
    type(HookedKeyValueCache.init_cache(CFG).entries[0]): lambda: _prefilled().entries[0],
    FactoredMatrix: lambda: FactoredMatrix(torch.zeros(3, 12, 2), torch.zeros(3, 2, 12)),
    SweepResult: _sweep,
    AttributionResult: _attribution,
    EstimateCheck: _check,
    EdgeScores: _edges,
    EdgeAttributionResult: lambda: _edges(kind=EdgeAttributionResult),
    Results: lambda: Results({HOSTILE: _sweep(), "other": _edges()}),
    AblationResult: lambda: _circuits(kind=AblationResult),
    CircuitResult: _circuits,
    UnitResult: lambda: _circuits(kind=UnitResult),
    FaithfulnessCurve: _curve,
    Discovery: _discovery,
    Circuit: lambda: CIRCUIT,
    type(induction()): induction,
    KnownCheck: _known_check,
    Minimality: lambda: Minimality(
        parts=("a0.h1", HOSTILE),
        sets=("none", "s"),
        changes=torch.tensor([[0.1, NAN], [0.3, -0.4]]),
        full=2.0,
        metric="KL",
    ),
    Completeness: lambda: Completeness(circuit=_circuits(), network=_circuits()),
    Stability: lambda: Stability(circuits=(CIRCUIT, Circuit()), rows=((0, 1), (1, 2)), seeds=(0, 1)),
    PairSplit: lambda: PairSplit(
        discovery=(_pair(),), evaluation=(_pair(),), discovery_rows=(0, 2, 3), evaluation_rows=(1,)
    ),
    HeldOutCurve: lambda: HeldOutCurve(scores=_edges(), curve=_curve(), discovery_rows=(0,), evaluation_rows=(1, 2)),
    UnitCircuit: lambda: UnitCircuit({"blocks.0.mlp.hook_post": [3, 17], HOSTILE: []}),
    UnitScores: lambda: UnitScores(
        scores={HOSTILE: torch.tensor([1.0, NAN])}, metric="KL", method="atp", rules=HOSTILE, ablation="zero"
    ),
    ScoredEdges: _scored,
    ScoredGraph: lambda: ScoredGraph(edges=_scored(), circuit=CIRCUIT),
    OptimalAblation: _constants,
    LearnedCircuit: _learned,
    Pair: _pair,
    AlignmentTable: _alignment,
    Basis: _basis,
    DasResult: _das,
    CausalModel: lambda: CausalModel({"a": lambda tokens: tokens[:, 0]}, lambda a: a),
    Counterfactuals: _counterfactuals,
    SteeringVector: _vector,
    SteeringVectors: lambda: SteeringVectors(vectors=(_vector(0), _vector(1))),
    SteeringTable: _steering_table,
    DirectionSelection: _selection,
    Erasure: _erasure,
    PointErasure: lambda: _erasure().points[0],
    GenerationOutput: _generated,
    GenerationStep: lambda: GenerationStep(
        tokens=torch.tensor([3, 0]),
        is_new=torch.tensor([True, False]),
        text=[HOSTILE, ""],
        logprobs=torch.tensor([-0.5, 0.0]),
        finish_reasons=[None, "length"],
    ),
    TrainResult: lambda: TrainResult(
        model=nn.Linear(2, 2),
        step=3,
        records=({"step": 1, "loss": NAN}, {"step": 3, "eval_loss": 0.5}),
        folder=Path("x"),
    ),
    ModelComparison: _comparison,
    CausalLMPool: _pool,
    LazyWeights: _lazy,
    VerificationReport: _verification,
    ConformanceReport: _conformance,
    JacobianLens: lambda: _lens(JacobianLens),
    TunedLens: lambda: _lens(TunedLens),
    SAE: lambda: SAE(SAEConfig(d_in=4, d_sae=16)),
    LoraAdapter: _adapter,
    ActivationDataset: _dataset,
    Probe: lambda: Probe(
        site=HOSTILE,
        classes=("he", HOSTILE),
        weights=torch.ones(1, 4),
        bias=torch.zeros(1),
        accuracy=0.75,
        train_accuracy=1.0,
        majority=NAN,
        n_train=3,
        n_test=4,
    ),
    StreamSummary: lambda: StreamSummary(
        n_scored=3, n_found=1, errors=[ItemError(path=Path("x"), line=3, message=HOSTILE)]
    ),
    ItemFile: lambda: ItemFile(path=Path("x.jsonl"), items={1: ContinuationItem(id="1", continuation=" x")}, errors=[]),
}
"""By class how to make one of its objects."""

ODD: dict[str, Callable[[], Any]] = {
    **{f"config: {name}": (lambda cfg=cfg: cfg) for name, cfg in ALL_CONFIGS.items()},
    **{f"model: {name}": (lambda name=name: make_model(name)) for name in ("bare", "layers that lack parts", "capped")},
    "model on the meta device": _meta,
    "model without blocks": lambda: HookedCausalLM(make_config(n_layers=0)),
    "deep config, every layer another": lambda: make_config(
        n_layers=60, windows=tuple(range(1, 61)), positions=(NoPositions(), RotaryPositions(dim=2)) * 30
    ),
    "deep config, layers in a rhythm": lambda: make_config(
        n_layers=20, norm_after=tuple(n % 3 == 0 for n in range(20))
    ),
    "cache of nothing": lambda: ActivationCache({}, cfg=CFG),
    "cache of many layers": lambda: _cache(60, n_points=5),
    "cache on the meta device": lambda: _cache(device="meta"),
    "empty key-value cache": lambda: HookedKeyValueCache.init_cache(CFG),
    "matrix on the meta device": lambda: FactoredMatrix(
        torch.zeros(50_000, 12, device="meta"), torch.zeros(12, 9, device="meta")
    ),
    "sweep of one cell": lambda: _sweep(1, 1),
    "sweep without axes": lambda: _sweep(1, 1, per_pair=torch.ones(2), axes={}),
    "sweep that is no number": lambda: _sweep(fill=NAN),
    "sweep that is infinite": lambda: _sweep(fill=float("inf")),
    "sweep without a scale": lambda: _sweep(corrupted_per_pair=torch.tensor([2.0, 3.0])),
    "sweep of many cells": lambda: _sweep(80, 100),
    "sweep of heads": lambda: _sweep(32, 32),
    "sweep of labels": lambda: _sweep(axes={"layer": (HOSTILE, "b", "c"), "pos": (0, 1, 2, 3)}),
    "estimate unchecked": lambda: _sweep(kind=AttributionResult, method="ig", rules="relp"),
    "check of nothing": lambda: EstimateCheck(
        cells=(), estimated=torch.zeros(0), exact=torch.zeros(0), is_top=torch.zeros(0, dtype=torch.bool), n_cells=0,
        method="atp",
    ),
    "scores of a large network": lambda: _edges(Graph.of(make_config(n_layers=8, n_heads=8, d_head=2))),
    "scores that are no numbers": lambda: _edges(per_pair=torch.full((*GRAPH.exists().T.shape, 2), NAN)),
    "many metrics": lambda: Results({f"metric {n}": _sweep(8, 8) for n in range(60)}),
    "many circuits": lambda: _circuits(500),
    "circuits of one pair": lambda: _circuits(
        per_pair=torch.ones(2, 1), full_per_pair=torch.ones(1), empty_per_pair=torch.ones(1)
    ),
    "empty circuit": Circuit,
    "circuit of all edges": lambda: Circuit.full(make_config(n_layers=6, n_heads=6, d_head=2)),
    "circuit of many units": lambda: UnitCircuit({f"blocks.{n}.mlp.hook_post": range(0, 3000, 2) for n in range(30)}),
    "long pair": lambda: _pair(2000),
    "pair of nothing": lambda: _pair(0),
    "table of many cells": lambda: _alignment(40, 60),
    "directions untrained": lambda: _das(history=(), margins=torch.zeros(0), unpatched_margins=torch.zeros(0)),
    "vector of heads": lambda: _vector(0, 40),
    "vectors of heads": lambda: SteeringVectors(vectors=tuple(_vector(n, 3) for n in range(50))),
    "strengths that are no numbers": lambda: _steering_table(fill=NAN),
    "strengths of many vectors": lambda: _steering_table(300),
    "candidates that are no numbers": lambda: _selection(NAN),
    "erasure at many points": lambda: _erasure(90),
    "generation of many rows": lambda: _generated(300, 400),
    "generation without text": lambda: _generated(has_text=False),
    "generation of nothing": lambda: _generated(2, 0),
    "report of nothing": lambda: VerificationReport("a model", []),
    "report of many failures": lambda: _verification(400),
    "suite that failed at length": lambda: _conformance(300),
    "training of many entries": lambda: TrainResult(
        model=nn.Linear(2, 2), step=9, records=tuple({"step": n, "loss": 1 / (n + 1)} for n in range(5000)), folder=None
    ),
    "training of none": lambda: TrainResult(model=nn.Linear(2, 2), step=0, records=(), folder=None),
    "autoencoder on the meta device": _on_meta,
}  # fmt: skip
"""Objects that a display could stumble over."""
