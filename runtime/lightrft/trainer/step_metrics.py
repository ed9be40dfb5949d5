"""From the responses and sums of a step to its metrics. Each rank makes sums, which are added up over all ranks."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from lightrft.trainer.replay_buffer import Experience


def reward_sums(items: Sequence[Experience]) -> dict[str, float]:
    """Sums over scored responses: how many there are, their rewards, the rewards' parts, lengths and truncations."""
    sums = {
        "responses": float(len(items)),
        "rollout/reward": sum(item.reward for item in items),
        "rollout/response_length": float(sum(len(item.response_ids) for item in items)),
        "rollout/truncated_fraction": float(sum(item.truncated for item in items)),
    }
    for name in items[0].reward_metrics:
        sums[f"rollout/{name}"] = sum(item.reward_metrics[name] for item in items)
    return sums


def spread_sums(items: Sequence[Experience], n_samples: int, names: Iterable[str] = ()) -> dict[str, float]:
    """Sums that show how far rewards differ, within groups of ``n_samples`` neighbours and altogether."""
    groups = [items[i : i + n_samples] for i in range(0, len(items), n_samples)]
    return {
        "squares": sum(item.reward**2 for item in items),
        "groups": float(len(groups)),
        "groups_alike": float(sum(not has_spread(group, names) for group in groups)),
    }


def has_spread(group: Sequence[Experience], names: Iterable[str] = ()) -> bool:
    """Whether the rewards of a group differ, so that it teaches something.

    :param names: Parts of the reward, of which one that differs is enough; none: the whole reward counts.
    """
    rewards = [reward_parts(item, names) if names else item.reward for item in group]
    return min(rewards) < max(rewards)


def reward_parts(item: Experience, names: Iterable[str]) -> list[float]:
    """The named parts of a response's reward, and its overlong penalty, which is 0 without one."""
    return [*(item.reward_metrics[name] for name in names), item.reward_metrics.get("overlong_penalty", 0.0)]


def normalised_parts(args: Any) -> list[str]:
    """The parts of the reward that the advantages take one by one; none where they take the whole."""
    return [name for name, w in args.reward_parts.items() if w] if args.advantage_estimator == "gdpo" else []


def tag_sums(items: Sequence[Experience]) -> dict[tuple[str, str], float]:
    """Sums over the responses of each tag, by (name, tag): how many there are, and the parts of their rewards."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for item in items:
        for tag in item.tags:
            sums["share", tag] += 1
            for name, value in item.reward_metrics.items():
                sums[name, tag] += value
    return dict(sums)


def tag_metrics(sums: dict[tuple[str, str], float], prefix: str, responses: float) -> dict[str, float]:
    """Metrics ``<prefix>/<name>/<tag>``: each tag's share of the responses, and the means of its rewards' parts.

    :param sums: From :func:`tag_sums`, over all ranks.
    :param prefix: ``rollout`` or ``eval``.
    :param responses: All of them, tagged or not.
    """
    return {
        f"{prefix}/{name}/{tag}": value / (responses if name == "share" else sums["share", tag])
        for (name, tag), value in sums.items()
    }


def step_metrics(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Metrics of a step.

    :param sums: Of :func:`reward_sums`, :func:`spread_sums` and the update, over all ranks.
    :param maxima: Over all ranks: the log-prob gap, and the times in seconds.
    """
    metrics = {name: value / sums["responses"] for name, value in sums.items() if name.startswith("rollout/")}
    # NaN where no micro-batch had a finite loss
    tokens, sampled = sums["tokens"] or math.nan, sums["sampled_tokens"] or math.nan
    variance = sums["squares"] / sums["responses"] - metrics["rollout/reward"] ** 2
    metrics |= {
        "rollout/reward_std": math.sqrt(variance) if variance > 1e-9 else 0.0,
        "rollout/groups_without_spread": sums["groups_alike"] / sums["groups"],
        "rollout/logprob_gap_mean": sums["gap"] / sampled,
        "rollout/logprob_gap_max": maxima["gap"],
        "train/policy_loss": sums["policy_loss"] / (sums["micro_batches"] or math.nan),
        "train/entropy": sums["entropy"] / sampled,
        "train/kl": sums["kl"] / tokens,
        "train/clip_fraction": sums["clipped"] / tokens,
        **({"train/correction_weight": sums["weights"] / tokens} if "weights" in sums else {}),
        **({"train/correction_limited": sums["limited"] / tokens} if "limited" in sums else {}),
        **({"train/heard": sums["heard"] / tokens} if "heard" in sums else {}),
        "train/not_finite": sums["train/not_finite"],
        "samples_per_second": sums["responses"] / maxima["time/step"],
    }
    return metrics | {name: value for name, value in maxima.items() if name.startswith("time/")}
