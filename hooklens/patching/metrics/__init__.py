"""Metrics: the number that a run of each pair is judged by.

A metric is a value that says which positions it reads and how it turns their logits into one number per pair. An
experiment prepares it once for the pairs at hand (`Metric.prepare`): answers become ids, references become logits.

- `metric`: what a metric is, and what it gets to see of the unpatched runs.
- `of_answers`: `LogitDiff`, `LogProb`, `Probability`, `Accuracy`.
- `of_runs`: `KL` and `Loss`.
- `scaled`: `FractionRecovered`, another metric on a scale from the corrupted run to the clean one.
- `function`: any function from logits to values.
"""
