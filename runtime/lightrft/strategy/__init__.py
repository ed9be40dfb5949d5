"""The strategy: process groups, sharded training, checkpoints and the rollout engine's life."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.utils.console import console

if TYPE_CHECKING:
    from .deepspeed_strategy import DeepspeedStrategy


def get_strategy(args: Any) -> DeepspeedStrategy:
    """Set up the console, the process group and DeepSpeed.

    :param args: The run's arguments.
    :return: The strategy.
    :raises SystemExit: if the ranks were given different arguments, or do not share the folder of checkpoints.
    """
    console.rank = int(os.environ.get("RANK", "0"))
    if not args.verbose and console.log_file is None:
        console.redirect(Path(args.save_path) / "logs" / f"rank{console.rank}.log")
    # torch and DeepSpeed talk while they are imported
    from . import peers

    peers.join()
    from .deepspeed_strategy import DeepspeedStrategy
    from .distributed import check_same_run

    strategy = DeepspeedStrategy(args)
    check_same_run(args)
    return strategy
