"""Tiny random models and samples for comparing the policy with plain transformers."""

import torch
from support.experiences import make_experience
from torch import nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from aqa.hosts.targets import patch_actor_for_audio
from aqa.patches.slots import audio_token_count, pack_clip
from lightrft.models.actor_al import ActorAL

AUDIO, PAD, VOCABULARY = 7, 0, 61
TOWER = {"num_mel_bins": 128, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 96, "d_model": 64}
DECODER = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
DECODER |= {"tie_word_embeddings": False}


def with_large_weights(model_class: type[nn.Module], config: object, scale: float = 1.3) -> nn.Module:
    """A model of these sizes in which whatever it hears or reads shows in its outputs; the default 0.02 hides it."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale * parameter[0].numel() ** -0.5)
    return model


def build_model() -> Qwen2AudioForConditionalGeneration:
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 1500} | TOWER,
        text_config={"model_type": "qwen2"} | DECODER,
        audio_token_index=AUDIO,
    )
    return with_large_weights(Qwen2AudioForConditionalGeneration, config)


def as_actor(
    policy: Qwen2AudioForConditionalGeneration, temperature: float = 1.0, logit_bias: dict | None = None
) -> ActorAL:
    actor = ActorAL(policy)
    actor.temperature, actor.logit_bias = temperature, logit_bias or {}
    patch_actor_for_audio(actor)
    return actor


def make_mel(seed: int) -> torch.Tensor:
    """A spectrogram that is nowhere zero, not even beyond the valid frames, as the extractor's."""
    return torch.randn(128, 3000, generator=torch.Generator().manual_seed(seed))


def make_item(frames: int | None, seed: int, response: list[int], clip_seed: int | None = None, text: int = 4):
    """An experience, and the spectrogram it was packed from; ``frames`` None is text alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    words = torch.randint(8, VOCABULARY, (text + 3,), generator=generator).tolist()
    mel = None if frames is None else make_mel(seed if clip_seed is None else clip_seed)
    audio = [] if frames is None else [AUDIO] * audio_token_count(frames)
    item = make_experience(
        len(response),
        prompt_ids=torch.tensor(words[:3] + audio + words[3:]),
        response_ids=torch.tensor(response),
        clips=[] if frames is None else [pack_clip(mel, frames)],
    )
    return item, mel, frames


def mixed_cases() -> list:
    """Lengths from one audio token to 30 s, shared clips, text alone, prompts and responses of all widths."""
    return [
        make_item(333, 1, [9, 10, 11, 12, 13]),
        make_item(None, 2, [14, 15], text=9),
        make_item(8, 3, [16]),
        make_item(333, 4, [17, 18, 19], clip_seed=1, text=1),  # the first one's clip
        make_item(101, 5, [20, AUDIO, 21, AUDIO, AUDIO]),  # samples placeholders
        make_item(3, 6, [22, 23]),  # one audio token
        make_item(3000, 7, [24, 25, 26]),
        make_item(None, 8, [27, AUDIO, 28]),
        make_item(333, 1, [29, 30]),  # the first one's prompt and clip: a group
        make_item(333, 1, [31, 32, 33], clip_seed=2),  # the first one's prompt, another clip
        make_item(None, 2, [34], text=9),  # the second one's prompt
    ]
