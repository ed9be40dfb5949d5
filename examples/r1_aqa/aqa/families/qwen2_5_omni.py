"""Qwen2.5-Omni's thinker, hearing and reading; its vision tower stays as it is, talker and vocoder stay away."""

from __future__ import annotations

from typing import Any, ClassVar

from aqa.families.qwen2_audio import QWEN2_5_7B, Parts, Qwen2Audio


class Qwen2_5Omni(Qwen2Audio):
    """Qwen2.5-Omni's thinker: a tower on chunks of two seconds, which sees valid frames alone and projects itself.

    Its positions have three axes (time, height, width), but those of text and sound are the same in all three, and
    its decoder takes one row of positions for such: nothing else of the policy differs, prompt sharing included.
    """

    name = "Qwen2.5-Omni"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # the whole model's folder, the live model
    tower_type = "qwen2_5_omni_audio_encoder"
    model_class_name = "Qwen2_5OmniThinkerForConditionalGeneration"
    # where Qwen2-Audio's template numbers the clips, and gives each a line, this one's does not
    clip_text = "'<|audio_bos|><|AUDIO|><|audio_eos|>'"
    foreign = ("talker.", "token2wav.")
    fixed = ()
    unheard = ("visual", "audio_tower.audio_bos_eos_token")
    language_model = "model"
    tower, decoder, projectors, tower_norm = "audio_tower", "model", ("audio_tower.proj",), "ln_post"
    published: ClassVar = {
        "Qwen/Qwen2.5-Omni-7B": {
            "text_config": QWEN2_5_7B | {"vocab_size": 152_064},
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        }
    }
    unpacked = ("lm_head", "audio_tower", "visual")
    ours_in_vllm = True
    deaf = ("thinker.model.", "thinker.lm_head.")

    @classmethod
    def processor_class(cls) -> Any:
        """The part of the whole processor that text and sound pass."""
        from aqa.families.omni_processor import OmniAudioProcessor

        return OmniAudioProcessor

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """All of the thinker has a prefix."""
        return f"thinker.{name}"

    @classmethod
    def checkpoint_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """A Qwen2.5-Omni that does not talk."""
        return {
            "architectures": ["Qwen2_5OmniModel"],
            "model_type": cls.model_types[0],
            "enable_audio_output": False,
            "dtype": config["dtype"],
            "thinker_config": super().checkpoint_config(config),
        }

    @staticmethod
    def vllm_options(seconds: float) -> dict[str, Any]:
        """Our class takes the place of vLLM's own."""
        from aqa.families.omni_vllm import ARCHITECTURE, register  # imports vLLM, which takes seconds

        register()
        return {"hf_overrides": {"architectures": [ARCHITECTURE]}}

    @classmethod
    def tune_vllm(cls, model: Any, cache: Any = None) -> None:
        """Nothing: its tower sees valid frames alone, and its outputs are not kept, since it holds the projector."""

    @staticmethod
    def prefill(model: Any, inputs: dict[str, Any], positions: Any, cache: Any) -> None:
        """``generate`` goes on counting from ``rope_deltas``."""
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

    @staticmethod
    def parts(model: Any) -> Parts:
        """The tower holds its projector."""
        from torch import nn

        return Parts(model.audio_tower, nn.Identity(), model.model, model.lm_head)

    @staticmethod
    def tower_states(tower: Any, features: Any, frames: Any) -> Any:
        """Embeddings of all clips' audio tokens ``(sum of tokens, hidden)``."""
        import torch

        positions = torch.arange(features.shape[-1], device=features.device)
        valid = features.transpose(1, 2)[positions[None, :] < frames[:, None]].T
        after_conv, _ = tower._get_feat_extract_output_lengths(frames)
        return tower(valid, feature_lens=frames, aftercnn_lens=after_conv).last_hidden_state
