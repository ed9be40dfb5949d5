"""A Qwen2-Audio with random weights, and micro-batches for it."""

from typing import Any

import torch

SAMPLES, CLIP_FRAMES, AUDIO_TOKENS = 8, 1000, 250  # responses a prompt; of a clip of 10 s


def make_config(audio: tuple[int, int, int], text: tuple[int, int, int, int, int], token: int, **more: Any) -> Any:
    """The configuration.

    :param audio: Layers, heads and width of the tower.
    :param text: Layers, heads, width, intermediate width and vocabulary of the language model.
    :param token: Id of the audio placeholder.
    :param more: Further settings of the language model.
    """
    from transformers import Qwen2AudioConfig

    layers, heads, width = audio
    tower = {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500}
    tower |= {"encoder_layers": layers, "encoder_attention_heads": heads}
    tower |= {"encoder_ffn_dim": 4 * width, "d_model": width}
    layers, heads, width, intermediate, vocabulary = text
    decoder = {"model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": intermediate}
    decoder |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    decoder |= {"tie_word_embeddings": False} | more
    config = Qwen2AudioConfig(audio_config=tower, text_config=decoder, audio_token_index=token)
    config.use_cache = False
    return config


def build_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a configuration, on torch's default device."""
    from transformers import Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2AudioForConditionalGeneration._from_config(config, dtype=dtype).train()


def make_policy(model: Any) -> Any:
    """The model with the project's forward, which returns log-probs."""
    from aqa.common.patch import Patch
    from aqa.patches.actor import patch_policy

    patch_policy(Patch(), model)
    return model


def make_batch(
    vocabulary: int, text: int, response: int, token: int, prompts: int = 1, clips_a_prompt: int = 1
) -> dict[str, torch.Tensor]:
    """8 responses to each of some prompts with a clip of 10 s.

    :param vocabulary: Tokens are drawn below this.
    :param text: Text tokens of a prompt.
    :param response: Tokens a response.
    :param token: Id of the audio placeholder.
    :param clips_a_prompt: 1, or 8 for one encoding a response.
    :return: Arguments of ``response_log_probs``.
    """
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(8, vocabulary, (prompts, text), generator=generator)
    prompt = torch.cat([words[:, :4], torch.full((prompts, AUDIO_TOKENS), token), words[:, 4:]], 1)
    rows, clips = prompts * SAMPLES, prompts * clips_a_prompt
    sampled = torch.randint(8, vocabulary, (rows, response), generator=generator)
    sequences = torch.cat([prompt.repeat_interleave(SAMPLES, 0), sampled], 1)
    features = torch.randn(prompts, 128, 3000, generator=generator)
    features[:, :, CLIP_FRAMES + 2 :] = 0
    return {
        "sequences": sequences,
        "attention_mask": torch.ones_like(sequences),
        "response_mask": torch.ones_like(sampled),
        "features": features.repeat_interleave(clips_a_prompt, 0),
        "frames": torch.full((clips,), CLIP_FRAMES),
        "clip_index": torch.arange(clips).repeat_interleave(rows // clips),
    }
