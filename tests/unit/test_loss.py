"""Losses and KL estimators against values worked out by hand."""

import math

import pytest
import torch

from lightrft.models.loss import (
    KL_ESTIMATORS,
    LOSS_AGG_MODES,
    ROLLOUT_CORRECTIONS,
    LossSettings,
    aggregate,
    audio_weights,
    cispo_loss_tokens,
    grpo_loss,
    kl_tokens,
    policy_loss_tokens,
    relative_change,
    rollout_weights,
)

EPS = 0.2


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "loss", "clip_active", "gradient"),
    # gradient: d loss / d log p = -ratio * advantage, 0 where the clip is active
    [
        (1.0, 2.0, None, -2.0, False, -2.0),  # on-policy: the ratio is 1
        (1.0, -2.0, None, 2.0, False, 2.0),
        (1.1, 2.0, None, -2.2, False, -2.2),  # inside the range
        (1.5, 2.0, None, -2.4, True, 0.0),  # min(1.5 * 2, 1.2 * 2): already more likely than allowed
        (0.5, 2.0, None, -1.0, False, -1.0),  # min(0.5 * 2, 0.8 * 2): good and unlikely, nothing holds it back
        (1.5, -2.0, None, 3.0, False, 3.0),  # min(-3, -2.4): bad and likely, nothing holds it back
        (0.5, -2.0, None, 1.6, True, 0.0),  # min(-1, -1.6): already less likely than allowed
        (1.5, 0.0, None, 0.0, False, 0.0),
        (1.4, 2.0, 0.5, -2.8, False, -2.8),  # --eps_clip_high: beyond 1.2, and still inside
        (1.6, 2.0, 0.5, -3.0, True, 0.0),  # min(1.6 * 2, 1.5 * 2)
        (0.5, -2.0, 0.5, 1.6, True, 0.0),  # the lower end is where it was
    ],
)
def test_policy_loss_by_hand(ratio, advantage, high, loss, clip_active, gradient):
    old = torch.tensor([[-1.7]])
    log_probs = (old + math.log(ratio)).requires_grad_()
    values, active = policy_loss_tokens(log_probs, old, torch.tensor([[advantage]]), EPS, high)
    values.sum().backward()
    torch.testing.assert_close(values.detach(), torch.tensor([[loss]]))
    torch.testing.assert_close(log_probs.grad, torch.tensor([[gradient]]))
    assert active.tolist() == [[clip_active]]


def test_gspo_by_hand():
    """Two tokens with ratios 1.21 and 1: the response's is 1.1. Padding, at a ratio of e^9, does not count."""
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    log_probs = (old + torch.tensor([[math.log(1.21), 0.0, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    values, active = policy_loss_tokens(log_probs, old, torch.tensor([[2.0]]), EPS, sequence_mask=mask)
    aggregate(values, mask, "seq-mean-token-mean").backward()
    torch.testing.assert_close(values[0, :2].detach(), torch.tensor([-2.2, -2.2]))
    # d (-1.1 * 2) = -2.2 * half a token's log-prob each
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-1.1, -1.1, 0.0]]))
    assert not active[mask].any()
    # 1.44 and 1: 1.2 each by token, of which one is clipped at 1.1; 1.2 for the response, clipped as a whole
    log_probs = (old + torch.tensor([[math.log(1.44), 0.0, 0.0]])).requires_grad_()
    values, active = policy_loss_tokens(log_probs, old, torch.tensor([[2.0]]), 0.1, sequence_mask=mask)
    aggregate(values, mask, "seq-mean-token-mean").backward()
    torch.testing.assert_close(values[0, :2].detach(), torch.tensor([-2.2, -2.2]))
    assert log_probs.grad.abs().sum() == 0
    assert active[mask].all()


def test_on_policy_gspo_has_grpos_gradient():
    old = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4)[None] < torch.tensor([4, 1, 2])[:, None]
    gradients = []
    for sequence_mask in (None, mask):
        log_probs = old.clone().requires_grad_()
        values, _ = policy_loss_tokens(log_probs, old, torch.tensor([[1.0], [-2.0], [0.5]]), EPS, None, sequence_mask)
        aggregate(values, mask, "seq-mean-token-mean").backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(*gradients)


def test_cispo_by_hand():
    """Ratios 1.5, 4 and 0.5, at most 3: where PPO's clip would leave the first two out, all of them have a gradient."""
    old = torch.tensor([[-2.0, -3.0, -1.0]])
    log_probs = (old + torch.tensor([[1.5, 4.0, 0.5]]).log()).requires_grad_()
    values, cut = cispo_loss_tokens(log_probs, old, torch.tensor([[2.0, 2.0, -1.0]]), eps_clip_high=2.0)
    values.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-3.0, -6.0, 0.5]]))
    torch.testing.assert_close(values.detach(), log_probs.grad * log_probs.detach())
    assert cut.tolist() == [[False, True, False]]


