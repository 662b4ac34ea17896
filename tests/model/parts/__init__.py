"""Tests of hooklens.model.parts."""
