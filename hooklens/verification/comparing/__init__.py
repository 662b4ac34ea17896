"""Runs of a network held against others: explicit computations, whole runs, edits written as loops."""
