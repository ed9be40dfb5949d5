"""Qwen2.5-Omni's processor for text and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2AudioProcessor
from transformers.utils import cached_file


class OmniAudioProcessor(Qwen2AudioProcessor):
    """The part of Qwen2.5-Omni's processor that text and sound pass, which is Qwen2-Audio's.

    The whole one cannot be made without torchvision, for pictures and videos that never come. Its feature extractor
    pads every clip to 300 s; clips have 30 s at most here, and the valid frames are the same.
    """

    FILES = (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
    )

    def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        seconds = min(feature_extractor.chunk_length, 30)
        feature_extractor.chunk_length = seconds
        feature_extractor.n_samples = seconds * feature_extractor.sampling_rate
        feature_extractor.nb_max_frames = feature_extractor.n_samples // feature_extractor.hop_length
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.source: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> OmniAudioProcessor:
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.source = str(pretrained_model_name_or_path)
        return processor

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the tokenizer, and copy the whole processor's own files, so that the folder is Qwen2.5-Omni's again."""
        self.tokenizer.save_pretrained(save_directory, **kwargs)
        for name in self.FILES:
            path = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                (Path(save_directory) / name).write_bytes(Path(path).read_bytes())
