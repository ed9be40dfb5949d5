"""Experiences for tests that care for a few of their fields."""

from typing import Any

import torch

from lightrft.trainer.replay_buffer import Experience


def make_experience(length: int = 1, **fields: Any) -> Experience:
    """One whose response has so many tokens, and an engine that was sure of each."""
    usual = {"prompt_ids": torch.tensor([1]), "response_ids": torch.arange(length), "clips": [], "truncated": False}
    usual["engine_log_probs"] = torch.zeros(length)
    return Experience(**dict.fromkeys(("prompt", "reference", "label"), "") | usual | fields)
