"""K2: the open, runnable training pipeline of Kimi K2."""

__version__ = "0.1.0"
