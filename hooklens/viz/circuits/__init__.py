"""Circuits as a view: nodes by layer, edges by score."""
