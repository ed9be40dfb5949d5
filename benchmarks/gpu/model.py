"""A Qwen2-Audio of 7B's shape with random weights, micro-batches for it, and ways to measure."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import random_model
import torch
from harness import allocated
from random_model import make_config, make_policy

AUDIO, TEXT = 3, 94  # id of the placeholder in the demo's tokenizer; text tokens of a prompt
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
    with DEVICE:
        model = random_model.build_model(make_config(*SIZES[size], AUDIO), dtype)
    return make_policy(model) if patched else model


def make_batch(response: int, prompts: int = 1, clips_a_prompt: int = 1) -> dict[str, torch.Tensor]:
    """See :func:`random_model.make_batch`; on the device, with tokens of the smallest vocabulary."""
    batch = random_model.make_batch(500, TEXT, response, AUDIO, prompts, clips_a_prompt)
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


def matrix_peak(small: bool) -> float:
    """Floating-point operations a second of a matrix product of random values, the best of some."""
    size = 256 if small else 8192
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
