"""Interfaces that several layers of the runtime share. For type checkers and readers; nothing checks them at run time.

The rollout engine's is :class:`lightrft.engines.base.RolloutEngine`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn


class Tokenizer(Protocol):
    """What the runtime uses of a transformers tokenizer."""

    pad_token_id: int

    def __call__(self, text: list[str], add_special_tokens: bool) -> Any:
        """Token ids of texts, as ``input_ids``."""

    def batch_decode(self, sequences: Sequence[torch.Tensor], skip_special_tokens: bool) -> list[str]:
        """Texts of token ids."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write the tokenizer's files."""


class Actor(Protocol):
    """A policy or reference model; :class:`lightrft.models.actor_al.ActorAL` is one."""

    model: Any  # a TrainingEngine once the strategy has prepared it, a transformers model before
    modality: Any  # lightrft.models.actor_modality.ActorModality
    temperature: float
    logit_bias: dict[int, float]

    def __call__(
        self, sequences: torch.Tensor, num_actions: int, attention_mask: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """Log-probs of the last ``num_actions`` tokens, ``(batch, num_actions)`` float32, 0 at padding."""

    def train(self, mode: bool = True) -> Any:
        """As in :class:`torch.nn.Module`."""


class TrainingEngine(Protocol):
    """A sharded model with its optimizer: the engine of DeepSpeed or ``strategy.fsdp_strategy``."""

    module: nn.Module
    optimizer: Any

    def backward(self, loss: torch.Tensor) -> Any:
        """Add the gradients of a micro-batch, divided by the micro-batches of an optimizer step."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the optimizer steps after the present micro-batch."""

    def step(self) -> Any:
        """End a micro-batch."""


class StepGuard(Protocol):
    """Makes optimizer steps, and leaves them out where the gradient cannot be used."""

    applied: bool  # whether the last step changed the weights

    def step(self, discard: bool) -> float:
        """Step at an accumulation boundary; the gradients are gone afterwards.

        :param discard: Change neither weights nor moments.
        :return: The gradient's norm over all ranks before clipping. If it is not finite, the step is left out.
        """


class Strategy(Protocol):
    """What trainer and data loading use of :class:`lightrft.strategy.strategy_base.StrategyBase`; described there."""

    args: Namespace
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    inference_engine: Any  # a lightrft.engines.base.RolloutEngine

    def print(self, *parts: object) -> None: ...
    def is_rank_0(self) -> bool: ...
    def step_guard(self, engine: TrainingEngine) -> StepGuard: ...
    def unwrap_model(self, model: nn.Module) -> nn.Module: ...
    def offload_model(self, model: Any) -> None: ...
    def reload_model(self, model: Any) -> None: ...
    def gather_and_generate(self, sampling_params: Sequence[Any], **inputs: Any) -> list[Any]: ...
    def update_engine_weights(self, actor: Actor) -> None: ...
    def named_weights(self, model: Any, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]: ...
    def save_model(self, model: Actor, tokenizer: Tokenizer, output_dir: str) -> None: ...
    def save_ckpt(
        self, model: TrainingEngine, save_dir: str, tag: str, max_num: int = 3, client_state: dict | None = None
    ) -> None: ...
    def together(self, action: Callable[[], None], mine: bool = True) -> None: ...
