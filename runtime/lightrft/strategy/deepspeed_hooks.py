"""What DeepSpeed does not handle: steps to be left out, full disks, and checkpoints from untrusted sources."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from lightrft.strategy.checkpoint import write_state
from lightrft.strategy.strategy_base import is_usable

# classes in DeepSpeed's checkpoints, beside what torch itself allows
KNOWN = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class StepGuard:
    """Wraps the optimizer's step, so that unusable gradients change neither weights nor moments.

    DeepSpeed skips some steps by itself, applies others with a norm of -1 (ZeRO-2 in bfloat16), and tells neither.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.applied = False  # whether the last step was made
        self._discard = False
        self._inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._step: Callable[..., Any] = self._inner.step
        self._inner.step = self._guarded

    def _guarded(self, *args: Any, **kwargs: Any) -> Any:
        norm = getattr(self.engine.optimizer, "_global_grad_norm", None)
        if self._discard or not (norm is None or is_usable(norm)):
            return None
        self.applied = True
        return self._step(*args, **kwargs)

    def step(self, discard: bool) -> float:
        """DeepSpeed's step at a boundary: the optimizer's too, and the gradients are gone.

        :param discard: Leave the weights unchanged.
        :return: The gradient's norm over all ranks, before clipping; not :func:`is_usable` if it was not finite, and
            then the weights are unchanged.
        """
        norm = None
        if self._inner is self.engine.optimizer:  # plain data parallelism in float32: DeepSpeed keeps no norm
            parameters = self.engine.module.parameters()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._discard, self.applied = discard or not (norm is None or is_usable(norm)), False
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)


class Storage(TorchCheckpointEngine):
    """Writes and reads the files of a checkpoint.

    A failure to write is remembered instead of raised, because the other ranks would wait for this one for ever. Files
    are read by :func:`load_safely`.

    :param engine: DeepSpeed engine, which uses this from now on.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(None)
        self.failure: str | None = None
        self.hashes: dict[Path, str] = {}  # of the files written
        engine.checkpoint_engine = self
        engine._copy_recovery_script = lambda path: None  # it would run code that a checkpoint holds

    def _attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            self.failure = str(error).splitlines()[0]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._attempt(super().makedirs, path, exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self._attempt(lambda: self.hashes.update({Path(path): write_state(state_dict, path)}))

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """As the base class, without running code from the file."""
        return load_safely(path, map_location)


def load_safely(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a file of a checkpoint: tensors, plain values and the classes in :data:`KNOWN`. It runs no code."""
    known = [argparse.Namespace]
    for name in KNOWN:
        module, _, attribute = name.rpartition(".")
        known.append(getattr(importlib.import_module(module), attribute))
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location=map_location, weights_only=True)
