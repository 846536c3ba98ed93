"""Running stages: the contract, the registry, artifact keys, and the three doors (function, CLI, KFP)."""
