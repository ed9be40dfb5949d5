"""The demo's model as a Qwen2.5-Omni: the same tokenizer and sizes; only its thinker, whose vision tower is unused."""

import json
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    WhisperFeatureExtractor,
)

from aqa.families.omni_processor import OmniAudioProcessor

TOKENS = {  # attributes of Qwen2.5-Omni's tokenizer
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHUNK_LENGTH = 300  # seconds: what Qwen2.5-Omni's feature extractor pads to
# settings of its picture and video processors, which its configuration must name; nothing here uses them
PICTURES = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str, n_mels: int, rate: int) -> OmniAudioProcessor:
    """Make the processor of text and sound.

    :param tokenizer: The demo's, with :data:`TOKENS`.
    :param rate: Sampling rate in Hz.
    """
    extractor = WhisperFeatureExtractor(
        feature_size=n_mels, sampling_rate=rate, chunk_length=CHUNK_LENGTH, return_attention_mask=True
    )
    return OmniAudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=template)


def build_config(tokenizer: PreTrainedTokenizerFast, audio: dict[str, Any], text: dict[str, Any]) -> Any:
    """Make the thinker's configuration.

    :param tokenizer: The demo's, with :data:`TOKENS`.
    :param audio: Sizes of the tower, as for the demo's Qwen2-Audio.
    :param text: Sizes of the language model.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    half_head = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half_head // 4, half_head * 3 // 8, half_head * 3 // 8]  # time, height, width: the real one's shares
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2_5OmniThinkerConfig(
        audio_config=audio | {"model_type": "qwen2_5_omni_audio_encoder", "output_dim": text["hidden_size"]},
        text_config=text | {"model_type": "qwen2_5_omni_text", "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 1,
            "patch_size": PICTURES["patch_size"],
            "window_size": 8,
            "fullatt_block_indexes": [0],
            "out_hidden_size": text["hidden_size"],
        },
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )


def write_processor(processor: OmniAudioProcessor, folder: Path) -> None:
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    parts = {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor": processor.feature_extractor.to_dict() | {"chunk_length": CHUNK_LENGTH},
        "image_processor": PICTURES | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": PICTURES | {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
