"""Rephrasing (K2 report section 2.2): diverse prompts, chunk-wise autoregressive rewriting, fidelity verification."""
