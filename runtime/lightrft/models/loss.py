"""GRPO's loss and what it is made of, as pure functions of tensors.

:func:`grpo_loss` is the loss of a micro-batch; the functions after it are its terms.
"""

from dataclasses import dataclass

import torch

LOSS_AGG_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3")
ROLLOUT_CORRECTIONS = ("tis", "mis", "geo")
UNHEARD = 0.01  # a change of a token's probability that counts as little, for audio_weights


@dataclass(frozen=True)
class LossSettings:
    """What the flags choose about the loss; see the functions below for each.

    :param max_response_length: Tokens; the constant divisor of ``seq-mean-token-sum-norm``.
    :param use_kl_loss: Add the KL to the loss. False: it is only reported; the trainer may put it into the reward.
    """

    eps_clip: float
    eps_clip_high: float | None
    use_gspo: bool
    use_cispo: bool
    loss_agg_mode: str
    max_response_length: int
    use_kl_loss: bool
    kl_estimator: str
    rollout_correction: str
    rollout_correction_limit: float
    rollout_correction_floor: float
    audio_token_weights: float = 0.0


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    engine_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    settings: LossSettings,
    kl_coef: float,
    tokens_per_micro_batch: float | None = None,
    silent_log_probs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The GRPO loss of a micro-batch. All tensors are ``(batch, length)``: responses, padded on the right.

    :param log_probs: Under the policy that is trained; the only input with a gradient.
    :param old_log_probs: Under the policy that sampled, by the trainer's forward pass.
    :param engine_log_probs: Under the policy that sampled, by the rollout engine.
    :param ref_log_probs: Under the reference model; None: no KL.
    :param advantages: Of each token; a response's are equal unless KL or a discount is part of its reward.
    :param mask: Bool, True at the tokens that are trained on; a response without any counts as one whose loss is 0.
    :param silent_log_probs: As ``old_log_probs``, with silence in place of the sound; for :func:`audio_weights`.
    :return: Scalar loss, and scalars without gradient: ``policy_loss``, and the sums over tokens ``tokens``,
        ``clipped``, ``kl`` (with a reference), ``weights`` and ``limited`` (with a rollout correction),
        and ``heard`` (with weights by :func:`audio_weights`).

    Source: Shao et al., DeepSeekMath (2024), equation 3; that of each term stands with its function.
    """
    s = settings
    if s.use_cispo:  # -sg(min(r, 1 + eps_high)) A log_probs, r as below
        losses, clipped = cispo_loss_tokens(log_probs, old_log_probs, advantages, s.eps_clip_high)
    else:  # PPO's clipped surrogate: -min(r A, clip(r, 1 - eps, 1 + eps_high) A), r = exp(log_probs - old_log_probs)
        losses, clipped = policy_loss_tokens(
            log_probs, old_log_probs, advantages, s.eps_clip, s.eps_clip_high, mask if s.use_gspo else None
        )  # (batch, length) each
    statistics = {"tokens": mask.sum(), "clipped": (clipped & mask).sum()}
    if s.rollout_correction != "none":  # importance weights for having sampled with the engine's probabilities
        bounds = (s.rollout_correction_floor, s.rollout_correction_limit)
        weights, limited = rollout_weights(old_log_probs, engine_log_probs, mask, s.rollout_correction, bounds)
        losses = losses * weights
        statistics |= {"weights": (weights * mask).sum(), "limited": limited.sum()}
    if s.audio_token_weights:
        heard = relative_change(old_log_probs - silent_log_probs)
        losses = losses * audio_weights(heard, mask, s.audio_token_weights)
        statistics["heard"] = (heard * mask).sum()

    def over_tokens(values: torch.Tensor) -> torch.Tensor:  # (batch, length) -> scalar
        return aggregate(values, mask, s.loss_agg_mode, tokens_per_micro_batch, s.max_response_length)

    loss = over_tokens(losses)
    statistics["policy_loss"] = loss.detach()
    if ref_log_probs is not None:
        kl = kl_tokens(log_probs, ref_log_probs, s.kl_estimator)  # (batch, length)
        statistics["kl"] = (kl.detach() * mask).sum()
        if s.use_kl_loss:
            loss = loss + kl_coef * over_tokens(kl)
    return loss, statistics


def aggregate(
    values: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    tokens_per_micro_batch: float | None = None,
    max_response_length: int | None = None,
) -> torch.Tensor:
    """Reduce per-token losses of a micro-batch to a scalar; the mean of these over micro-batches is the batch's loss.

    :param values: ``(batch, length)``.
    :param mask: ``(batch, length)``, 1 at response tokens.
    :param mode: ``seq-mean-token-mean`` (mean of each response, then of the responses: GRPO), ``token-mean`` (all
        tokens of an optimizer step weigh the same: DAPO), ``seq-mean-token-sum``, or ``seq-mean-token-sum-norm`` (the
        sum divided by the constant ``max_response_length``: Dr. GRPO).
    :param tokens_per_micro_batch: For ``token-mean``: the response tokens of the optimizer step divided by its
        micro-batches, so that micro-batches with more tokens weigh more.
    :param max_response_length: For ``seq-mean-token-sum-norm``.
    :return: Scalar.
    :raises ValueError: if the mode is unknown.
    """
    mask = mask.to(values.dtype)
    sums = (values * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        return (sums / mask.sum(-1).clamp(min=1)).mean()
    if mode == "token-mean":
        total = mask.sum() if tokens_per_micro_batch is None else tokens_per_micro_batch
        return sums.sum() / max(float(total), 1.0)
    if mode == "seq-mean-token-sum":
        return sums.mean()
    if mode == "seq-mean-token-sum-norm":
        return sums.mean() / max_response_length
    raise ValueError(f"unknown loss aggregation {mode!r}; known: {', '.join(LOSS_AGG_MODES)}")


def policy_loss_tokens(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    sequence_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate for each token.

    :param log_probs: ``(batch, length)`` under the policy that is trained.
    :param old_log_probs: ``(batch, length)`` under the policy that sampled.
    :param advantages: ``(batch, length)`` or ``(batch, 1)``.
    :param eps_clip: How far the ratio may fall below 1.
    :param eps_clip_high: How far it may rise above 1 (DAPO's clip-higher); None: as far as it may fall.
    :param sequence_mask: ``(batch, length)``, 1 at response tokens: GSPO. A response's ratio, the geometric mean of
        its tokens' ratios, takes the place of each token's; None: a ratio a token.
    :return: Loss ``(batch, length)`` to be minimised, and whether the clip was active, ``(batch, length)`` bool.

    Sources: Schulman et al., Proximal Policy Optimization Algorithms (2017), equation 7; Yu et al., DAPO (2025),
    section 3.1; Zheng et al., Group Sequence Policy Optimization (2025), equations 5 to 7.
    """
    log_ratio = log_probs - old_log_probs
    if sequence_mask is not None:
        mask = sequence_mask.to(log_ratio.dtype)
        means = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = means.expand_as(log_ratio)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - eps_clip, 1 + (eps_clip if eps_clip_high is None else eps_clip_high)) * advantages
    return -torch.min(unclipped, clipped), clipped < unclipped


