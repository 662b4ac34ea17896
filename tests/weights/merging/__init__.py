"""Tests of hooklens.weights.merging."""
