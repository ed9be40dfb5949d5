"""Rollout, advantages, replay buffer and the GRPO loop."""
