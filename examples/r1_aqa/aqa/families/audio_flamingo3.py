"""Audio Flamingo 3: Qwen2-Audio's tower and names, a projector of two layers, and windows of 30 s up to 10 minutes."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

from aqa.families.qwen2_audio import QWEN2_5_7B, Qwen2Audio, encode_valid_frames


class AudioFlamingo3(Qwen2Audio):
    """Audio Flamingo 3; see :class:`Qwen2Audio` for what each member means."""

    name = "Audio Flamingo 3"
    model_types = ("audioflamingo3",)
    tower_type = "audioflamingo3_encoder"
    model_class_name = "AudioFlamingo3ForConditionalGeneration"
    processor_class_name = "AudioFlamingo3Processor"
    audio_token = "<sound>"
    clip_text = "'<sound>'"
    longest_seconds = 600
    one_clip_in_vllm = True
    projectors = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    published: ClassVar = {"nvidia/audio-flamingo-3-hf": {"text_config": QWEN2_5_7B | {"vocab_size": 151_672}}}

    @staticmethod
    def vllm_options(seconds: float) -> dict[str, Any]:
        """vLLM reserves room for the longest clip that the processor takes, 15,000 tokens: let it take no more."""
        return {"mm_processor_kwargs": {"max_audio_len": 30 * math.ceil(seconds / 30)}}

    @classmethod
    def tune_vllm(cls, model: Any, cache: Any = None) -> None:
        """As Qwen2-Audio, but that vLLM's tower returns the states themselves."""
        model.audio_tower.forward = functools.partial(encode_valid_frames, model.audio_tower, cache)
