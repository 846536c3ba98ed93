"""Torch-free configuration schemas; importable in a KFP compiler."""
