"""Tests of hooklens.generation.watching."""
