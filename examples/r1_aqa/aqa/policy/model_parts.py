"""The models that the patches know, by ``config.model_type``: where their parts are, and how their towers take clips.

What is the same for all of them is in ``policy.forward``.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Parts(NamedTuple):
    """The parts of a model.

    :param projector: From the tower's states to the decoder's.
    :param decoder: Language model without its head.
    :param head: From hidden states to the vocabulary.
    """

    tower: nn.Module
    projector: nn.Module
    decoder: nn.Module
    head: nn.Module


class Qwen2Audio:
    """Qwen2-Audio: a tower on 30 s, which sees two frames beyond the last valid one."""

    @staticmethod
    def parts(model: Any) -> Parts:
        """Find the parts; transformers 5 keeps them in other places than 4.57."""
        if hasattr(model, "lm_head"):
            inner = model.model
            return Parts(inner.audio_tower, inner.multi_modal_projector, inner.language_model, model.lm_head)
        causal = model.language_model
        return Parts(model.audio_tower, model.multi_modal_projector, causal.model, causal.lm_head)

    @staticmethod
    def tower_states(tower: Any, features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """States of all clips' audio tokens ``(sum of tokens, d_model)``.

        :param features: Mel spectrograms ``(clips, n_mels, 3000)``, exact in the valid frames and the two after them.
        :param frames: Valid frames ``(clips,)``.
        """
        after_conv, tokens = tower._get_feat_extract_output_lengths(frames)
        # two frames of context, and an even number of states for the pooling; masked keys weigh exactly 0, so that
        # leaving out the padding changes no value
        width = min(int(frames.max()) + 2, features.shape[-1])
        width = min((width + 3) // 4 * 4, features.shape[-1])
        dtype = tower.conv1.weight.dtype
        hidden = F.gelu(tower.conv1(features[:, :, :width].to(dtype)))
        hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)
        states = torch.arange(hidden.shape[1], device=hidden.device)
        hidden = hidden + tower.embed_positions(states)
        mask = _padding_mask(tower, hidden, states[None, :] < after_conv[:, None])
        old = "layer_head_mask" in inspect.signature(tower.layers[0].forward).parameters  # transformers 4
        for layer in tower.layers:
            hidden = layer(hidden, mask, None)[0] if old else layer(hidden, mask)
        hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
        valid = torch.arange(hidden.shape[1], device=tokens.device)[None, :] < tokens[:, None]
        return hidden[valid]


def _padding_mask(tower: Any, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor | None:
    """The attention mask that the tower's layers take, from the valid states ``(clips, states)``."""
    try:
        from transformers.masking_utils import create_bidirectional_mask
    except ImportError:  # transformers 4: the tower's eager attention adds the mask to the scores
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros_like(valid, dtype=hidden.dtype).masked_fill(~valid, lowest)[:, None, None, :]
    return create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=valid.long())


class Qwen2_5OmniThinker:
    """Qwen2.5-Omni's thinker: a tower on chunks of two seconds, which sees valid frames alone and projects itself.

    Its positions have three axes (time, height, width), but those of text and sound are the same in all three, and
    its decoder takes one row of positions for such: nothing else of the policy differs, prompt sharing included.
    """

    @staticmethod
    def parts(model: Any) -> Parts:
        """Find the parts."""
        return Parts(model.audio_tower, nn.Identity(), model.model, model.lm_head)

    @staticmethod
    def tower_states(tower: Any, features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings of all clips' audio tokens ``(sum of tokens, hidden)``; parameters as for Qwen2-Audio."""
        positions = torch.arange(features.shape[-1], device=features.device)
        valid = features.transpose(1, 2)[positions[None, :] < frames[:, None]].T
        after_conv, _ = tower._get_feat_extract_output_lengths(frames)
        return tower(valid, feature_lens=frames, aftercnn_lens=after_conv).last_hidden_state


FAMILIES: dict[str, type[Qwen2Audio] | type[Qwen2_5OmniThinker]] = {
    "qwen2_audio": Qwen2Audio,
    "qwen2_audio_encoder": Qwen2Audio,
    "qwen2_5_omni_thinker": Qwen2_5OmniThinker,
    "qwen2_5_omni_audio_encoder": Qwen2_5OmniThinker,
}


def family_of(module: Any) -> type[Qwen2Audio] | type[Qwen2_5OmniThinker]:
    """How this package deals with a model, or with its tower.

    :raises ValueError: if it does not know such a model.
    """
    kind = module.config.model_type
    if kind not in FAMILIES:
        known = ", ".join(name for name in FAMILIES if not name.endswith("_encoder"))
        raise ValueError(
            f"a {type(module).__name__} (model_type {kind!r}) is none of {known}: add its parts to {__name__}"
        )
    return FAMILIES[kind]
