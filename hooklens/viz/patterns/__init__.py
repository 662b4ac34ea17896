"""Attention patterns as a view: read, written compactly, shown, drawn."""
