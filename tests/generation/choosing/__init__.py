"""Tests of hooklens.generation.choosing."""
