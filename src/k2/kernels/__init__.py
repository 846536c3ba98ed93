"""Triton kernels, one file each, with the torch reference beside it."""
