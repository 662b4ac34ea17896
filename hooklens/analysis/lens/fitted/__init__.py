"""Lenses that are fitted: their training, their files, and what can be done with them."""
