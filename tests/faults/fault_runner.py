#!/usr/bin/env python3
"""Run a training script and do something to it at a chosen point. For the tests of test_faults.py.

    python tests/faults/fault_runner.py POINT STEP DEED SCRIPT [ARGUMENTS ...]

POINT names a function of the runtime (see :data:`POINTS`); in step STEP, when it is about to be called or has just
been, the last rank gets the signal DEED; or the result becomes NaN; or, with FULL, no file may grow beyond 100 kB until
the next step.
"""

import functools
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

import lightrft_launcher
from lightrft_launcher import after_import

TRAINER = "lightrft.trainer.spmd_ppo_trainer"
MAKER = "lightrft.trainer.fast_exp_maker"
CHECKPOINT = "lightrft.strategy.checkpoint"
STRATEGY = "lightrft.strategy.strategy_base"
# point: module, owner in it (or none), function, before or after it, which call of it in the step
POINTS = {
    "before the rollout": (STRATEGY, "StrategyBase", "gather_and_generate", "before", 1),
    "after the rollout": (STRATEGY, "StrategyBase", "gather_and_generate", "after", 1),
    "before the rewards": (MAKER, "FastExperienceMaker", "score", "before", 1),
    "first micro-batch": (TRAINER, None, "forward", "before", 1),
    "second micro-batch": (TRAINER, None, "forward", "after", 2),
    "before the sync": (STRATEGY, "StrategyBase", "update_engine_weights", "before", 1),
    "after the sync": (STRATEGY, "StrategyBase", "update_engine_weights", "after", 1),
    "before the metrics": ("lightrft.utils.metrics", "MetricsWriter", "write", "before", 1),
    "after the metrics": ("lightrft.utils.metrics", "MetricsWriter", "write", "after", 1),
    "before a save": (CHECKPOINT, None, "begin", "before", 1),
    "written, not renamed": (CHECKPOINT, None, "commit", "before", 1),
    "while flushing": (CHECKPOINT, None, "_flush", "before", 2),
    "renamed, not rotated": (CHECKPOINT, None, "rotate", "before", 1),
    "while rotating": (CHECKPOINT, None, "_remove", "after", 1),
    "best model written, not renamed": (CHECKPOINT, None, "replace_folder", "before", 1),
    "best model renamed": (CHECKPOINT, None, "replace_folder", "after", 1),
    "model folder half written": (CHECKPOINT, None, "save_file", "after", 1),
}


def main() -> None:
    """Set the trap and run the script."""
    point, step, deed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    script = os.path.abspath(sys.argv[4])
    sys.argv = [script, *sys.argv[5:]]
    sys.path.insert(0, os.path.dirname(script))
    sys.meta_path.insert(0, lightrft_launcher._Hooked())
    module_name, owner_name, function, when, call = POINTS[point]
    seen = {"step": 0, "calls": 0}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def strike(result: Any = None) -> Any:
        if deed == "NAN":
            return result * float("nan")
        if deed == "FULL":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        elif int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), getattr(signal, deed))
        return result

    def count_steps(module: Any) -> None:
        def counting(original: Callable) -> Callable:
            @functools.wraps(original)
            def train_on(self: Any, batch: Any, step: int, waited: float) -> Any:
                seen.update(step=step, calls=0)
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                return original(self, batch, step, waited)

            return train_on

        lightrft_launcher.wrap(module.SPMDPPOTrainerVL, "train_on", counting)

    def trap(module: Any) -> None:
        def trapped(original: Callable) -> Callable:
            @functools.wraps(original)
            def watched(*args: Any, **kwargs: Any) -> Any:
                hit = seen["step"] == step
                seen["calls"] += hit
                hit = hit and seen["calls"] == call
                if hit and when == "before":
                    strike()
                result = original(*args, **kwargs)
                return strike(result) if hit and when == "after" else result

            return watched

        lightrft_launcher.wrap(getattr(module, owner_name) if owner_name else module, function, trapped)

    after_import(module_name)(trap)
    after_import(TRAINER)(count_steps)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
