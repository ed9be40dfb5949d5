"""Metrics to a JSON Lines file, wandb and TensorBoard, under the same names.

wandb and TensorBoard are optional, and imported only where a flag asks for them.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightrft.utils.console import console
from lightrft.utils.files import write_atomically


class MetricsWriter:
    """Writes one record a step. Made on rank 0 only.

    A resumed run goes on in the same ``metrics.jsonl`` and the same wandb run; records of steps that it will repeat
    are removed.

    :param args: The run's arguments: ``use_wandb``, ``wandb_*``, ``use_tensorboard``. ``WANDB_MODE`` makes wandb
        offline or disabled.
    :param done: The last step whose record stays; -1: none does.
    """

    def __init__(self, folder: Path, args: Any, done: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        resumed = path.exists()  # also where no step is done: a new run finds an older one's files moved away
        if resumed:
            keep_steps(path, done)
        self._file = path.open("ab", buffering=0)
        self._pending: list[bytes] = []  # records that could not be written yet
        self._wandb = self._tensorboard = None
        if args.use_wandb:
            import wandb

            self._table_steps = args.wandb_table_steps
            # the key comes from WANDB_API_KEY or a login, never from a flag
            run_id = folder / "wandb_run_id.txt"
            known = run_id.read_text().strip() if run_id.exists() else None
            self._wandb = wandb.init(
                id=known,
                resume="allow" if known else None,
                entity=args.wandb_org,
                project=args.wandb_project,
                group=args.wandb_group,
                name=args.wandb_run_name,
                config=vars(args),
                dir=str(folder),
            )
            run_id.write_text(self._wandb.id)
            # wandb's own steps only rise, and it drops what a resumed run makes up for the step before
            self._wandb.define_metric("*", step_metric="step")
        if args.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                log_dir=str(Path(args.use_tensorboard) / args.wandb_run_name), purge_step=done + 1 if resumed else None
            )

    def write(self, step: int, metrics: dict[str, float], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Write the metrics of a step, and every ``wandb_table_steps`` steps its samples as a table to wandb.

        :param metrics: Name to value; a NaN becomes null in the file.
        :param samples: Responses with what they were asked and earned; ``audio_path`` names the clip, if there is one.
        """
        record = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._pending.append((json.dumps(record) + "\n").encode())
        self._flush()
        if self._wandb is not None:
            due = samples and self._table_steps > 0 and step % self._table_steps == 0
            self._wandb.log(metrics | {"step": step} | ({"rollouts": rollout_table(samples)} if due else {}))
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def _flush(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._write_all(b"".join(self._pending))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            if len(self._pending) == 1:
                console.warn(f"metrics.jsonl cannot be written ({error}); tried again at every step")
            return
        self._pending.clear()

    def _write_all(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def rollout_table(samples: Sequence[dict[str, Any]]) -> Any:
    """Responses as a wandb table, a row a response, with a player for the clip."""
    import wandb

    players: dict[str, Any] = {}  # the responses of a group share one
    names = [name for name in samples[0] if name not in ("step", "audio_path", "tags")]
    table = wandb.Table(columns=["audio", *names])
    for sample in samples:
        path = sample.get("audio_path")
        if path and path not in players:
            players[path] = wandb.Audio(path) if Path(path).is_file() else None
        table.add_data(players.get(path), *(sample[name] for name in names))
    return table


def keep_steps(path: Path, last: int) -> None:
    """Drop the records of later steps, and a last line that was being written when the process was killed."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= last:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))
