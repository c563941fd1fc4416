"""Plots, tables and notes on where numbers come from."""
