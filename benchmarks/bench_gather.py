#!/usr/bin/env python3
"""Whole weights of a sharded model: in buckets, one by one, and all at once.

    python benchmarks/bench_gather.py

Work: a random Qwen2-Audio of 99 M parameters, float32, sharded over two processes by ZeRO-3 and by FSDP2; all weights
gathered and each copied into memory of its own, as for a weight sync. Baseline: one by one. Beside the ratios, the most
memory that a process had meanwhile beyond what it has before and after; on a CPU that includes gloo's own copy of what
it gathers. Rounds are interleaved, figures are medians. Limit: buckets take no longer than one by one, and a bucket of
128 MiB less memory than all at once. Written to ``benchmarks/results/<date>_gather.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_sync import strategy_flags, write_random_model
from harness import Report, forget_peak, peak_bytes, ratio, take_turns

SIZES = (0, 8, 32, 128, 512)  # MiB a bucket; 0: one by one, the last: all at once


def memory_beyond(work: Callable[[], None]) -> int:
    """Bytes that the process had at most, beyond those at the start.

    :param work: To do.
    """
    forget_peak()
    before = peak_bytes()
    work()
    return peak_bytes() - before


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds and memory of each bucket size, of ZeRO-3 and FSDP2. All ranks of a process group call it.

    :param path: Model folder.
    :param rounds: Interleaved rounds.
    :return: Strategy to bucket size to median seconds, ratio to one by one, and MiB in use at most.
    """
    import torch

    from aqa.training import gloo_shutdown
    from lightrft.models.actor_al import load_model
    from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
    from lightrft.strategy.fsdp_strategy import FSDPStrategy

    table: dict[str, Any] = {}
    for label, kind in (("ZeRO-3", DeepspeedStrategy), ("FSDP2", FSDPStrategy)):
        strategy = kind(strategy_flags(zero_stage=3))
        engine, *_ = strategy.prepare_training(load_model(str(path), dtype=torch.float32), 1)
        room = {name: tensor.clone() for name, tensor in strategy.named_weights(engine)}

        def gather(size: int, strategy: Any = strategy, engine: Any = engine, room: Any = room) -> None:
            torch.distributed.barrier()
            strategy.args.sync_bucket_mb = size
            for name, tensor in strategy.named_weights(engine):
                room[name].copy_(tensor)

        ways = {str(size): (lambda size=size, gather=gather: gather(size)) for size in SIZES}
        seconds = {size: [s.wall for s in times] for size, times in take_turns(ways, rounds).items()}
        table[label] = {
            size: {
                "seconds": round(statistics.median(times), 4),
                "ratio": round(ratio(times, seconds["0"]), 3),
                "mebibytes": round(memory_beyond(ways[size]) / 2**20, 1),
            }
            for size, times in seconds.items()
        }
    gloo_shutdown.settle()
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--of_rank", nargs=2, type=Path, help=argparse.SUPPRESS)  # what each of the two processes does
    args = parser.parse_args()
    if args.of_rank:
        table = measure(args.of_rank[0], args.rounds)
        if os.environ["RANK"] == "0":
            args.of_rank[1].write_text(json.dumps(table), encoding="utf-8")
        return
    report = Report("gather", __doc__, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        model, result = Path(folder) / "model", Path(folder) / "table"
        write_random_model(model)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        command += ["--rounds", str(args.rounds), "--of_rank", str(model), str(result)]
        # freed tensors go back to the system at once, so that memory is what is in use
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
        with report.log.open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        table = json.loads(result.read_text(encoding="utf-8"))
    for label, rows in table.items():
        for size, row in rows.items():
            print(
                f"{label:6}  {size:>3} MiB a bucket  {1000 * row['seconds']:8.2f} ms  {row['ratio']:6.3f} x one by one"
                f"  {row['mebibytes']:6.1f} MiB at most"
            )
        report.judge(f"{label}: buckets of 128 MiB, times one by one", rows["128"]["ratio"], at_most=1.0)
        memory = rows["128"]["mebibytes"] / rows["512"]["mebibytes"]
        report.judge(f"{label}: memory of 128 MiB buckets, of all at once", memory, at_most=0.99)
    report.finish(table=table)


if __name__ == "__main__":
    main()
