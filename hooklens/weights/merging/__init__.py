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

Models come in one of three forms, and what comes back is of that form: **state dicts** (tensors by name), which may
read their tensors when asked; **checkpoint folders**, or names on the hub, merged into a new folder, `out=`, that
transformers loads, too; and **`HookedCausalLM`s**. The base, or else the first model, gives dtypes, configuration,
tokenizer and settings. Refused are models of other networks, with what differs listed, and processed or quantised
weights.

All formulas are computed in float64, over pieces of weights: of folders no more than a few megabytes are in memory at
a time. Weights that stand under two names count once. Layouts are permutations of one another, so an entry becomes the
same in each, but for `slerp`, which takes each tensor as it stands there, the draws of `dare`, and of entries that are
equal in size, in `ties_merging`, those at the border of what stays. `compat="fusionbench"` gives the numbers of that
library bit for bit, in memory.
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