OLD = torch.log(torch.tensor([[0.5, 0.9, 0.1], [0.3, 0.2, 0.7]]))
ENGINE = torch.log(torch.tensor([[0.4, 0.3, 0.9], [0.3, 0.4, 0.1]]))
SAMPLED = torch.tensor([[1, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize(
    ("method", "weights", "limited"),
    [
        # ratios 1.25 and 3 (at most 2); 1 and 0.5
        ("tis", [[1.25, 2.0], [1.0, 0.5]], [[False, True], [False, False]]),
        # products 3.75, beyond 2, and 0.5
        ("mis", [[0.0, 0.0], [0.5, 0.5]], [[True, True], [False, False]]),
        # their square roots: 1.94 and 0.71, below the floor of 0.8
        ("geo", [[1.0, 1.0], [0.0, 0.0]], [[False, False], [True, True]]),
        # 0.5 is below the floor of 0.8; 3.75 is within the limit of 4
        ("mis", [[3.75, 3.75], [0.0, 0.0]], [[False, False], [True, True]]),
    ],
)
def test_rollout_corrections_by_hand(method, weights, limited):
    old = OLD.clone().requires_grad_()
    floored = limited[1] == [True, True]
    bounds = (0.8 if floored else 0.0, 4.0 if floored and method == "mis" else 2.0)
    found, beyond = rollout_weights(old, ENGINE, SAMPLED, method, bounds)
    torch.testing.assert_close(found[:, :2], torch.tensor(weights))
    assert beyond.tolist() == [[*row, False] for row in limited]  # padding is no token
    assert not found.requires_grad


def test_audio_weights_by_hand():
    """Of 0.8 silence leaves 0.4, half; of 0.3 it makes 0.6, half; 0.9 and 0.2 stay. Padding does not count."""
    heard = relative_change(torch.log(torch.tensor([[0.8, 0.3, 0.9, 0.9], [0.2, 0.7, 0.7, 0.7]]))
                            - torch.log(torch.tensor([[0.4, 0.6, 0.9, 0.1], [0.2, 0.1, 0.1, 0.1]])))  # fmt: skip
    torch.testing.assert_close(heard[:, :3], torch.tensor([[0.5, 0.5, 0.0], [0.0, 6 / 7, 6 / 7]]))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    # 0.51 0.51 0.01 have the mean 1.03 / 3; the second response has one token, and a weight of 1
    whole = torch.tensor([[1.53 / 1.03, 1.53 / 1.03, 0.03 / 1.03], [1.0, 1.0, 1.0]])
    for share in (0.0, 0.5, 1.0):
        weights = audio_weights(heard, mask, share)
        torch.testing.assert_close(weights[0, :3], 1 - share + share * whole[0])
        torch.testing.assert_close((weights * mask).sum(1), torch.tensor([3.0, 1.0]))  # the mean is 1
    # in the loss: advantages 1 and -2, ratios 1: (-(1.53 + 1.53 + 0.03) / 1.03 / 3 + 2) / 2 as without weights; the
    # gradient is each token's weight
    settings = LossSettings(EPS, None, False, False, "seq-mean-token-mean", 9, False, "k3", "none", 2.0, 0.0, 1.0)
    log_probs = torch.zeros(2, 4, requires_grad=True)
    advantages = torch.tensor([[1.0], [-2.0]])
    loss, found = grpo_loss(log_probs, log_probs.detach(), log_probs, None, advantages, mask, settings, 0.0, None,
                            -torch.log(torch.tensor([[2.0, 2.0, 1.0, 9.0], [1.0, 9.0, 9.0, 9.0]])))  # fmt: skip
    loss.backward()
    assert (loss.item(), found["heard"].item()) == (pytest.approx(0.5), pytest.approx(1.0))
    expected = torch.tensor([[*(-whole[0] / 6), 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(log_probs.grad, expected)


# rows of 3 and 1 tokens; 99 is what padding must not let through
VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize("mask_type", [torch.bool, torch.long])
@pytest.mark.parametrize(
    ("mode", "expected", "weights"),
    [
        # (6 / 3 + 4 / 1) / 2
        ("seq-mean-token-mean", 3.0, [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]]),
        # 10 / 4
        ("token-mean", 2.5, [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0]]),
        # (6 + 4) / 2
        ("seq-mean-token-sum", 5.0, [[1 / 2, 1 / 2, 1 / 2], [1 / 2, 0, 0]]),
        # (6 + 4) / 2 / 10
        ("seq-mean-token-sum-norm", 0.5, [[1 / 20, 1 / 20, 1 / 20], [1 / 20, 0, 0]]),
    ],
)
def test_aggregation_by_hand(mode, expected, weights, mask_type):
    values = VALUES.clone().requires_grad_()
    loss = aggregate(values, MASK.to(mask_type), mode, max_response_length=10)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    torch.testing.assert_close(values.grad, torch.tensor(weights))


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_means_over_micro_batches_are_the_batch_s_value(mode):
    """Four responses of 5, 1, 2 and 1 tokens in two micro-batches: 9 tokens, 4.5 a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 2, 1])[:, None]
    scale = {"mode": mode, "tokens_per_micro_batch": 9 / 2, "max_response_length": 16}
    micro = [aggregate(values[i : i + 2], mask[i : i + 2], **scale) for i in (0, 2)]
    whole = aggregate(values, mask, mode, max_response_length=16)
    torch.testing.assert_close(sum(micro) / 2, whole)


@pytest.mark.parametrize(
    ("mode", "expected"),
    # the second response is masked: (6 / 3 + 0) / 2; 6 / 4; (6 + 0) / 2; (6 + 0) / 2 / 10
    [("seq-mean-token-mean", 1.0), ("token-mean", 1.5), ("seq-mean-token-sum", 3.0), ("seq-mean-token-sum-norm", 0.3)],
)
def test_a_masked_response_counts_in_the_divisors_alone(mode, expected):
    """As TRL's mask_truncated_completions: the weight of a response does not depend on how many others are masked."""
    mask = MASK * torch.tensor([[1], [0]])
    loss = aggregate(VALUES, mask, mode, tokens_per_micro_batch=MASK.sum().item(), max_response_length=10)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("correction", ["none", *ROLLOUT_CORRECTIONS])
@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_micro_batch_that_is_all_masked_adds_exactly_nothing(mode, kind, correction):
    settings = LossSettings(EPS, 4.0, kind == "gspo", kind == "cispo", mode, 10, True, "k3", correction, 2.0, 0.5, 0.7)
    log_probs = (OLD + 0.3).requires_grad_()
    mask = torch.zeros(OLD.shape, dtype=torch.bool)
    loss, statistics = grpo_loss(log_probs, OLD, ENGINE, OLD - 1, torch.ones(2, 1), mask, settings, 0.04, 3.0, ENGINE)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(log_probs.grad, torch.zeros_like(log_probs))
    assert all(value == 0 for value in statistics.values())


@pytest.mark.parametrize(
    ("log_ratio", "k1", "k2", "k3"),
    [
        (0.0, 0.0, 0.0, 0.0),
        # log p - log q = log 2: k2 = 0.5 * 0.48045, k3 = 1/2 - 1 + 0.69315
        (math.log(2), 0.693147, 0.240227, 0.193147),
        # log 1/2: k3 = 2 - 1 - 0.69315
        (-math.log(2), -0.693147, 0.240227, 0.306853),
        # log 4: k2 = 0.5 * 1.92181, k3 = 1/4 - 1 + 1.38629
        (math.log(4), 1.386294, 0.960906, 0.636294),
    ],
)
def test_kl_estimators_by_hand(log_ratio, k1, k2, k3):
    log_probs, ref = torch.tensor([[-2.0 + log_ratio]]), torch.tensor([[-2.0]])
    for estimator, expected in zip(KL_ESTIMATORS, (k1, k2, k3), strict=True):
        value = kl_tokens(log_probs, ref, estimator).item()
        # the log-probs are around 2, so that their difference has float32's 2e-7
        assert value == pytest.approx(expected, abs=1e-6), estimator


@pytest.mark.parametrize("log_ratio", [1e-3, -1e-3, 1e-2, -1e-2])
def test_k3_is_precise_where_policy_and_reference_are_still_close(log_ratio):
    """The first steps of a run: exp(-x) - 1 in float32 would leave one digit of x * x / 2."""
    log_probs = torch.tensor([[log_ratio]])
    exact = math.expm1(-log_ratio) + log_ratio
    assert kl_tokens(log_probs, torch.zeros(1, 1), "k3").item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    # at log ratio x: 1 for k1, x for k2, 1 - exp(-x) for k3; x = log 2
    [("k1", 1.0), ("k2", 0.693147), ("k3", 0.5)],
)
def test_kl_gradients(estimator, gradient):
    log_probs = torch.tensor([[-1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0 - math.log(2)]], requires_grad=True)
    kl_tokens(log_probs, ref.detach(), estimator).sum().backward()
    assert log_probs.grad.item() == pytest.approx(gradient, abs=1e-6)
