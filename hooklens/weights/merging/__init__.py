"""Merging models: their weights put together into one model's, weight by weight.

**Methods.** `theta_i` are the models, `theta_base` what they were trained from, `tau_i = theta_i - theta_base` their
task vectors:

| | |
|---|---|
| `simple_average` | `sum_i theta_i / n` |
| `weighted_average` | `sum_i w_i theta_i` (Wortsman et al. 2022) |
| `slerp` | each weight on the arc between two models' (Shoemake 1985) |
| `task_arithmetic` | `theta_base + s sum_i tau_i` (Ilharco et al. 2023) |
| `ties_merging` | task vectors trimmed to their largest entries, a sign elected for each (Yadav et al. 2023) |
| `dare` | entries of task vectors dropped at random, then one of the above (Yu et al. 2024) |

Models are mappings from names to tensors, under any names that all of them have: the layout of a merge does not matter,
since all layouts are permutations of one another. A mapping may read its tensors when asked: one weight of each model
is in memory at a time. All formulas are computed in float64.
"""

from hooklens.weights.merging.methods import (
    dare,
    simple_average,
    slerp,
    task_arithmetic,
    ties_merging,
    weighted_average,
)

__all__ = ["dare", "simple_average", "slerp", "task_arithmetic", "ties_merging", "weighted_average"]
