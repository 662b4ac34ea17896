"""Choosing the next token, and when a row has had its last."""
