"""Tests of hooklens.training.keeping."""
