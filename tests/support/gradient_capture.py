"""Trains with plain SGD and records every update; see tests/training/test_gradients.py, which checks what it records.

python tests/support/gradient_capture.py RECORDS.pt examples/r1_aqa/train_colocate.py FLAGS ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch


def vowels(response: str, reference: str, think: bool) -> float:
    """A reward with many values, so that the responses of a group seldom all earn the same."""
    return sum(letter in "aeiou" for letter in response) % 5 / 3


def plain_sgd(rate: float):
    """What takes the place of ``StrategyBase.optimizer_and_schedule``."""

    def optimizer_and_schedule(strategy, parameters, max_steps):
        optimizer = torch.optim.SGD([parameter for _, parameter in parameters], lr=rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    return optimizer_and_schedule


def record_updates(trainer_class, path: Path) -> None:
    """Let ``update`` write, at rank 0, all ranks' responses and the weights before and after."""
    from lightrft.utils.distributed import gather_objects

    records, inner = [], trainer_class.update

    def weights_of(trainer):
        return {name: w.cpu().clone() for name, w in trainer.strategy.named_weights(trainer.actor.model)}

    def update(self, items, step):
        names = ("prompt_ids", "response_ids", "reward", "advantages")
        plain = [{name: getattr(item, name) for name in names} | item.source for item in items]
        record = {"before": weights_of(self), "kl_coef": self.kl_ctl.value, "ranks": gather_objects(plain)}
        result = inner(self, items, step)
        assert result[2], "each update must make an optimizer step"
        records.append(record | {"after": weights_of(self)})
        if self.strategy.is_rank_0():
            content = {"args": vars(self.strategy.args), "logit_bias": self.actor.logit_bias, "updates": records}
            torch.save(content, path)
        return result

    trainer_class.update = update


if __name__ == "__main__":
    rate, records, script = float(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).resolve()
    sys.path[:0] = [str(script.parent), str(script.parents[2] / "runtime")]
    sys.argv = sys.argv[3:]
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL

    StrategyBase.optimizer_and_schedule = plain_sgd(rate)
    record_updates(SPMDPPOTrainerVL, records)
    runpy.run_path(str(script), run_name="__main__")
