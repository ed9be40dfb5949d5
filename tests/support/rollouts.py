"""Rollouts of an engine, and how far their log-probs are from the trainer's."""

import itertools

import numpy as np
import torch
from audio_dataset import AudioMultimodalProcessor

from aqa.audio.decode import SAMPLING_RATE
from aqa.data.prompts import render_chat
from aqa.patches.strategy import build_audio_inputs
from lightrft.engines.base import Sampling
from lightrft.trainer.fast_exp_maker import forward
from lightrft.trainer.replay_buffer import Experience, make_micro_batch

QUESTION = "What sound is this? Please choose the answer from the following options: ['beep', 'bell', 'hum', 'rain']."
SECONDS = (0.1, 0.7, 3.3, 29.999, 30.0, 40.0)  # below one block, typical, and at and beyond what the tower takes


def prompt_of(processor, question=QUESTION):
    content = [{"type": "audio", "audio_url": "x.wav"}, {"type": "text", "text": question}]
    return render_chat(processor, [{"role": "user", "content": content}])


def rollout(engine, parts, clips, prompts, audio_seconds=30.0, **sampling):
    """Experiences as the experience maker would make them."""
    _, tokenizer, processor = parts
    audio = processor.audio_token
    bias = {tokenizer.convert_tokens_to_ids(audio): -100.0}
    settings = {
        "end_ids": (tokenizer.eos_token_id,),
        "n": 2,
        "max_tokens": 12,
        "logit_bias": bias,
        "seed": 3,
    } | sampling
    inputs = AudioMultimodalProcessor(tokenizer, processor, 512, audio_seconds)
    data = inputs.process_multimodal_batch(prompts, clips, None, None, 1)
    windows = iter(data["all_images_pixel_values"].split(data["all_images_grid_thw"].prod(-1).tolist()))
    rows = [list(itertools.islice(windows, count)) for count in data["all_images_num"]]
    outputs = engine.generate(build_audio_inputs(prompts, clips), [Sampling(**settings)] * len(prompts))
    items = []
    for i, output in enumerate(outputs):
        prompt = i // settings["n"]
        assert output.prompt_token_ids == data["all_prompt_token_ids"][prompt]  # token for token
        ids = torch.tensor(output.prompt_token_ids)
        response = torch.tensor(output.output_token_ids)
        items.append(Experience("", ids, response, output.output_log_probs, output.truncated, rows[prompt], "", ""))
    return items, bias


def gaps(parts, items, bias):
    """Largest |log p engine - log p trainer| of each response."""
    actor, tokenizer, _ = parts
    actor.logit_bias = bias
    batch = make_micro_batch(items, tokenizer.pad_token_id, torch.device("cpu"))
    with torch.no_grad():
        values = forward(actor, batch)
    return [
        (values[i, : len(item.response_ids)] - item.engine_log_probs).abs().max().item() for i, item in enumerate(items)
    ]


def perturbed(actor, scale):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def make_noises(seconds: tuple[float, ...] = SECONDS) -> list[tuple[np.ndarray, int]]:
    """A clip of noise of each length."""
    rng = np.random.default_rng(0)
    return [(0.3 * rng.standard_normal(int(s * SAMPLING_RATE)).astype(np.float32), SAMPLING_RATE) for s in seconds]
