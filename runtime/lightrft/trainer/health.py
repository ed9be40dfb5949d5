"""Signs that a run goes wrong, though nothing has failed."""

from __future__ import annotations

from collections.abc import Callable

import torch

GAP_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # mean |log p engine - log p trainer|, nats
KL_LIMIT = 5.0  # nats a token to the start model: it has become another one
CONSTANT_STEPS = 20  # so many steps in which all rewards are one and the same teach nothing


class AnomalyError(Exception):
    """A sign after which the run shall stop."""


class Health:
    """Watches the metrics of each step. Each kind is warned of once and counted always.

    :param dtype: Of the weights; decides how far engine and trainer may be apart.
    :param stop: Stop at the first sign instead.
    :param warn: Shows a warning.
    """

    def __init__(self, dtype: torch.dtype, stop: bool, warn: Callable[[str], None]) -> None:
        self.gap_limit = GAP_LIMIT[dtype]
        self.stop = stop
        self.warn = warn
        self.counts: dict[str, int] = {}
        self._constant: tuple[float, int] = (float("nan"), 0)  # reward of all responses, steps it has been that

    def check(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        """Look at a step.

        :param metrics: The step's, the same on every rank.
        :param step: Rollout step, from 1.
        :return: ``health/anomalies``: signs so far.
        :raises AnomalyError: at a sign, if that shall stop the run.
        """
        for name, sign in self._signs(metrics).items():
            self.counts[name] = self.counts.get(name, 0) + 1
            message = f"step {step}: {sign}"
            if self.stop:
                raise AnomalyError(message)
            if self.counts[name] == 1:
                self.warn(f"{message} (said once; health/anomalies counts them all)")
        return {"health/anomalies": float(sum(self.counts.values()))}

    def _signs(self, metrics: dict[str, float]) -> dict[str, str]:
        signs = {}
        gap, kl, reward = metrics["rollout/logprob_gap_mean"], metrics["train/kl"], metrics["rollout/reward"]
        if gap > self.gap_limit:
            signs["gap"] = (
                f"the engine's log-probs are {gap:.2g} from the trainer's on average (largest "
                f"{metrics['rollout/logprob_gap_max']:.2g}); above {self.gap_limit:g} something differs: weights, "
                "audio or sampling"
            )
        if kl > KL_LIMIT:
            signs["kl"] = (
                f"the model is {kl:.2g} nats a token from the one it started from, more than {KL_LIMIT:g}: lower the "
                "learning rate or raise --init_kl_coef"
            )
        if metrics["rollout/truncated_fraction"] == 1:
            signs["truncated"] = "no response ended by itself: raise --generate_max_len, or the model has forgotten how"
        last, steps = self._constant
        alike = metrics["rollout/reward_std"] == 0
        self._constant = (reward, steps + 1 if alike and reward == last else int(alike))
        if self._constant[1] >= CONSTANT_STEPS:
            signs["constant"] = (
                f"all rewards have been {reward:g} for {self._constant[1]} steps: there is nothing left to learn, or "
                "the reward cannot tell answers apart"
            )
        elif metrics["rollout/groups_without_spread"] == 1:
            signs["spread"] = "the responses of every group earned the same: this step teaches nothing"
        return signs
