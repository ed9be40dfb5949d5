"""What a run writes while it trains: checkpoints for resuming, Hugging Face folders, the best model."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from lightrft.models.actor_al import ActorAL
from lightrft.strategy import checkpoint
from lightrft.strategy.checkpoint import SaveError
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.trainer.evaluation import BestModel
from lightrft.utils.distributed import gather_objects

QUICK_BYTES = 60 * 200e6  # of a model that takes a minute to write at 200 MB/s


@dataclass(frozen=True)
class ResumePoint:
    """Where a run can be resumed: after the last rollout step whose gradients are all in the weights.

    Rollouts after it, whose gradients have only been accumulated, are done again.

    :param prompts: Prompts that the run has used by then. Not a fixed number a step: a resumed run may have another
        ``--rollout_batch_size``.
    :param kl_coef: Weight of the KL after it.
    :param health: State of :class:`~lightrft.trainer.health.Health` after it.
    :param sft: Steps of the warm start that are done.
    """

    step: int
    prompts: int
    kl_coef: float
    health: dict[str, Any]
    sft: int = 0

    @property
    def number(self) -> int:
        """What names the checkpoint: steps of both phases."""
        return self.sft + self.step

    def __str__(self) -> str:
        return f"step {self.step}" if self.step or not self.sft else f"step {self.sft} of the warm start"


class RunSaver:
    """Writes the run's models and checkpoints, all ranks together, and counts what could not be written."""

    def __init__(
        self,
        strategy: StrategyBase,
        actor: ActorAL,
        tokenizer: PreTrainedTokenizerBase,
        save_hf_ckpt: bool,
        disable_ds_ckpt: bool,
        warn: Callable[[str], None],
        start: ResumePoint,
    ) -> None:
        self.strategy, self.args = strategy, strategy.args
        self.actor, self.tokenizer = actor, tokenizer
        self.save_hf_ckpt, self.disable_ds_ckpt = save_hf_ckpt, disable_ds_ckpt
        self.warn = warn
        self.point = start
        # False while the weights differ from the resume point, or may hold NaN: then an error does not save
        self.whole = True
        self.saved = 0  # number of the checkpoint that was loaded or written last
        self.failed = 0
        self.best: BestModel | None = None
        # metrics of the resume point's step while its evaluation, which is due, is not done
        self.unevaluated: dict[str, float] | None = None

    def save(self) -> None:
        """Write a checkpoint and, if asked, a Hugging Face folder.

        :raises SaveError: if that fails, unless ``on_save_error`` is ``warn``.
        """
        try:
            if not self.disable_ds_ckpt:
                self.save_state()
            if self.save_hf_ckpt and self.point.step:  # 0: the first optimizer step takes more rollouts
                self.save_folder(self._hf_folder())
        except SaveError as error:
            self._take_failure(error)

    def keep_best(self, metrics: dict[str, float], step: int) -> None:
        """Keep the model if its evaluation is the best so far, and add ``eval/best`` and ``eval/best_step``.

        :param metrics: The step's; changed in place.
        :raises SaveError: as :meth:`save`.
        """
        if self.best is None:
            return
        try:
            self.best.keep(metrics, step, lambda folder: self.strategy.save_model(self.actor, self.tokenizer, folder))
        except SaveError as error:
            self._take_failure(error)
        if self.best.record is not None:
            metrics |= {"eval/best": self.best.record["value"], "eval/best_step": float(self.best.record["step"])}

    def _take_failure(self, error: SaveError) -> None:
        if self.args.on_save_error == "stop":
            raise error
        self.failed += 1
        self.warn(f"{self.point} could not be saved ({error}); what was saved before is as it was")

    def save_before_exit(self, folder: bool = True) -> str:
        """Write a checkpoint because the run ends early.

        :param folder: Also write a Hugging Face folder, as ``save_hf_on_stop`` says.
        :return: What to tell the user about it.
        """
        if self.point.number == 0:
            return "no step is done yet, so there is nothing to save"
        said = f"{self.point} is the last one that is done"
        try:
            if not self.disable_ds_ckpt:
                self.save_state()
                said += " and saved; the same command with --load_checkpoint goes on from there"
        except SaveError as error:
            return f"{said}, but could not be saved: {error}"
        try:
            if folder and self.point.step and self._writes_folder_on_stop():
                self.save_folder(self._hf_folder())
                said += f"; {self._hf_folder()} is its model"
        except SaveError as error:
            said += f"; {error}"
        return said

    def _writes_folder_on_stop(self) -> bool:
        if self.args.save_hf_on_stop is not None:
            return self.args.save_hf_on_stop
        parameters = self.strategy.unwrap_model(self.actor.model).parameters()
        size = sum(getattr(p, "ds_numel", p.numel()) for p in parameters) * self.strategy.dtype.itemsize
        return size < QUICK_BYTES

    def save_state(self) -> None:
        """Write a checkpoint of the resume point, from which the run goes on exactly, unless it has one.

        The start has none: its weights are ``--pretrain``'s.
        """
        if self.point.number == self.saved:
            return
        kind, keys, *rest = np.random.get_state()
        state = {
            "consumed_samples": self.point.prompts,
            "sft_step": self.point.sft,
            "kl_coef": self.point.kl_coef,
            "health": self.point.health,
            "best": self.best and self.best.record,
            "unevaluated": self.unevaluated,
            "rng": gather_objects((random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state())),
        }
        tag = f"step_{self.point.number:06d}"
        self.strategy.save_ckpt(self.actor.model, str(self._checkpoints()), tag, self.args.max_ckpt_num, state)
        self.saved = self.point.number

    def finish_interrupted_save(self) -> None:
        """Do in a resumed run what is left of a save during which the earlier process was killed."""

        def tidy() -> None:
            checkpoint.clear(self.args.save_path, "hf_step_*")
            checkpoint.rotate(str(self._checkpoints()), self.args.max_ckpt_num)

        self.strategy.together(tidy, self.strategy.is_rank_0())
        step, every = self.point.step, self.args.save_steps
        due = self.save_hf_ckpt and step > 0 and every > 0 and step % every == 0
        # rank 0 alone looks, because it alone writes these folders, and save_path may be a local disk
        if any(gather_objects(self.strategy.is_rank_0() and due and not self._hf_folder().exists())):
            self.save_folder(self._hf_folder())

    def save_folder(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder: whole, or not at all.

        :raises SaveError: if that fails.
        """
        part = folder.with_name(folder.name + checkpoint.PART)
        self.strategy.save_model(self.actor, self.tokenizer, str(part))
        self.strategy.together(lambda: checkpoint.replace_folder(part, folder), self.strategy.is_rank_0())

    def _hf_folder(self) -> Path:
        return Path(self.args.save_path) / f"hf_step_{self.point.step:06d}"

    def _checkpoints(self) -> Path:
        return Path(self.args.ckpt_path) / "_actor"


def restore_random_state(states: list[tuple[Any, Any, torch.Tensor]]) -> None:
    """Set this rank's random generators as a checkpoint has them, if it is from as many ranks.

    The runtime itself draws from none of them; a user's reward function might.
    """
    if len(states) == dist.get_world_size():
        python, numpy_state, torch_state = states[dist.get_rank()]
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
