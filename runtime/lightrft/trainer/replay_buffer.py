"""Responses waiting to be trained on, and the micro-batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Experience:
    """One response and everything known about it. Tensors are in CPU memory.

    :param prompt: Prompt text, for trajectories.
    :param prompt_ids: Prompt tokens, placeholders expanded ``(prompt length,)`` int64.
    :param response_ids: Sampled tokens, end of turn included ``(response length,)`` int64.
    :param engine_log_probs: The engine's log-probs of them ``(response length,)`` float32.
    :param truncated: The response hit the token limit.
    :param clips: Rows of each clip of the prompt, ``(rows, n_mels)``; the responses of a group share the tensors.
    :param tags: Further names under which metrics count it, such as its data set.
    :param source: What trajectories record of the prompt beside its text, such as the audio's file.
    :param response: Decoded response, for trajectories.
    :param old_log_probs: Under the policy that sampled; None where the update is on-policy.
    :param ref_log_probs: Under the reference model; None without KL.
    :param silent_log_probs: As ``old_log_probs``, with silence in place of the sound; None where nothing needs them.
    :param advantages: ``(response length,)`` float32.
    """

    prompt: str
    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    engine_log_probs: torch.Tensor
    truncated: bool
    clips: list[torch.Tensor]
    reference: str
    label: str
    tags: Sequence[str] = ()
    source: dict[str, Any] = field(default_factory=dict)
    response: str = ""
    reward: float = 0.0
    reward_metrics: dict[str, float] = field(default_factory=dict)
    old_log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    silent_log_probs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None


@dataclass
class MicroBatch:
    """Padded experiences: padding, prompt, response, padding; the response region is as wide as the longest one.

    :param sequences: ``(batch, length)`` int64.
    :param attention_mask: ``(batch, length)`` int64.
    :param response_mask: ``(batch, response width)`` bool.
    :param audio_values: Rows of all clips in order, or None for text alone.
    :param image_grid_thw: ``(clips, 3)``, or None.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    audio_values: list[torch.Tensor] | None
    image_grid_thw: torch.Tensor | None


def make_micro_batch(items: Sequence[Experience], pad_token_id: int, device: torch.device) -> MicroBatch:
    """Pad experiences to one width.

    :param device: Where token tensors go; clips stay where they are until the actor has unpacked them.
    """
    prompt_width = max(len(item.prompt_ids) for item in items)
    response_width = max(len(item.response_ids) for item in items)
    sequences = torch.full((len(items), prompt_width + response_width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(sequences)
    for i, item in enumerate(items):
        start, end = prompt_width - len(item.prompt_ids), prompt_width + len(item.response_ids)
        sequences[i, start:prompt_width] = item.prompt_ids
        sequences[i, prompt_width:end] = item.response_ids
        mask[i, start:end] = 1
    clips = [clip for item in items for clip in item.clips]
    grid = torch.tensor([[1, 1, clip.shape[0]] for clip in clips], dtype=torch.long) if clips else None
    return MicroBatch(
        sequences=sequences.to(device),
        attention_mask=mask.to(device),
        response_mask=mask[:, prompt_width:].bool().to(device),
        audio_values=clips or None,
        image_grid_thw=grid,
    )


def pad_tokens(values: Sequence[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Per-token values of responses as one matrix.

    :param values: ``(response length,)`` each.
    :return: ``(batch, width)`` float32, 0 at padding.
    """
    out = torch.zeros(len(values), width)
    for i, value in enumerate(values):
        out[i, : len(value)] = value
    return out.to(device)
