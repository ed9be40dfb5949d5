"""The strategy: process groups, sharded training, checkpoints and the rollout engine's life."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.utils.console import console

if TYPE_CHECKING:
    console.status("importing torch, DeepSpeed and what they need ...")
    from .deepspeed_strategy import DeepspeedStrategy


def get_strategy(args: Any) -> DeepspeedStrategy:
    """Set up the console, the process group and DeepSpeed.

    :param args: The run's arguments.
    :return: The strategy.
    """
    console.rank = int(os.environ.get("RANK", "0"))
    console.quiet, console.verbose = args.quiet, args.verbose
    if console.log_file is None:
        console.redirect(Path(args.save_path) / "logs" / f"rank{console.rank}.log")
    console.status("importing torch, DeepSpeed and what they need ...")
    from .deepspeed_strategy import DeepspeedStrategy  # torch and DeepSpeed talk while they are imported

    return DeepspeedStrategy(args)
