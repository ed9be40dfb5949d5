"""What a rollout engine takes and returns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Sampling:
    """All settings of sampling. The engines ignore the checkpoint's ``generation_config.json``.

    :param n: Responses a prompt.
    :param temperature: 0 is greedy.
    :param top_k: Most likely tokens that are drawn from; -1 for all. Applied before ``top_p``.
    :param max_tokens: Longest response, in tokens.
    :param end_ids: The first of these token ids ends a response; without any, it ends at ``max_tokens``.
    :param logit_bias: Added to the logits of these token ids; -100 forbids a token.
    :param seed: Sample ``i`` of a prompt uses ``seed + i``. None: not reproducible.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    end_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    def with_seed(self, seed: int) -> Sampling:
        """A copy with another seed."""
        return replace(self, seed=seed)


@dataclass
class RolloutOutput:
    """One response.

    :param prompt_token_ids: The prompt as the engine saw it, placeholders expanded.
    :param output_token_ids: Sampled tokens, the token that ended it included.
    :param output_log_probs: Log-probability of each sampled token under the sampling distribution, float32.
    :param truncated: The response ended because it reached the token limit.
    """

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    output_log_probs: torch.Tensor
    truncated: bool


class RolloutEngine(Protocol):
    """A rollout engine living in the training process.

    :ivar complete: Whether it holds all of the trainer's weights: not before the first sync, nor after a sleep that
        dropped them. The next sync must then bring all.
    """

    complete: bool

    def generate(self, prompts: list[Any], sampling: Sequence[Sampling]) -> list[RolloutOutput]:
        """Sample responses.

        :param prompts: Token ids, or ``{"prompt": text, "multi_modal_data": {"audio": [(waveform, rate), ...]}}``.
        :param sampling: One a prompt.
        :return: All samples of the first prompt, then of the second, and so on.
        """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over new weights and drop every cache that depends on the old ones.

        :param weights: Checkpoint name and tensor of every parameter; layers (:func:`layer_of`) that have not changed
            may be left out while the engine is ``complete``.
        """

    def sleep(self) -> None:
        """Free the accelerator's memory; the weights may be lost, see ``complete``."""

    def wake_up(self) -> None:
        """Allocate the accelerator's memory again."""


@contextmanager
def plain_linear() -> Iterator[None]:
    """Put PyTorch's own linear function back while an engine samples.

    DeepSpeed's ``zero.Init`` replaces it for the whole process, vLLM included, by an autograd function in Python, which
    training with sharded weights needs. Sampling does not: its values are the same, but a call takes 48 us instead of 3
    (torch 2.13 on a CPU), and a 7B model makes 200 for each token. Can be deleted when DeepSpeed no longer does that.
    """
    linear, functional.linear = functional.linear, torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = linear


def stable_seed(*parts: int | str) -> int:
    """A seed that depends on its parts alone: not on the process, the machine or the number of ranks.

    :param parts: For instance run seed, step, position of the prompt in the global batch.
    :return: 0 to 2**62.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
