"""Distributed alignment search: a rotation, its training, and what that gives."""
