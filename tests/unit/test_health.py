"""Signs that a run goes wrong: seen, counted, said once, and where asked for the end of the run."""

from types import SimpleNamespace

import pytest
import torch
from support.experiences import make_experience

from lightrft.trainer import spmd_ppo_trainer
from lightrft.trainer.health import CONSTANT_STEPS, Health
from lightrft.trainer.step_metrics import spread_sums, step_metrics

WELL = {"rollout/logprob_gap_mean": 1e-6, "rollout/logprob_gap_max": 1e-5, "rollout/reward": 1.2, "train/kl": 0.3}
WELL |= {"rollout/reward_std": 0.4, "rollout/truncated_fraction": 0.5, "rollout/groups_without_spread": 0.5}


def counts(anomalies: int) -> dict[str, float]:
    return {"health/anomalies": float(anomalies), "health/skipped_steps": 0.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rollout/logprob_gap_mean": 2e-3}, "the engine's log-probs are 0.002 from the trainer's"),
        ({"train/kl": 6.0}, "6 nats a token from the one it started from"),
        ({"rollout/truncated_fraction": 1.0}, "no response ended by itself"),
        ({"rollout/groups_without_spread": 1.0}, "every group earned the same"),
    ],
)
def test_a_sign_is_said_once_and_counted_always(change, expected):
    said = []
    health = Health(torch.float32, "warn", said.append)
    assert health.check(WELL, 1) == (counts(0), None)
    assert health.check(WELL | change, 2) == (counts(1), None)
    assert health.check(WELL | change, 3) == (counts(2), None)
    [message] = said
    assert message.startswith("step 2: ") and expected in message
    counted, reason = Health(torch.float32, "stop", said.append).check(WELL | change, 2)
    assert counted == counts(1) and reason.startswith("step 2: ") and expected in reason
    assert len(said) == 1


def test_its_memory_is_part_of_a_checkpoint():
    alike = WELL | {"rollout/reward": 2.0, "rollout/reward_std": 0.0, "train/kl": 6.0}
    whole = Health(torch.float32, "warn", lambda _: None)
    for step in range(1, CONSTANT_STEPS):
        whole.check(alike, step)
    said = []
    resumed = Health(torch.float32, "warn", said.append)
    resumed.restore(whole.state())
    assert (
        resumed.check(alike, CONSTANT_STEPS) == whole.check(alike, CONSTANT_STEPS) == (counts(CONSTANT_STEPS + 1), None)
    )
    assert len(said) == 1 and f"for {CONSTANT_STEPS} steps" in said[0]  # the other sign was said before


def test_bfloat16_may_be_further_apart():
    said = []
    Health(torch.bfloat16, "warn", said.append).check(WELL | {"rollout/logprob_gap_mean": 0.01}, 1)
    assert said == []


def test_rewards_that_stay_the_same():
    said = []
    health = Health(torch.float32, "warn", said.append)
    alike = WELL | {"rollout/reward": 2.0, "rollout/reward_std": 0.0}
    for step in range(1, CONSTANT_STEPS):
        health.check(alike, step)
    assert said == []
    health.check(WELL, CONSTANT_STEPS)  # one that differs: counted from the beginning
    for step in range(CONSTANT_STEPS):
        health.check(alike, 100 + step)
    [message] = said
    assert f"all rewards have been 2 for {CONSTANT_STEPS} steps" in message


def test_a_sign_in_an_earlier_rollout_of_an_optimizer_step_leaves_the_step_out(monkeypatch):
    """Two rollouts a step: a gap of 5 nats in the first, none in the second; then two good ones."""
    gaps, asked = iter((5.0, 0.0, 0.0, 0.0)), []
    trainer = object.__new__(spmd_ppo_trainer.SPMDPPOTrainerVL)
    due = iter((False, True, False, True))

    def backward(part, tokens, totals, first, place):
        gap = next(gaps)
        totals.add({"policy_loss": torch.tensor(0.0), "kl": torch.tensor(0.0), "clipped": torch.tensor(0.0)})
        totals.sums["tokens"] += 1
        totals.add_sampling(torch.tensor([[gap]]), torch.tensor([[0.0]]), torch.tensor([[True]]))
        return next(due)

    vars(trainer).update(
        args=SimpleNamespace(
            rollout_correction="none", n_samples_per_prompt=2, advantage_estimator="group_norm", audio_token_weights=0.0
        ),
        strategy=SimpleNamespace(device=torch.device("cpu"), accumulation=2, world_size=1, is_rank_0=lambda: True),
        actor=SimpleNamespace(train=lambda: None, model=SimpleNamespace(step=lambda: None)),
        micro_train_batch_size=2,
        max_epochs=1,
        health=Health(torch.float32, "skip", print),
        guard=SimpleNamespace(step=lambda discard: asked.append(discard) or 1.0, applied=True),
        saver=SimpleNamespace(whole=True),
        losses_not_finite=0.0,
        suspicious=False,
        _backward=backward,
    )
    monkeypatch.setattr(spmd_ppo_trainer, "reduce_metrics", lambda *_: None)
    monkeypatch.setattr(spmd_ppo_trainer.stop_request, "check", lambda *_: None)
    for step in range(4):
        trainer.update([make_experience(reward=0.0), make_experience(reward=1.0)], step)
    assert asked == [True, False]


def test_spread_of_rewards():
    items = [make_experience(reward=reward) for reward in (2.0, 2.0, 1.0, 0.0, 1.0, 1.0)]
    sums = spread_sums(items, 2)
    assert sums == {"squares": 11.0, "groups": 3.0, "groups_alike": 2.0}
    for item, first in zip(items, (0.0, 2.0, 1.0, 0.0, 1.0, 1.0), strict=True):  # 0 + 2 and 2 + 0 differ by part
        item.reward_metrics = {"a": first, "b": item.reward - first}
    assert spread_sums(items, 2, ["a", "b"])["groups_alike"] == 1.0
    rest = {"responses": 6.0, "rollout/reward": 7.0, "rollout/response_length": 6.0, "gap": 0.0, "policy_loss": 0.0}
    rest |= {"micro_batches": 1.0, "kl": 0.0, "clipped": 0.0, "tokens": 6.0, "sampled_tokens": 8.0, "entropy": 2.0}
    rest |= {"train/not_finite": 0.0}
    metrics = step_metrics(sums | rest, {"gap": 0.0, "time/step": 1.0})
    assert metrics["rollout/groups_without_spread"] == pytest.approx(2 / 3)
    assert metrics["rollout/reward_std"] == pytest.approx(torch.tensor([2.0, 2, 1, 0, 1, 1]).std(correction=0).item())
