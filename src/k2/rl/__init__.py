"""Reinforcement learning: environments, rewards, critic, rollouts, the K2 objective."""
