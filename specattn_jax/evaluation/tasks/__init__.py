"""Tasks with a score: RULER through lm-evaluation-harness, and tasks of our own that need nothing but this package."""
