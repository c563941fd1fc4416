"""Fits alignments and budgets on text."""
