"""Tests of hooklens.adapters.files."""
