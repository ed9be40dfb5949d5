"""Sharded training, checkpoints, and the life of the rollout engine."""

from .factory import get_strategy

__all__ = ["get_strategy"]
