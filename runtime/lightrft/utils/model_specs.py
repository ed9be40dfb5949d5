"""The audio language models that can be trained, and what differs between them here: classes, names and configuration.

What differs in the forward pass is the example's business (``aqa.policy.forward.parts_of``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    DynamicCache,
    PreTrainedModel,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from lightrft.utils.weight_names import checkpoint_name

MAX_AUDIO_TOKENS = 750  # of one clip: 30 s at 25 tokens a second


class Qwen2Audio:
    """Qwen2-Audio, whole."""

    name = "Qwen2-Audio"
    model_class: type[PreTrainedModel] = Qwen2AudioForConditionalGeneration
    processor_class: type[ProcessorMixin] = Qwen2AudioProcessor
    foreign: tuple[str, ...] = ()  # prefixes of checkpoint weights that the model does not have
    unheard: tuple[str, ...] = ()  # modules that neither audio nor text uses; frozen
    # sinusoids, which do not train; transformers 5 forgets that while it loads, except under ZeRO-3
    fixed: tuple[str, ...] = ("model.audio_tower.embed_positions",)
    language_model = "language_model"  # the module that --target_modules calls so
    four_bit = True  # whether its language model is one that four_bit.py can pack

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """Name of a parameter in a checkpoint, which is also what the engine loads."""
        return checkpoint_name(name)

    @staticmethod
    def checkpoint_config(config: dict[str, Any]) -> dict[str, Any]:
        """Content of a checkpoint's ``config.json``."""
        # our class is the same model with another forward; others shall load it under its own name
        return config | {"architectures": [Qwen2AudioForConditionalGeneration.__name__]}

    @staticmethod
    def prefill(model: Any, inputs: dict[str, Any], positions: torch.Tensor, cache: DynamicCache) -> None:
        """Pass prompts through the model, so that ``generate`` goes on behind them.

        :param positions: Of the tokens ``(prompts, length)``.
        """
        model.model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)


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
        """Load."""
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


class Qwen2_5Omni(Qwen2Audio):
    """Qwen2.5-Omni's thinker, hearing and reading; its vision tower stays as it is, talker and vocoder stay away."""

    name = "Qwen2.5-Omni"
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    processor_class = OmniAudioProcessor
    foreign = ("talker.", "token2wav.")
    fixed = ()
    unheard = ("visual", "audio_tower.audio_bos_eos_token")
    language_model = "model"
    four_bit = False

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """See :class:`Qwen2Audio`."""
        return f"thinker.{name}"

    @staticmethod
    def checkpoint_config(config: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Qwen2Audio`: a Qwen2.5-Omni that does not talk."""
        thinker = config | {"architectures": [Qwen2_5OmniThinkerForConditionalGeneration.__name__]}
        return {
            "architectures": ["Qwen2_5OmniModel"],
            "model_type": "qwen2_5_omni",
            "enable_audio_output": False,
            "dtype": config["dtype"],
            "thinker_config": thinker,
        }

    @staticmethod
    def prefill(model: Any, inputs: dict[str, Any], positions: torch.Tensor, cache: DynamicCache) -> None:
        """See :class:`Qwen2Audio`; generate goes on counting from ``rope_deltas``."""
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        if "input_features" in inputs:
            audio = model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
            heard = (ids == model.config.audio_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(heard, audio.last_hidden_state.to(embeds.dtype))
        model.model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        model.rope_deltas = ids.new_zeros(1, 1)


FAMILIES: dict[str, type[Qwen2Audio]] = {
    "qwen2_audio": Qwen2Audio,
    "qwen2_5_omni": Qwen2_5Omni,  # the whole model's folder
    "qwen2_5_omni_thinker": Qwen2_5Omni,  # the live model
}


def family_of(model: Any) -> type[Qwen2Audio]:
    """The family of a model, by ``model_type``.

    :param model: Folder, hub name, or a live transformers model.
    :raises ValueError: if it is of none.
    """
    if isinstance(model, str):
        config = Path(model) / "config.json"
        local = config.is_file()
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if local else None
        kind = kind if local else AutoConfig.from_pretrained(model).model_type
    else:
        kind = model.config.model_type
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{model if isinstance(model, str) else type(model).__name__}: model_type {kind!r} is none of "
            f"{known}; CONTRIBUTING.md says what another model needs"
        )
    return FAMILIES[kind]
