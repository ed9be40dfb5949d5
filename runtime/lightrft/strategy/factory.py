"""Makes the strategy that the flags ask for."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.utils.console import console

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase


def get_strategy(args: Any) -> StrategyBase:
    """Set up the console, the process group, and DeepSpeed or FSDP2.

    :raises SystemExit: if the ranks were given different arguments, or do not share the folder of checkpoints.
    """
    console.rank = int(os.environ.get("RANK", "0"))
    console.quiet, console.verbose = args.quiet, args.verbose
    if console.log_file is None:
        log = Path(args.save_path) / "logs" / f"rank{console.rank}.log"
        if not args.load_checkpoint and log.exists():  # an earlier run's
            log.rename(log.with_stem(f"{log.stem}.{datetime.fromtimestamp(log.stat().st_mtime):%Y%m%d-%H%M%S}"))
        console.redirect(log)
    console.status("importing torch, DeepSpeed and what they need ...")
    # torch and DeepSpeed print while they are imported: import them now that their output goes to the log
    from lightrft.utils import rank_watch

    rank_watch.join()
    from lightrft.utils.distributed import check_same_run

    if args.fsdp:
        from lightrft.strategy.fsdp_strategy import FSDPStrategy as Strategy
    else:
        from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy as Strategy
    strategy = Strategy(args)
    check_same_run(args)
    return strategy
