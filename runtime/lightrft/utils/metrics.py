"""Metrics to a JSON Lines file, wandb and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Writes one record a step. Made on rank 0 only.

    :param folder: ``metrics.jsonl`` is appended to here.
    :param args: The run's arguments: ``use_wandb``, ``wandb_*``, ``use_tensorboard``.
    """

    def __init__(self, folder: Path, args: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._wandb = self._tensorboard = None
        if args.use_wandb:
            import wandb

            # the key comes from WANDB_API_KEY or a login, never from a flag
            self._wandb = wandb.init(
                entity=args.wandb_org,
                project=args.wandb_project,
                group=args.wandb_group,
                name=args.wandb_run_name,
                config=vars(args),
                dir=str(folder),
            )
        if args.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(log_dir=str(Path(args.use_tensorboard) / args.wandb_run_name))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step.

        :param step: Rollout step, from 1.
        :param metrics: Name to value; a NaN becomes null in the file.
        """
        record = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
