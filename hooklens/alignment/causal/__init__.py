"""What a network is held against: a causal model, and counterfactual prompts with its answers."""
