"""Tests of hooklens.model.attention."""
