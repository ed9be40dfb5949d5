"""Responses with their rewards, in the run's folder: a file for each step, a line for each response."""

import json
from pathlib import Path
from typing import Any

from lightrft.trainer.replay_buffer import Experience

FOLDER = "trajectories"  # of sampled responses
EVALUATION_FOLDER = "eval/rows"  # of greedy responses to the evaluation data


def records(items: list[Experience], step: int, n_samples: int, count: int) -> list[dict[str, Any]]:
    """What is recorded of a step's first responses, in whole groups.

    :param items: Scored experiences with advantages, a group's next to each other.
    :param count: Responses to record, rounded up to whole groups.
    """
    return [
        {"step": step, "group": number // n_samples, **describe(item), "advantage": float(item.advantages[-1])}
        for number, item in enumerate(items[: -(-count // n_samples) * n_samples])
    ]


def describe(item: Experience) -> dict[str, Any]:
    """What is recorded of a scored response, sampled or greedy."""
    return {
        **item.source,
        "tags": list(item.tags),
        "prompt": item.prompt,
        "response": item.response,
        "reference": item.reference,
        "label": item.label,
        "reward": item.reward,
        **item.reward_metrics,
        "truncated": item.truncated,
    }


def save(folder: Path, step: int, samples: list[dict[str, Any]]) -> None:
    """Write a step's samples as JSON Lines."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
