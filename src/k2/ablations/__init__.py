"""Ablation studies: arms of one pretraining, several seeds, one comparison."""
