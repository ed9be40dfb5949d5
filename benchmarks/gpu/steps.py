"""Micro-steps of 7B's shape, with random weights: what a training step costs, and what each measure saves.

Work: forward and backward over 8 responses to one prompt with a clip of 10 s. Model FLOP utilisation (MFU): three times
the operations of the forward pass (``torch.utils.flop_counter``; what checkpointing computes again does not count) a
second, as a share of what a matrix product reaches in the same process. Limit on a GPU: 45 % with 256 tokens.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from harness import ratio
from random_model import SAMPLES
from torch.utils.flop_counter import FlopCounterMode

from gpu.model import (
    AUDIO,
    DEVICE,
    ROUNDS,
    build_model,
    make_batch,
    matrix_peak,
    median_seconds,
    most_allocated,
    seconds_of,
)
from gpu.record import Figures, Section, judge

MFU, GAP = 0.45, 3e-2
GIB = 2**30


def run(section: Section) -> None:
    small = section.small
    model = functools.cache(lambda: build_model("small" if small else "7B"))
    peak = functools.cache(lambda: matrix_peak(small))

    def build() -> Figures:
        seconds = seconds_of(model)
        sizes = {"parameters, 10^9": sum(p.numel() for p in model().parameters()) / 1e9, "to build, s": seconds}
        return sizes | {"matrix product, TFLOP/s": peak() / 1e12}

    section.case("model", build)
    short, middle, long, longest = (4, 6, 8, 16) if small else (24, 64, 256, 1024)
    lengths = [(short, 1, False), (short, 4, False), (middle, 1, False), (long, 1, False), (long, 1, True)]
    for response, prompts, again in [*lengths, (longest, 1, True)]:
        name = f"{response} tokens" + f", {prompts} prompts" * (prompts > 1) + ", checkpointing" * again
        limit = MFU if (response, again) == (long, False) and DEVICE.type == "cuda" and not small else None
        section.case(name, lambda a=(response, prompts, again), m=limit: measure(model(), peak(), *a, m))
    for name, without in MEASURES.items():
        section.case(name, lambda w=without: saving(model(), long, w))
    section.case("hf engine, bfloat16", lambda: rollout(model(), long, None if small else GAP))


def step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward; the gradients' memory is kept, as between micro-batches."""
    model(**batch).mean().backward()


@contextlib.contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing for a while."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()


