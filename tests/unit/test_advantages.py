"""Advantages by hand, KL in the reward, whitening, KL control, and how the experience maker puts them together."""

from types import SimpleNamespace

import pytest
import torch
from support.experiences import make_experience

from lightrft.engines.base import Sampling
from lightrft.trainer import fast_exp_maker
from lightrft.trainer.advantages import (
    KLController,
    audio_gain,
    overlong_penalty,
    shape_rewards,
    token_advantages,
    whiten,
)
from lightrft.trainer.fast_exp_maker import FastExperienceMaker


@pytest.mark.parametrize("estimator", ["group_norm", "rloo", "reinforce_baseline"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 3, 7, 8])
def test_a_group_of_equal_rewards_teaches_exactly_nothing(estimator, reward, n):
    shaped = shape_rewards(torch.full((2 * n,), reward), estimator, n)
    assert torch.equal(shaped, torch.zeros(2 * n))


@pytest.mark.parametrize("reward", [0.1, 1.1, 0.7])
def test_rounding_in_a_group_of_equal_rewards_is_not_blown_up(reward):
    """The mean of seven times 0.1 is not 0.1; divided by a tiny deviation that would become an advantage."""
    assert shape_rewards(torch.full((7,), reward), "group_norm", 7).abs().max() < 5e-3


@pytest.mark.parametrize(
    ("kl", "gamma", "expected"),
    [
        (None, 1.0, [1.0, 1.0, 1.0]),  # GRPO: the same for every token
        (None, 0.5, [0.25, 0.5, 1.0]),
        # rewards of the tokens: -0.5 * 0.1, -0.5 * 0.2, 1 - 0.5 * 0.3 = -0.05 -0.1 0.85; summed from the end
        ([0.1, 0.2, 0.3], 1.0, [0.70, 0.75, 0.85]),
        # 0.85; -0.1 + 0.425; -0.05 + 0.1625
        ([0.1, 0.2, 0.3], 0.5, [0.1125, 0.325, 0.85]),
    ],
)
def test_token_advantages_by_hand(kl, gamma, expected):
    kl = None if kl is None else torch.tensor(kl)
    advantages = token_advantages(torch.tensor(1.0), 3, kl, kl_coef=0.5, gamma=gamma)
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_whitening_by_hand():
    # 1 2 3 4: mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25
    mean, factor = whiten(10.0, 30.0, 4.0)
    assert mean == 2.5
    assert factor == pytest.approx(1.25**-0.5)
    # all equal: the variance is held at 1e-8, so that rounding is not blown up without bound
    assert whiten(6.0, 12.0, 3.0) == (2.0, pytest.approx(1e4))


@pytest.mark.parametrize(
    ("target", "kl", "expected"),
    # horizon 100, 50 responses: value * (1 + error * 50 / 100)
    [
        (None, 9.0, 0.1),  # fixed
        (2.0, 2.0, 0.1),  # on target
        (2.0, 2.2, 0.105),  # 10 % above
        (2.0, 1.9, 0.0975),  # 5 % below
        (2.0, 20.0, 0.11),  # the error is held at +20 %
        (2.0, 0.0, 0.09),  # and at -20 %
    ],
)
def test_kl_controller(target, kl, expected):
    controller = KLController(0.1, target, horizon=100)
    controller.update(kl, 50)
    assert controller.value == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- the experience maker
def make_maker(monkeypatch, estimator, *, use_kl_loss=True, reference=False, gamma=1.0, n=2, **more):
    args = SimpleNamespace(advantage_estimator=estimator, use_kl_loss=use_kl_loss, kl_estimator="k1", gamma=gamma)
    vars(args).update(more, fsdp=False, zero_stage=2, engine_type="vllm", engine_tp_size=1)
    strategy = SimpleNamespace(args=args, device=torch.device("cpu"))
    monkeypatch.setattr(fast_exp_maker.dist, "all_reduce", lambda *_: None)  # one rank
    return FastExperienceMaker(
        None, object() if reference else None, None, strategy, KLController(0.5), None, {}, Sampling(n=n), False
    )


def make_items(rewards, lengths):
    return [make_experience(length, reward=reward) for reward, length in zip(rewards, lengths, strict=True)]


