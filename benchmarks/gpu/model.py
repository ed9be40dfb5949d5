"""A Qwen2-Audio of 7B's shape with random weights, micro-batches for it, and ways to measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import allocated

SAMPLES, AUDIO, CLIP_FRAMES, AUDIO_TOKENS, TEXT = 8, 3, 1000, 250, 94  # AUDIO: placeholder of the demo's tokenizer
SIZES = {  # audio: layers, heads, width; text: layers, heads, width, intermediate, vocabulary
    "7B": ((32, 20, 1280), (32, 32, 4096, 11_008, 156_032)),
    "2 layers of 7B": ((2, 20, 1280), (2, 32, 4096, 11_008, 156_032)),
    "small": ((1, 2, 64), (2, 2, 64, 128, 8192)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5 if DEVICE.type == "cuda" else 1  # that count
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # which many CPUs emulate


def build_model(size: str, dtype: torch.dtype = DTYPE, patched: bool = True) -> Any:
    """A model on the device, made there in seconds.

    :param size: Of :data:`SIZES`.
    :param patched: Its forward is the project's, which returns log-probs.
    """
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    from aqa.common.patch import Patch
    from aqa.patches.actor import patch_policy

    (layers, heads, width), (text_layers, text_heads, text_width, intermediate, vocabulary) = SIZES[size]
    audio = {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500}
    audio |= {"encoder_layers": layers, "encoder_attention_heads": heads}
    audio |= {"encoder_ffn_dim": 4 * width, "d_model": width}
    text = {"model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": text_width}
    text |= {"num_hidden_layers": text_layers, "num_attention_heads": text_heads, "num_key_value_heads": text_heads}
    text |= {"intermediate_size": intermediate, "tie_word_embeddings": False}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    config.use_cache = False
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen2AudioForConditionalGeneration._from_config(config, dtype=dtype)
    if patched:
        patch_policy(Patch(), model)
    return model.train()


def make_batch(response: int, prompts: int = 1, clips_a_prompt: int = 1) -> dict[str, torch.Tensor]:
    """8 responses to each of some prompts with a clip of 10 s.

    :param response: Tokens a response.
    :param clips_a_prompt: 1, or 8 for one encoding a response.
    :return: Arguments of ``response_log_probs``.
    """
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(8, 500, (prompts, TEXT), generator=generator)
    prompt = torch.cat([text[:, :4], torch.full((prompts, AUDIO_TOKENS), AUDIO), text[:, 4:]], 1)
    rows = prompts * SAMPLES
    sampled = torch.randint(8, 500, (rows, response), generator=generator)
    sequences = torch.cat([prompt.repeat_interleave(SAMPLES, 0), sampled], 1)
    features = torch.randn(prompts, 128, 3000, generator=generator)
    features[:, :, CLIP_FRAMES + 2 :] = 0
    clips = prompts * clips_a_prompt
    batch = {
        "sequences": sequences,
        "attention_mask": torch.ones_like(sequences),
        "response_mask": torch.ones_like(sampled),
        "features": features.repeat_interleave(clips_a_prompt, 0),
        "frames": torch.full((clips,), CLIP_FRAMES),
        "clip_index": torch.arange(clips).repeat_interleave(rows // clips),
    }
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of some work, until the device is done with it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median of some rounds, after one that warms up."""
    return statistics.median([seconds_of(work) for _ in range(rounds + 1)][1:])


def matrix_peak(size: int) -> float:
    """Floating-point operations a second of a matrix product of random values, the best of some."""
    a, b = (torch.randn(size, size, device=DEVICE).to(DTYPE) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(12))


def most_allocated(work: Callable[[], Any]) -> int:
    """Most bytes that are allocated on the device while something runs, beside those before."""
    if DEVICE.type != "cuda":
        return allocated(work)[0]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before
