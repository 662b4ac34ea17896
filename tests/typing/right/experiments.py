"""Experiments: patching, attribution, evaluation, steering."""

import pandas
from torch import Tensor
from typing_extensions import assert_type

import hooklens as hl
from hooklens import analysis, patching

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
clean = "When Mary and John went to the store , John gave a drink to"
corrupted = "When Mary and John went to the store , Mary gave a drink to"
metric = patching.LogitDiff(" Mary", " John")

result = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
assert_type(result, patching.SweepResult)
assert_type(result.values, Tensor)
assert_type(result.to_dataframe(), pandas.DataFrame)
print(result.top(3), result.stats.cells, result.normalized.shape, result.clean)

several = patching.sweep(
    model, clean, corrupted, patching.grid("z", layers=[0]), {"difference": metric, "kl": patching.KL()}, progress=False
)
assert_type(several["kl"], patching.SweepResult)


def at_the_end(logits: Tensor) -> Tensor:
    """A metric of one's own."""
    return logits[:, -1, 0]


assert_type(patching.sweep(model, clean, corrupted, "mlp_out", at_the_end, progress=False), patching.SweepResult)
print(patching.sweep(model, clean, corrupted, "attn_out", lambda logits: logits[:, -1, 1], progress=False).values.max())

estimate = patching.attribution(model, clean, corrupted, "resid_pre", metric, progress=False)
print(estimate.to_dataframe().head(), estimate.values.abs().max())
scores = patching.edge_attribution(model, clean, corrupted, metric, progress=False)
circuit = scores.circuit(10)
faithfulness = patching.evaluate_circuits(model, clean, corrupted, [circuit], metric, progress=False)
print(faithfulness.to_dataframe().head())
paths = patching.path_patch(model, clean, corrupted, None, ["logits"], metric, progress=False)
assert_type(paths, patching.SweepResult)

table = hl.evaluation.score_continuations(model, "When Mary and John", [" went", " gave"])
assert_type(table, pandas.DataFrame)
_, cache = model.run_with_cache(clean)
print(analysis.lens.logit_lens(model, cache))
print(analysis.heads.detect_heads(model, clean, "induction"))
