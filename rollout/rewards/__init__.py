"""Rewards: how the end state of a rollout becomes a number."""
