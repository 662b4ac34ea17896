"""Edits and captures while generating: what a position means from step to step."""
