"""Qwen2.5-Omni's thinker for vLLM, hearing and reading only.

vLLM's own class cannot be imported without torchvision, which on a CPU comes from PyTorch's index alone, and it brings
a vision tower. This one has vLLM's Qwen2 as language model, transformers' audio tower, as vLLM's own has, and vLLM's
processing of Qwen2-Audio's sounds. Its parameters have the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from vllm import ModelRegistry
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.qwen2_audio import (
    Qwen2AudioDummyInputsBuilder,
    Qwen2AudioMultiModalProcessor,
    Qwen2AudioProcessingInfo,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from aqa.families.omni_processor import OmniAudioProcessor

ARCHITECTURE = "Qwen2_5OmniAudioThinker"
NOT_HERE = WeightsMapper(orig_to_new_prefix={"thinker.visual.": None, "talker.": None, "token2wav.": None})


class ProcessingInfo(Qwen2AudioProcessingInfo):
    """Qwen2-Audio's, with the other model's configuration and processor."""

    def get_hf_config(self) -> Any:
        """The thinker's configuration."""
        return self.ctx.get_hf_config(Qwen2_5OmniConfig).thinker_config

    def get_hf_processor(self, **kwargs: object) -> OmniAudioProcessor:
        return self.ctx.get_hf_processor(OmniAudioProcessor, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2AudioMultiModalProcessor, info=ProcessingInfo, dummy_inputs=Qwen2AudioDummyInputsBuilder
)
class Qwen2_5OmniAudioThinker(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """The model, as vLLM wants models."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a clip in a chat."""
        return "<|audio_bos|><|AUDIO|><|audio_eos|>" if modality == "audio" else None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.thinker_config
        self.config = config
        with self._mark_language_model(vllm_config):
            self.thinker = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "thinker"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.thinker.audio_tower = Qwen2_5OmniAudioEncoder(config.audio_config)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Positions in time, height and width: text and sound have the same in all three.

        :return: ``(3, tokens)``, and by how much the next position differs from the number of tokens: 0.
        """
        return torch.arange(len(input_tokens)).expand(3, -1), 0

    def embed_multimodal(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Embeddings of clips.

        :param kwargs: ``input_features (clips, n_mels, 3000)`` and ``feature_attention_mask (clips, 3000)``.
        :return: ``(tokens, hidden)`` a clip.
        """
        features, mask = kwargs.get("input_features"), kwargs.get("feature_attention_mask")
        if features is None:
            return ()
        tower = self.thinker.audio_tower
        frames = mask.sum(-1)
        valid = features.transpose(1, 2)[mask.bool()].T.to(tower.dtype)
        after_conv, tokens = tower._get_feat_extract_output_lengths(frames)
        states = tower(valid, feature_lens=frames, aftercnn_lens=after_conv).last_hidden_state
        return states.split(tokens.tolist())

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states of the language model; arguments as vLLM has them."""
        return self.thinker.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits.

        :param hidden_states: ``(tokens, hidden)``.
        """
        return self.thinker.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a checkpoint's weights; those of parts that neither hear nor read are passed over."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=NOT_HERE)


def register() -> None:
    """Make vLLM know the class, under a name of its own."""
    ModelRegistry.register_model(ARCHITECTURE, Qwen2_5OmniAudioThinker)
