"""Tests of hooklens.model.moe."""
