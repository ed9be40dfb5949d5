"""Trains with plain SGD and records every optimizer step; tests/training/test_gradients.py checks what it records.

python tests/support/gradient_capture.py RECORDS.pt examples/r1_aqa/train_colocate.py FLAGS ...
"""

import runpy
import sys
from pathlib import Path

import torch

PLAIN = ("prompt_ids", "response_ids", "reward", "reward_metrics", "truncated", "engine_log_probs", "advantages")


def vowels(response: str, reference: str, think: bool) -> float:
    """A reward with many values, so that the responses of a group seldom all earn the same."""
    return sum(letter in "aeiou" for letter in response) % 5 / 3


def plain_sgd(strategy, parameters, max_steps):
    """In place of ``StrategyBase.optimizer_and_schedule``."""
    optimizer = torch.optim.SGD([parameter for _, parameter in parameters], lr=strategy.args.actor_learning_rate)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def distort_engine(maker_class) -> None:
    """Let the engine report log-probs that are off by up to 0.3, so that a rollout correction has something to do."""
    rollout = maker_class.rollout

    def distorted(self, *args, **kwargs):
        items = rollout(self, *args, **kwargs)
        for item in items:
            places = torch.arange(len(item.response_ids)) + item.response_ids
            item.engine_log_probs = item.engine_log_probs + 0.3 * torch.sin(places.float())
        return items

    maker_class.rollout = distorted


def record_updates(trainer_class, path: Path) -> None:
    """Write, at rank 0, all ranks' responses of each update, and the weights before it and after each step."""
    from lightrft.utils.distributed import gather_objects
    from lightrft.utils.weight_names import is_adapter

    records, update, optimizer_step = [], trainer_class.update, trainer_class._optimizer_step

    def weights_of(trainer):
        """Checkpoint name and value of all weights, adapters merged; live name and value of adapters."""
        strategy, model = trainer.strategy, trainer.actor.model
        merged = {name: w.cpu().clone() for name, w in strategy.named_weights(model)}
        named = {name: p for name, p in strategy.unwrap_model(model).named_parameters() if is_adapter(name)}
        if not named:
            return merged, {}
        with strategy.whole(list(named.values())) as values:
            return merged, {name: value.cpu().clone() for name, value in zip(named, values, strict=True)}

    def recording_update(self, items, step):
        plain = [{name: getattr(item, name) for name in PLAIN} | item.source for item in items]
        ranks = gather_objects(plain)
        records.append({"kl_coef": self.kl_ctl.value, "ranks": ranks, "weights": [weights_of(self)]})
        result = update(self, items, step)
        if self.strategy.is_rank_0():
            content = {"args": vars(self.strategy.args), "logit_bias": self.actor.logit_bias, "updates": records}
            torch.save(content, path)
        return result

    def recording_step(self, *args):
        norm = optimizer_step(self, *args)
        records[-1]["weights"].append(weights_of(self))
        return norm

    trainer_class.update, trainer_class._optimizer_step = recording_update, recording_step


if __name__ == "__main__":
    records, script = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    sys.path[:0] = [str(script.parent), str(script.parents[2] / "runtime")]
    sys.argv = sys.argv[2:]
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.fast_exp_maker import FastExperienceMaker
    from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL

    StrategyBase.optimizer_and_schedule = plain_sgd
    if "--rollout_correction" in sys.argv:
        distort_engine(FastExperienceMaker)
    record_updates(SPMDPPOTrainerVL, records)
    runpy.run_path(str(script), run_name="__main__")
