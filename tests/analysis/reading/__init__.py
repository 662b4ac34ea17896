"""Tests of hooklens.analysis.reading."""
