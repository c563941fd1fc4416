"""Benchmarks: how long the ops take, against what else could be called in their place."""
