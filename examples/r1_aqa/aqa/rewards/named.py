"""Rewards by name: R1-AQA's, some others, and a user's own ``module:function``.

A reward is a function ``(response, reference, think) -> number``: the response's text without special tokens, the gold
answer, and whether the thinking process was asked for. Accuracy and format by R1-AQA's rule are measured beside it
whatever it pays for, so that runs with different rewards can be compared.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from aqa.rewards.matching import ANSWER_CLOSE, ANSWER_OPEN, texts_equal
from aqa.rewards.r1_aqa import avqa_combined_reward_fn, format_reward_fn, reward_fn, score_batch

Reward = Callable[[str, str, bool], float]
BRIEF_WORDS = 64  # that cost nothing
LONGEST_WORD = 20  # characters; a longer one counts as several, so that leaving out spaces saves nothing
LONGEST_COST = 0.5


def exact(response: str, reference: str, think: bool) -> float:
    """Format, and accuracy as text alone: ``math_verify`` takes "about 2 cats" for "some 2 dogs".

    :param response: Response text.
    :param reference: Gold answer.
    :param think: Ask for the think form.
    :return: 0.0, 1.0 or 2.0.
    """
    wrapped = f"{ANSWER_OPEN}{reference.replace(ANSWER_OPEN, '').replace(ANSWER_CLOSE, '')}{ANSWER_CLOSE}"
    return float(texts_equal(response, wrapped)) + format_reward_fn(response, think)


def graded_format(response: str, reference: str, think: bool) -> float:
    """Accuracy, and format in degrees: 1 for the whole form, else half the share of its tags that occur just once.

    :param response: Response text.
    :param reference: Gold answer.
    :param think: Ask for the think form.
    :return: 0.0 to 2.0.
    """
    _, accuracy, form = avqa_combined_reward_fn(response, reference, think)
    tags = [ANSWER_OPEN, ANSWER_CLOSE, *(["<think>", "</think>"] if think else [])]
    return accuracy + (form or 0.5 * sum(response.count(tag) == 1 for tag in tags) / len(tags))


def length_aware(response: str, reference: str, think: bool) -> float:
    """R1-AQA's reward, less up to 0.5 for words beyond the first 64: all of it at twice as many.

    :param response: Response text.
    :param reference: Gold answer.
    :param think: Ask for the think form.
    :return: -0.5 to 2.0.
    """
    total, _, _ = avqa_combined_reward_fn(response, reference, think)
    words = sum(-(-len(word) // LONGEST_WORD) for word in response.split())
    beyond = max(0, words - BRIEF_WORDS) / BRIEF_WORDS
    return total - LONGEST_COST * min(1.0, beyond)


NAMED: dict[str, Reward] = {"exact": exact, "graded_format": graded_format, "length_aware": length_aware}


def find_reward(name: str) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The reward function for LightRFT's trainer.

    :param name: ``r1_aqa``, one of :data:`NAMED`, or ``module:function`` with a module that Python finds, in the
        current folder, too.
    :return: With the signature of :func:`reward_models_utils.reward_fn`.
    :raises SystemExit: if there is no such function.
    """
    if name == "r1_aqa":
        return reward_fn
    return score_batch_with(NAMED[name] if name in NAMED else _import(name))


def score_batch_with(reward: Reward) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """A batch function of a reward of one response.

    :param reward: See the module's text.
    """

    def score(response: str, reference: str, think: bool) -> tuple[float, float, float]:
        total = reward(response, reference, think)
        if isinstance(total, bool) or not isinstance(total, (int, float)) or not math.isfinite(total):
            raise ValueError(f"--reward: it must return a finite number, not {total!r}, for {response!r}")
        _, accuracy, form = avqa_combined_reward_fn(response, reference, think)
        return float(total), accuracy, form

    def chosen(
        model_reward_list: Sequence[torch.Tensor],
        labels: Sequence[str] | None,
        queries: Sequence[str],
        refs: Sequence[str],
        label_map: Mapping[str, int] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return score_batch(model_reward_list, labels, queries, refs, score)

    return chosen


def _import(name: str) -> Any:
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # the current folder, after all else
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"--reward {name}: {error}; it must be module:function, the module on PYTHONPATH") from error
    if not callable(found):
        raise SystemExit(f"--reward {name}: is {found!r:.80}, no function of (response, reference, think)")
    return found