def cispo_loss_tokens(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, eps_clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO's loss for each token: REINFORCE with an importance weight that is cut off and has no gradient.

    Where PPO's clip takes a token out of the update, this one still counts, with the weight ``1 + eps_clip_high``.

    :param log_probs: ``(batch, length)`` under the policy that is trained; ``old_log_probs`` under the one that
        sampled.
    :param advantages: ``(batch, length)`` or ``(batch, 1)``.
    :return: Loss ``(batch, length)`` to be minimised, and whether the weight was cut off, ``(batch, length)`` bool.

    Source: MiniMax, MiniMax-M1 (2025), equations 4 and 5, whose weight has no lower bound either.
    """
    ratio = (log_probs - old_log_probs).exp().detach()
    limit = 1 + eps_clip_high
    return -ratio.clamp(max=limit) * advantages * log_probs, ratio > limit


def rollout_weights(
    old_log_probs: torch.Tensor,
    engine_log_probs: torch.Tensor,
    mask: torch.Tensor,
    method: str,
    bounds: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What corrects a loss for tokens that were sampled from the engine's probabilities, not from the trainer's.

    :param old_log_probs: ``(batch, length)``, the trainer's for the policy that sampled.
    :param engine_log_probs: ``(batch, length)``, the engine's.
    :param mask: ``(batch, length)``, 1 at response tokens.
    :param method: ``tis``: each token weighs its ratio of the two, at most the upper bound; ``mis``: each response
        weighs the product of its tokens' ratios; ``geo``: each weighs 1. A response whose product (``mis``) or
        geometric mean (``geo``) is out of bounds weighs nothing.
    :param bounds: Lower and upper; ``tis`` uses the upper one.
    :return: Weights ``(batch, length)`` without gradient, and where a bound took hold, ``(batch, length)`` bool.
    :raises ValueError: if the method is unknown.

    Sources: Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (2025), for ``tis``;
    Liu et al., When Speed Kills Stability (2025), for ``mis`` and ``geo``.
    """
    lowest, highest = bounds
    log_ratio = ((old_log_probs - engine_log_probs) * mask).detach()
    if method == "tis":
        ratio = log_ratio.exp()
        return ratio.clamp(max=highest), (ratio > highest) & mask.bool()
    total = log_ratio.sum(-1, keepdim=True)
    if method == "mis":
        ratio = weight = total.exp()
    elif method == "geo":
        ratio = (total / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
        weight = torch.ones_like(ratio)
    else:
        raise ValueError(f"unknown rollout correction {method!r}; known: {', '.join(ROLLOUT_CORRECTIONS)}")
    beyond = ((ratio < lowest) | (ratio > highest)).expand_as(log_ratio)
    return weight.expand_as(log_ratio).masked_fill(beyond, 0.0), beyond & mask.bool()


def relative_change(log_ratio: torch.Tensor) -> torch.Tensor:
    """How far two probabilities differ, as a share of the larger one: 0 (equal) to 1; log of their ratio given."""
    return -torch.expm1(-log_ratio.abs())


def audio_weights(heard: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """Weights that let tokens count more whose probability depends on the sound: ``1 - share + share * h / mean(h)``.

    ``h`` is ``heard`` plus :data:`UNHEARD`, so that weights stay near 1 in a response of which hardly a token depends
    on the sound. Their mean over a response is 1: the loss keeps its scale, and a response its weight among the others.

    :param heard: ``(batch, length)``, 0 to 1: :func:`relative_change` of each token's probability under the policy that
        sampled, with the sound and with silence of the same length.
    :param mask: ``(batch, length)``, 1 at response tokens.
    :param share: Of the loss that is divided by ``h``, 0 to 1.
    :return: ``(batch, length)`` without gradient.

    Source: Huang et al., Spotlight on Token Perception for Multimodal Reinforcement Learning (2025), section 3, which
    measures a token's dependence on an image by the KL divergence between the distributions with and without it, and
    trains on the most dependent tokens alone; here the sampled token's probability stands for the distribution, and
    no token is left out.
    """
    mask = mask.to(heard.dtype)
    heard = heard.detach() + UNHEARD
    mean = (heard * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return 1 - share + share * heard / mean.clamp(min=UNHEARD)


def kl_tokens(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate of KL(policy || reference) for each sampled token.

    :param log_probs: ``(batch, length)`` under the policy.
    :param ref_log_probs: ``(batch, length)`` under the reference model.
    :param estimator: ``k1`` (log ratio), ``k2`` (half its square), ``k3`` (unbiased, never negative: GRPO).
    :return: ``(batch, length)``.
    :raises ValueError: if the estimator is unknown.

    Source: J. Schulman, Approximating KL Divergence (2020).
    """
    log_ratio = log_probs - ref_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio  # expm1: the two models start out equal
    raise ValueError(f"unknown KL estimator {estimator!r}; known: {', '.join(KL_ESTIMATORS)}")
