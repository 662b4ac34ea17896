"""Tests of hooklens.model.plan."""
