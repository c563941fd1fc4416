"""Distillation of a draft for a given target."""
