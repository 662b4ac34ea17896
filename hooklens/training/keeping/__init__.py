"""What is kept of a run: its folder, its state, and its checkpoints one after another."""
