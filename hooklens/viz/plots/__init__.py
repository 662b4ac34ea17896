"""Ordinary charts as views: bars and curves."""
