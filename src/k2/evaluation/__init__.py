"""Verifiable tasks, scores with intervals, and the harness that measures a model on them."""
