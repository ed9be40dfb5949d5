"""Rule-based rewards of R1-AQA: accuracy + format, 0 to 2.

The rule is in ``aqa/rewards/r1_aqa.py``, the comparison of answers in ``aqa/rewards/matching.py``, further rewards and
the lookup of ``--reward`` in ``aqa/rewards/named.py``.
"""

from aqa.rewards.named import RewardError, find_reward
from aqa.rewards.r1_aqa import (
    PLAIN_LABEL,
    THINK_LABEL,
    accuracy_reward_fn,
    avqa_combined_reward_fn,
    extract_response,
    format_reward_fn,
    label_doubts,
    reward_fn,
    special_tokens,
)

__all__ = [
    "PLAIN_LABEL",
    "THINK_LABEL",
    "RewardError",
    "accuracy_reward_fn",
    "avqa_combined_reward_fn",
    "extract_response",
    "find_reward",
    "format_reward_fn",
    "label_doubts",
    "reward_fn",
    "special_tokens",
]