@pytest.mark.parametrize(
    ("estimator", "first", "others", "silent"),
    [
        # Two groups, rewards 1 0 0 0 and 0 0 0 0; the first response has two tokens, all others one.
        # mean 1/4, deviation sqrt((9/16 + 3/16) / 3) = 1/2: 0.75 / 0.5001, -0.25 / 0.5001
        ("group_norm", 1.499700, -0.499900, 0.0),
        ("dr_grpo", 0.75, -0.25, 0.0),
        # 1 - 0, 0 - 1/3; RLOO's paper and LightRFT whiten nothing
        ("rloo", 1.0, -1 / 3, 0.0),
        # REINFORCE++-baseline: 0.75 0.75 -0.25 -0.25 -0.25 0 0 0 0 have the mean 1/12 and the variance
        # 1.3125 / 9 - 1 / 144 = 5 / 36; (3/4 - 1/12) / sqrt(5/36) = 4 / sqrt(5), -2 / sqrt(5), -0.5 / sqrt(5)
        ("reinforce_baseline", 1.788854, -0.894427, -0.223607),
        # REINFORCE++: 1 1 0 0 0 0 0 0 0: mean 2/9, variance 2/9 - 4/81 = 14/81; 7 / sqrt(14), -2 / sqrt(14)
        ("reinforce++", 1.870829, -0.534522, -0.534522),
        ("reinforce", 1.870829, -0.534522, -0.534522),
    ],
)
def test_advantages_of_every_estimator_by_hand(monkeypatch, estimator, first, others, silent):
    items = make_items([1.0, 0, 0, 0, 0, 0, 0, 0], [2, 1, 1, 1, 1, 1, 1, 1])
    make_maker(monkeypatch, estimator, n=4).add_advantages(items)
    tokens = torch.cat([item.advantages for item in items])
    expected = torch.tensor([first] * 2 + [others] * 3 + [silent] * 4)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)  # the digits written here


def test_gdpo_by_hand(monkeypatch):
    """Two groups of two responses, parts (1, 0) and (1, 1), then (1, 0) and (0, 1), weighed 1 and 2.

    A group's 1 and 0 become +-0.5 / (sqrt(0.5) + 1e-4) = +-0.707007. The sums over parts, -1.414, +1.414, then 0.707 -
    1.414 and its negative, have mean 0 and the variance 0.707007^2 * (4 + 4 + 1 + 1) / 4: +-2 and +-1 over sqrt(2.5).
    GRPO would have seen 1 and 3, then 1 and 2.
    """
    items = make_items([1.0, 3.0, 1.0, 2.0], [2, 1, 1, 1])
    for item, first, second in zip(items, (1.0, 1.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0), strict=True):
        item.reward_metrics = {"accuracy_reward": first, "format_reward": second}
    weights = {"accuracy_reward": 1.0, "format_reward": 2.0}
    make_maker(monkeypatch, "gdpo", reward_parts=weights).add_advantages(items)
    expected = torch.tensor([-1.264911, -1.264911, 1.264911, -0.632456, 0.632456])  # by token
    torch.testing.assert_close(torch.cat([item.advantages for item in items]), expected, rtol=0, atol=1e-5)


def test_overlong_penalty_by_hand(monkeypatch):
    # limit 16, buffer 4: nothing up to 12, half of 0.8 at 14, all of it at 16
    lengths = torch.tensor([3.0, 12.0, 13.0, 14.0, 16.0])
    torch.testing.assert_close(overlong_penalty(lengths, 16, 4, 0.8), torch.tensor([0.0, 0.0, -0.2, -0.4, -0.8]))
    maker = make_maker(monkeypatch, "group_norm", overlong_buffer_len=4, overlong_buffer_penalty_factor=0.8)
    maker.sampling = Sampling(n=2, max_tokens=16)
    items = make_items([2.0, 2.0], [3, 14])
    maker.penalise_length(items)
    assert [item.reward for item in items] == [2.0, pytest.approx(1.6)]
    assert items[1].reward_metrics == {"overlong_penalty": pytest.approx(-0.4)}


