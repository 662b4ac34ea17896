"""Path patching: what senders do through chosen receivers, and through nothing else."""
