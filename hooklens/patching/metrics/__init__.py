"""Metrics: the number that a run of each pair is judged by.

A metric is a value that says which positions it reads and how it turns their logits into one number per pair. An
experiment prepares it once for the pairs at hand (`Metric.prepare`): answers become ids, references become logits.
"""
