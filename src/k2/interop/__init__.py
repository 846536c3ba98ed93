"""Checkpoints to and from other software: what formats store, and conversion tensor by tensor."""
