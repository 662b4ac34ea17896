"""Checkpoint folders as files: read tensor by tensor, and replaced all at once."""