def test_audio_gain_by_hand(monkeypatch):
    """Silence halves the probabilities, 1 - 1/2; 0.8 and 0.4 against 0.2 and 0.1, 1 - 1/4; 0.1 and 0.9 swapped, 0."""
    heard, silent = ([torch.log(torch.tensor(p)) for p in ps] for ps in (
        ([0.8, 0.6], [0.8, 0.4], [0.1, 0.9], [0.1]), ([0.4, 0.3], [0.2, 0.1], [0.9, 0.1], [0.4])))  # fmt: skip
    gains = [0.5, 0.75, 0.0, 0.0]  # the last one is likelier in silence
    assert [audio_gain(*pair) for pair in zip(heard, silent, strict=True)] == pytest.approx(gains, abs=1e-6)
    assert audio_gain(torch.tensor([-900.0]), torch.tensor([0.0])) == 0  # exp(900) is no number
    weights = {"accuracy_reward": 1.0, "audio_gain_reward": 0.2}
    more = {"reward_parts": weights, "audio_token_weights": 0.0, "dynamic_sampling_rounds": 0}
    maker = make_maker(monkeypatch, "gdpo", **more)
    maker.needs_old_log_probs = True
    maker.log_probs = lambda model, items, silent_too=silent, silent=False: silent_too if silent else heard
    items = make_items([1.0, 0.0, 1.0, 0.0], [2, 2, 2, 1])
    for item in items:
        item.reward_metrics["accuracy_reward"] = item.reward
    maker.replace_groups(items, step=1)  # judges by what the rules pay
    maker.add_log_probs(items)
    assert [item.reward for item in items] == pytest.approx([1.1, 0.0, 1.0, 0.0], abs=1e-6)
    paid = [0.5, 0.0, 0.0, 0.0]  # the second is wrong, the third likelier in silence
    assert [item.reward_metrics["audio_gain_reward"] for item in items] == pytest.approx(paid, abs=1e-6)
    assert maker.timings["silence"] >= 0
    # accuracy is +-0.7070 in both groups, the gain in the first alone: +-1.2 and +-1.0 times it, and whitened
    maker.add_advantages(items)
    expected = [share / 1.22**0.5 for share in (1.2, -1.2, 1.0, -1.0)]
    assert [item.advantages[0].item() for item in items] == pytest.approx(expected, abs=1e-3)


def test_groups_without_spread_are_replaced(monkeypatch):
    """Of four groups two teach nothing; the first draw has one that does, the second none."""
    maker = make_maker(monkeypatch, "group_norm", dynamic_sampling_rounds=2)
    draws = {1: [0.0, 0.0, 0.0, 1.0], 2: [2.0, 2.0]}
    asked = []

    def draw_prompts(step, attempt, count):
        asked.append((step, attempt, count))
        return ["prompt"] * count, [], [], [], [("dataset/a",)] * count

    def rollout(prompts, images, references, labels, sampling, step, attempt, all_tags):
        assert all_tags == [("dataset/a",)] * len(prompts)
        return make_items(draws[attempt], [attempt] * len(draws[attempt]))

    maker.draw_prompts, maker.rollout, maker.score = draw_prompts, rollout, lambda items: None
    items = maker.replace_groups(make_items([2.0, 2.0, 0.0, 1.0, 0.0, 0.0, 1.0, 2.0], [9] * 8), step=7)
    assert asked == [(7, 1, 2), (7, 2, 1)]
    assert [item.reward for item in items] == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 2.0]
    assert [len(item.response_ids) for item in items] == [1, 1, 9, 9, 9, 9, 9, 9]
    assert [item.reward_metrics["replaced"] for item in items] == [1.0, 1.0, 0, 0, 0, 0, 0, 0]


def test_kl_in_the_reward_lowers_the_advantage_of_drifting_tokens(monkeypatch):
    items = make_items([1.0, 1.0], [2, 2])
    for item in items:
        item.ref_log_probs = torch.tensor([-1.0, -1.0])
        item.old_log_probs = torch.tensor([-0.8, -1.0])  # k1 = 0.2, 0
    make_maker(monkeypatch, "group_norm", use_kl_loss=False, reference=True).add_advantages(items)
    # equal rewards shape to 0; minus 0.5 * 0.2 at the first token
    torch.testing.assert_close(items[0].advantages, torch.tensor([-0.1, 0.0]))


def test_kl_as_a_loss_leaves_the_advantages_alone(monkeypatch):
    items = make_items([1.0, 1.0], [2, 2])
    for item in items:
        item.ref_log_probs = torch.tensor([-1.0, -1.0])  # and no old log-probs: nobody asked for them
    make_maker(monkeypatch, "group_norm", use_kl_loss=True, reference=True).add_advantages(items)
    assert torch.equal(items[0].advantages, torch.zeros(2))
