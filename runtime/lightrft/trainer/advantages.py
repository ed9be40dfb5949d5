"""Group-relative advantages and KL control as pure functions."""

import math

import torch

ESTIMATORS = ("group_norm", "dr_grpo", "rloo", "reinforce_baseline", "reinforce++", "reinforce")  # of one reward
WHITENED = ("reinforce_baseline", "reinforce++", "reinforce")  # over all response tokens of the rollout
STD_EPS = 1e-4  # R1-AQA's; also keeps rounding noise in a group of equal rewards from being blown up


def shape_rewards(rewards: torch.Tensor, estimator: str, n_samples: int) -> torch.Tensor:
    """Rewards relative to their group, one value a response.

    :param rewards: ``(prompts * n_samples,)``, a group's responses next to each other.
    :param estimator: ``group_norm`` (minus mean, over standard deviation: GRPO), ``dr_grpo`` (minus mean), ``rloo``
        (minus the mean of the others), ``reinforce_baseline`` (minus mean) and ``reinforce++`` (unchanged); the
        advantages of the last two are whitened by ``FastExperienceMaker.add_advantages``. ``reinforce`` is LightRFT's
        name for ``reinforce++``, not Williams' estimator, which has no baseline.
    :return: ``(prompts * n_samples,)``.
    :raises ValueError: if the estimator is unknown.

    Sources: Shao et al., DeepSeekMath (2024), section 4.1; Liu et al., Understanding R1-Zero-Like Training (2025), for
    Dr. GRPO; Ahmadian et al., Back to Basics (2024), section 3.3, for RLOO; Hu et al., REINFORCE++ (2025), for the last
    three. LightRFT's functions of the same names give the same values, but for its 1e-9 in place of :data:`STD_EPS`.
    """
    groups = rewards.reshape(-1, n_samples)
    if estimator == "group_norm":
        shaped = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + STD_EPS)
    elif estimator == "rloo":
        others = (groups.sum(-1, keepdim=True) - groups) / (n_samples - 1)
        shaped = groups - others
    elif estimator in ("dr_grpo", "reinforce_baseline"):
        shaped = groups - groups.mean(-1, keepdim=True)
    elif estimator in ("reinforce++", "reinforce"):
        shaped = groups
    else:
        raise ValueError(f"unknown advantage estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    return shaped.reshape(-1)


def decoupled_advantages(parts: torch.Tensor, weights: torch.Tensor, n_samples: int) -> torch.Tensor:
    """GDPO before its normalisation over the batch: each part of the reward relative to its group, then summed.

    A sum of rewards that is normalised as one (GRPO) gives responses that earn it with different parts the same
    advantage, and the part that varies most hides the others.

    :param parts: ``(prompts * n_samples, parts)``, a group's responses next to each other.
    :param weights: ``(parts,)``.
    :return: ``(prompts * n_samples,)``; the caller whitens them over all responses of the rollout (:func:`whiten`).

    Source: Liu et al., GDPO (2026), equations 4 and 5.
    """
    shaped = torch.stack([shape_rewards(part, "group_norm", n_samples) for part in parts.T], dim=-1)
    return shaped @ weights


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int, factor: float) -> torch.Tensor:
    """What responses lose that come near the token limit: nothing up to the buffer, ``factor`` at its end.

    :param lengths: Response tokens ``(responses,)``.
    :param buffer: Tokens before it over which the penalty grows.
    :return: ``(responses,)`` float32, 0 or less.

    Source: Yu et al., DAPO (2025), equation 13.
    """
    beyond = (lengths - (max_length - buffer)).clamp(min=0)
    return -beyond / buffer * factor


def audio_gain(log_probs: torch.Tensor, silent_log_probs: torch.Tensor) -> float:
    """How much less likely a response would have been without the sound: ``1 - exp(-mean(log p - log p_silent))``.

    That is the share of a token's probability, in the geometric mean over the response, that is lost with silence of
    the same length: 0 where silence makes the response as likely or likelier, near 1 where the sound was needed.

    :param log_probs: Under the policy that sampled ``(response length,)``; ``silent_log_probs`` without the sound.
    :return: 0 to 1.

    Source: Wang et al., Perception-Aware Policy Optimization for Multimodal Reasoning (2025), whose objective maximises
    the KL divergence between the policy with an image and with a masked one, estimated on sampled responses by this
    ratio. It has no upper bound and is hacked without a regulariser; as a reward it is bounded, and only right answers
    earn it.
    """
    return -math.expm1(-max(0.0, float((log_probs - silent_log_probs).mean())))


def discounted_returns(token_rewards: torch.Tensor, gamma: float) -> torch.Tensor:
    """Sum of the rewards from each token on.

    :param token_rewards: Rewards of one response's tokens ``(length,)``.
    :return: ``(length,)``.
    """
    if gamma == 1.0:
        return token_rewards.flip(0).cumsum(0).flip(0)
    returns = torch.zeros_like(token_rewards)
    running = torch.zeros((), dtype=token_rewards.dtype)
    for t in range(len(token_rewards) - 1, -1, -1):
        running = token_rewards[t] + gamma * running
        returns[t] = running
    return returns


def token_advantages(
    shaped_reward: float | torch.Tensor, length: int, kl: torch.Tensor | None, kl_coef: float, gamma: float
) -> torch.Tensor:
    """Advantages of one response's tokens: the shaped reward at its last token, minus KL at each, summed to the end.

    :param kl: Per-token KL estimates ``(length,)`` when KL is part of the reward; None when it is a loss.
    :return: ``(length,)`` float32.
    """
    rewards = torch.zeros(length)
    if kl is not None:
        rewards -= kl_coef * kl
    rewards[-1] += shaped_reward
    return discounted_returns(rewards, gamma)


def whiten(sum_: float, sum_of_squares: float, count: float) -> tuple[float, float]:
    """Mean and inverse standard deviation from sums over all tokens of all ranks.

    :return: Mean, and the factor that makes the variance 1.
    """
    mean = sum_ / count
    variance = max(sum_of_squares / count - mean * mean, 1e-8)
    return mean, variance**-0.5


class KLController:
    """KL coefficient: fixed, or adapted towards a target.

    :param target: KL to steer to; None keeps the coefficient fixed.
    :param horizon: Samples over which the coefficient is adapted.

    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n_samples: int) -> None:
        """Take the KL of a step into account."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n_samples / self.horizon
