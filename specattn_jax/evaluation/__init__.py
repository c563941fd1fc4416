"""Measurements of quality, through the same functions that generate."""
