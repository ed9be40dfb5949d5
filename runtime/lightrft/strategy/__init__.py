"""Sharded training, checkpoints, and the life of the rollout engine."""

from lightrft.strategy.factory import get_strategy

__all__ = ["get_strategy"]
