"""Models side by side: how far their activations, their predictions and their weights are from each other.

- `compare`: the comparison, and how to read it; `result`: what it gives.
- `prompts`: what the models read; `activations`: what is kept of a run.
- `measures`: distances of activations; `weights`: distances of weights.
"""
