"""Activation patching: sweeps over sites, planned and batched, with values exact."""

from hooklens.patching import known
from hooklens.patching.baked.bake import bake_ablation, bake_circuit
from hooklens.patching.choices.chance import random_circuits
from hooklens.patching.choices.choice import EdgeChoice
from hooklens.patching.choices.recovery import edge_auroc, overlap, rank_correlation
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.circuits.acdc import discover_circuit
from hooklens.patching.circuits.curve import FaithfulnessCurve, faithfulness_curve
from hooklens.patching.circuits.discovery import Decision, Discovery, DiscoveryInterruptedError, DiscoveryStats
from hooklens.patching.circuits.faithfulness import evaluate_circuits
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.errors import MetricError, SiteError, SmallDifferenceWarning, SweepInterruptedError
from hooklens.patching.estimates.attribution import attribution
from hooklens.patching.estimates.check import Bound, EstimateCheck, EstimateWarning
from hooklens.patching.estimates.edge_estimate import EdgeAttributionResult
from hooklens.patching.estimates.edges import edge_attribution
from hooklens.patching.estimates.estimate import AttributionResult
from hooklens.patching.estimates.rules import (
    RULE_SETS,
    ExactSoftmax,
    GradDrop,
    GradientRule,
    HalveProducts,
    HoldNormScale,
    HoldPattern,
    LinearizeActivations,
    SoftenSoftmax,
)
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.learned.constants import OptimalAblation
from hooklens.patching.learned.learn import learn_circuit
from hooklens.patching.learned.optimal import fit_optimal_ablation
from hooklens.patching.learned.result import LearnedCircuit
from hooklens.patching.metrics.function import FunctionMetric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.metrics.of_answers import Accuracy, LogitDiff, LogProb, Probability
from hooklens.patching.metrics.of_runs import KL, Loss
from hooklens.patching.metrics.scaled import FractionRecovered
from hooklens.patching.mib.graph import ScoredGraph
from hooklens.patching.mib.measures import MIB_FRACTIONS, circuit_model_distance, circuit_performance_ratio, mib_sizes
from hooklens.patching.pairs.noise import Noise
from hooklens.patching.pairs.template import Pair, stack_pairs
from hooklens.patching.paths.path import path_patch
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.results.several import Results
from hooklens.patching.runs.sites import Cell, Grid, grid
from hooklens.patching.runs.sources import draw_activations, mean_activations
from hooklens.patching.studies.completeness import Completeness, completeness
from hooklens.patching.studies.held_out import HeldOutCurve, held_out_curve
from hooklens.patching.studies.minimality import Minimality, minimality
from hooklens.patching.studies.split import PairSplit, split_pairs
from hooklens.patching.studies.stability import Stability, stability
from hooklens.patching.sweeps.act_patch import (
    generic_activation_patch,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from hooklens.patching.sweeps.memory import plan_sweep
from hooklens.patching.sweeps.patch_setters import (
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)
from hooklens.patching.sweeps.sweep import sweep
from hooklens.patching.units.circuit import UnitCircuit
from hooklens.patching.units.evaluate import UnitResult, evaluate_units
from hooklens.patching.units.scored import UnitScores
from hooklens.patching.units.scores import score_units

__all__ = [
    "KL",
    "MIB_FRACTIONS",
    "RULE_SETS",
    "Accuracy",
    "AttributionResult",
    "Bound",
    "Cell",
    "Circuit",
    "CircuitResult",
    "Completeness",
    "Decision",
    "Discovery",
    "DiscoveryInterruptedError",
    "DiscoveryStats",
    "EdgeAttributionResult",
    "EdgeChoice",
    "EdgeScores",
    "EstimateCheck",
    "EstimateWarning",
    "ExactSoftmax",
    "FaithfulnessCurve",
    "FractionRecovered",
    "FunctionMetric",
    "GradDrop",
    "GradientRule",
    "Grid",
    "HalveProducts",
    "HeldOutCurve",
    "HoldNormScale",
    "HoldPattern",
    "LearnedCircuit",
    "LinearizeActivations",
    "LogProb",
    "LogitDiff",
    "Loss",
    "Metric",
    "MetricError",
    "Minimality",
    "Noise",
    "OptimalAblation",
    "Pair",
    "PairSplit",
    "Probability",
    "Results",
    "ScoredEdges",
    "ScoredGraph",
    "SiteError",
    "SmallDifferenceWarning",
    "SoftenSoftmax",
    "Stability",
    "SweepInterruptedError",
    "SweepResult",
    "SweepStats",
    "UnitCircuit",
    "UnitResult",
    "UnitScores",
    "attribution",
    "bake_ablation",
    "bake_circuit",
    "circuit_model_distance",
    "circuit_performance_ratio",
    "completeness",
    "discover_circuit",
    "draw_activations",
    "edge_attribution",
    "edge_auroc",
    "evaluate_circuits",
    "evaluate_units",
    "faithfulness_curve",
    "fit_optimal_ablation",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "grid",
    "held_out_curve",
    "known",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "learn_circuit",
    "make_df_from_ranges",
    "mean_activations",
    "mib_sizes",
    "minimality",
    "overlap",
    "path_patch",
    "plan_sweep",
    "random_circuits",
    "rank_correlation",
    "score_units",
    "split_pairs",
    "stability",
    "stack_pairs",
    "sweep",
]