def forward_flops(model: Any, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops()


def measure(model: Any, peak: float, response: int, prompts: int, again: bool, limit: float | None) -> Figures:
    """Time and memory of a micro-step.

    :param peak: Floating-point operations a second.
    :param prompts: With 8 responses each.
    :param again: With gradient checkpointing.
    :param limit: Least MFU.
    """
    batch = make_batch(response, prompts)
    flops = 3 * forward_flops(model, batch)
    with checkpointing(model, again):
        step(model, batch)
        memory = most_allocated(lambda: step(model, batch))
        seconds = median_seconds(lambda: step(model, batch))
        with torch.no_grad():
            scoring = median_seconds(lambda: model(**batch))
    figures = {
        "MFU": flops / seconds / peak,
        "step, s": seconds,
        "log-probs alone, s": scoring,
        "sampled tokens/s": prompts * SAMPLES * response / seconds,
        "GiB beside weights and gradients": memory / GIB,
    }
    return judge(figures, MFU=(limit, None))


def saving(model: Any, response: int, without: Callable[[Any, dict[str, torch.Tensor], int], Any]) -> Figures:
    """How many times faster a step is with a measure than without; memory, too.

    :param without: Makes the step without it, and the one with it, of :data:`MEASURES`.
    """
    slow, fast = without(model, make_batch(response), response)
    pairs = [(seconds_of(slow), seconds_of(fast)) for _ in range(ROUNDS + 1)][1:]
    more = most_allocated(slow) - most_allocated(fast)
    times = {"times faster": ratio(*zip(*pairs, strict=True)), "step, s": statistics.median(b for _, b in pairs)}
    return times | {"GiB less": more / GIB}


Steps = tuple[Callable[[], None], Callable[[], None]]


def tower_once(model: Any, batch: dict[str, torch.Tensor], response: int) -> Steps:
    """A clip encoded for every response, and once."""
    apart = make_batch(response, clips_a_prompt=SAMPLES)
    return lambda: step(model, apart), lambda: step(model, batch)


def prompt_once(model: Any, batch: dict[str, torch.Tensor], _: int) -> Steps:
    """A prompt computed for every response, and once."""
    from aqa.policy import forward

    def alone(groups: list[list[int]], *_: Any) -> list[list[int]]:
        return [[row] for group in groups for row in group]

    def apart() -> None:
        with mock.patch.object(forward, "divide_groups", alone):
            step(model, batch)

    return apart, lambda: step(model, batch)


def chunked_logits(model: Any, batch: dict[str, torch.Tensor], _: int) -> Steps:
    """All logits at once, and in chunks."""
    from aqa.policy import token_log_probs

    def at_once() -> None:
        with mock.patch.object(token_log_probs, "LOGITS_AT_ONCE", 2**62):
            step(model, batch)

    return at_once, lambda: step(model, batch)


def frozen_tower(model: Any, batch: dict[str, torch.Tensor], _: int) -> Steps:
    """A frozen tower whose outputs are computed each time, and kept."""
    from aqa.policy.forward import parts_of
    from aqa.policy.tower_cache import share_tower_outputs

    tower = parts_of(model).tower

    def frozen(cache: Any) -> None:
        tower.requires_grad_(False)
        model.tower_cache = cache
        try:
            step(model, batch)
        finally:
            model.tower_cache = None
            tower.requires_grad_(True)

    tower.requires_grad_(False)
    cache = share_tower_outputs(model)
    return lambda: frozen(None), lambda: frozen(cache)


MEASURES = {
    "tower once a clip": tower_once,
    "prompt once a group": prompt_once,
    "logits in chunks": chunked_logits,
    "frozen tower's outputs kept": frozen_tower,
}


def rollout(model: Any, response: int, limit: float | None) -> Figures:
    """8 responses sampled by the ``hf`` engine, and how far its log-probs are from the training forward's, in bfloat16.

    :param response: Tokens a response.
    :param limit: Most mean difference.
    """
    from audio_dataset import AudioMultimodalProcessor

    from aqa.patches.slots import unpack_clips
    from demo.tiny_model import build_processor
    from demo.warm_start import render_question
    from lightrft.engines.base import Sampling
    from lightrft.engines.hf_engine import HFEngine

    model.zero_grad()
    model.to(torch.bfloat16)
    processor = build_processor()
    rate = processor.feature_extractor.sampling_rate
    wave = 0.1 * torch.randn(10 * rate, generator=torch.Generator().manual_seed(2)).numpy()
    prompt = render_question(processor, "What do you hear in the audio?", ["bell", "rain", "horn", "hum"])
    bias = {AUDIO: -100.0}
    engine = HFEngine(processor, lambda: contextlib.nullcontext(model))
    request = {"prompt": prompt, "multi_modal_data": {"audio": [(wave, rate)]}}
    outputs: list[Any] = []

    def sample(tokens: int) -> None:
        outputs[:] = engine.generate([request], [Sampling(n=SAMPLES, max_tokens=tokens, logit_bias=bias, seed=0)])

    sample(8)
    seconds = seconds_of(lambda: sample(response))
    data = AudioMultimodalProcessor(processor.tokenizer, processor, 512).process_multimodal_batch(
        [prompt], [(wave, rate)], None, None, 1
    )
    clips = unpack_clips(data["all_images_pixel_values"], data["all_images_grid_thw"])
    rows = [torch.tensor(output.output_token_ids) for output in outputs]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    prompt_ids = torch.tensor(outputs[0].prompt_token_ids).expand(SAMPLES, -1)
    with torch.no_grad():
        values = model(
            sequences=torch.cat([prompt_ids, padded], 1).to(DEVICE),
            attention_mask=torch.cat([torch.ones_like(prompt_ids), mask], 1).to(DEVICE),
            response_mask=mask.to(DEVICE),
            features=clips.features.to(DEVICE),
            frames=clips.frames.to(DEVICE),
            clip_index=clips.index.expand(SAMPLES).to(DEVICE),
            logit_bias=bias,
        ).cpu()
    gaps = torch.cat([(values[i, : len(row)] - outputs[i].output_log_probs).abs() for i, row in enumerate(rows)])
    figures = {"gap": gaps.mean().item(), "largest gap": gaps.max().item(), "tokens/s": float(mask.sum()) / seconds}
    return judge(figures, gap=(None, limit))
