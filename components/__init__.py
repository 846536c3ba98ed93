"""Thin KFP components: each calls one stage of k2."""
