"""INT4 for the routed experts: the number format, training through it, and checkpoints in it."""
