"""MIB, the Mechanistic Interpretability Benchmark (Mueller et al. 2025): its measures of circuits, and its files."""
