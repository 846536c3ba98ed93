"""Work of several pods: one torchx application per stage, and the ways to run it on a cluster."""
