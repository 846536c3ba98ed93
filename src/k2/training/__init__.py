"""The one training loop; pretraining, fine-tuning, quantisation-aware training and RL are configurations of it."""
