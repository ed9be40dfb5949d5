"""What a rollout engine takes and returns."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

_ADAPTED = re.compile(r"\.(?:base_layer|lora_[AB]\.default)(?=\.)")  # what peft puts into a name


@dataclass(frozen=True)
class Sampling:
    """How to sample, the same for every engine.

    :param n: Responses a prompt.
    :param temperature: 0 is greedy.
    :param top_p: Nucleus mass.
    :param top_k: Candidates; -1 for all.
    :param max_tokens: Longest response, in tokens.
    :param logit_bias: Added to the logits of these token ids; -100 forbids a token.
    :param seed: Sample ``i`` of a prompt uses ``seed + i``. None: not reproducible.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    def with_seed(self, seed: int) -> Sampling:
        """A copy with another seed.

        :param seed: See the class.
        """
        return replace(self, seed=seed)


@dataclass
class RolloutOutput:
    """One response.

    :param prompt_token_ids: The prompt as the engine saw it, placeholders expanded.
    :param output_token_ids: Sampled tokens, the end-of-turn token included if it was sampled.
    :param output_log_probs: Log-probability of each sampled token under the sampling distribution, float32.
    :param truncated: The response ended because it reached the token limit.
    """

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    output_log_probs: torch.Tensor
    truncated: bool


class RolloutEngine(Protocol):
    """A rollout engine living in the training process."""

    def generate(self, prompts: list[Any], sampling: Sequence[Sampling]) -> list[RolloutOutput]:
        """Sample responses.

        :param prompts: Token ids, or ``{"prompt": text, "multi_modal_data": {"audio": [(waveform, rate), ...]}}``.
        :param sampling: One a prompt.
        :return: All samples of the first prompt, then of the second, and so on.
        """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over new weights and drop every cache that depends on the old ones.

        :param weights: Checkpoint name and tensor, at first of every parameter; later layers (:func:`layer_of`) that
            have not changed may be left out.
        """

    def sleep(self) -> None:
        """Give the accelerator's memory back."""

    def wake_up(self) -> None:
        """Take the memory again."""


def stable_seed(*parts: int | str) -> int:
    """A seed that depends on its parts alone: not on the process, the machine or the number of ranks.

    :param parts: For instance run seed, step, position of the prompt in the global batch.
    :return: 0 to 2**62.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def checkpoint_name(name: str) -> str:
    """Name of a Qwen2-Audio parameter in a checkpoint, which is also what vLLM loads.

    :param name: Name in the live module. transformers 5 has ``model.language_model.*``, ``lm_head.*``,
        ``model.audio_tower.*`` and ``model.multi_modal_projector.*``; a name that is a checkpoint name already stays.
    :return: ``language_model.model.*``, ``language_model.lm_head.*``, ``audio_tower.*`` or
        ``multi_modal_projector.*``.
    """
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name.startswith("lm_head."):
        return "language_model." + name
    return name.removeprefix("model.")


def plain_name(name: str) -> str:
    """Name of the parameter that an adapted layer's parameter belongs to; any other name stays.

    :param name: Parameter name, live.
    """
    return _ADAPTED.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's.

    :param name: Parameter name, live.
    """
    return ".lora_" in name


def layer_of(name: str) -> str:
    """The layer that a parameter is loaded with: all of it is sent to an engine, or nothing.

    :param name: Parameter name, live or of a checkpoint.
    :return: The module that owns it; for a projection the block around it, because engines fuse projections of a block
        (q, k and v; gate and up) into one layer.
    """
    module = name.rpartition(".")[0]
    block, _, leaf = module.rpartition(".")
    return block if leaf.endswith("_proj") else module


def checksum(tensor: torch.Tensor) -> int:
    """Sum of a tensor's memory as 64-bit words, modulo 2**64: any one bit that differs changes it.

    Exact, so that neither the order of summation nor the size of an update matters, and quick: one pass, no copy.

    :param tensor: Any tensor. If it fills whole words, its checksum is the sum of those of parts that do, too.
    """
    octets = tensor.detach().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # torch views words at whole words only
    whole = len(octets) // 8 * 8
    words = octets[:whole].view(torch.int64).sum().item()
    return (words + int.from_bytes(bytes(octets[whole:].tolist()), "little")) % 2**64
