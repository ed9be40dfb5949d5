"""Warning signs that a run goes wrong although nothing has failed."""

from collections.abc import Callable
from typing import Any

import torch

GAP_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # mean |log p engine - log p trainer|, nats
KL_LIMIT = 5.0  # nats a token to the start model; beyond this the model has little in common with it
CONSTANT_STEPS = 20  # warn after so many steps in which all rewards were the same number


class AnomalyError(Exception):
    """A warning sign at which the run stops (``--on_anomaly stop``)."""


class Health:
    """Watches the metrics of each step. Each kind of warning is printed once and counted every time.

    :param dtype: Of the weights; decides how far engine and trainer may be apart.
    :param action: At a sign: ``warn``, ``stop``, or ``skip`` the optimizer step.
    """

    def __init__(self, dtype: torch.dtype, action: str, warn: Callable[[str], None]) -> None:
        self.gap_limit = GAP_LIMIT[dtype]
        self.action = action
        self.warn = warn
        self.counts: dict[str, int] = {}
        self.skipped = 0  # optimizer steps left out
        self._constant: tuple[float, int] = (
            float("nan"),
            0,
        )  # the reward that all responses got, and for how many steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"counts": dict(self.counts), "skipped": self.skipped, "constant": self._constant}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back a :meth:`state`."""
        self.counts, self.skipped = dict(state["counts"]), state["skipped"]
        self._constant = tuple(state["constant"])

    def check(self, metrics: dict[str, float], step: int) -> tuple[dict[str, float], str | None]:
        """Look at a step that is done.

        :param metrics: The step's, the same on every rank.
        :return: ``health/anomalies``, signs so far, and ``health/skipped_steps``, optimizer steps left out so far; and
            the sign that the run shall stop at, if any.
        """
        signs = self.signs(metrics)
        self._constant = self._constant_steps(metrics)
        for name, sign in signs.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.counts[name] == 1 and self.action != "stop":
                kept = "; its optimizer step is left out" if self.action == "skip" else ""
                self.warn(f"step {step}: {sign}{kept} (said once; health/anomalies counts them all)")
        counts = {"health/anomalies": float(sum(self.counts.values())), "health/skipped_steps": float(self.skipped)}
        first = next(iter(signs.values()), None) if self.action == "stop" else None
        return counts, first and f"step {step}: {first}"

    def _constant_steps(self, metrics: dict[str, float]) -> tuple[float, int]:
        reward, (last, steps) = metrics["rollout/reward"], self._constant
        alike = metrics["rollout/reward_std"] == 0
        return reward, steps + 1 if alike and reward == last else int(alike)

    def signs(self, metrics: dict[str, float]) -> dict[str, str]:
        """What is wrong with a step.

        :return: Kind to what it means.
        """
        signs = {}
        gap, kl, reward = metrics["rollout/logprob_gap_mean"], metrics["train/kl"], metrics["rollout/reward"]
        if metrics.get("train/not_finite"):
            count = metrics["train/not_finite"]
            signs["not finite"] = f"{count:.0f} micro-batch(es) with a loss or gradient that is not finite"
        if gap > self.gap_limit:
            signs["gap"] = (
                f"the engine's log-probs are {gap:.2g} from the trainer's on average (largest "
                f"{metrics['rollout/logprob_gap_max']:.2g}); above {self.gap_limit:g} something differs: weights, "
                "audio or sampling"
            )
        if kl > KL_LIMIT:
            signs["kl"] = (
                f"the model is {kl:.2g} nats a token from the one it started from, more than {KL_LIMIT:g}: if the next "
                "steps' kl is as high, lower the learning rate or raise --init_kl_coef (a single step's k3 can be "
                "that of one improbable token)"
            )
        if metrics["rollout/truncated_fraction"] == 1:
            signs["truncated"] = "no response ended by itself: raise --generate_max_len, or the model has forgotten how"
        _, steps = self._constant_steps(metrics)
        if steps >= CONSTANT_STEPS:
            signs["constant"] = (
                f"all rewards have been {reward:g} for {steps} steps: there is nothing left to learn, or "
                "the reward cannot tell answers apart"
            )
        elif metrics["rollout/groups_without_spread"] == 1:
            signs["spread"] = "the responses of every group earned the same: this step teaches nothing"
        return signs
