#!/usr/bin/env python3
"""Seconds a GRPO step inside LightRFT against this project's runtime: same model, data, sizes and machine.

    python benchmarks/bench_host.py --lightrft_home /path/to/LightRFT --demo_dir results/demo

Work: 16 prompts x 8 responses of up to 16 tokens, DeepSpeed ZeRO-2 in float32, reference model, vLLM rollouts. Both run
the example's ``train_colocate.py`` with its patches, so with the same forward; what differs is LightRFT's own trainer
and rollout path. Rounds are interleaved; the figure is the median over the rounds of the ratio of the median step
times, the first two steps of each run left out. On the CPU LightRFT runs by ``tests/lightrft_launcher.py``. Written to
``benchmarks/results/<date>_host.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import ROOT, Report, ratio

WARM_UP = 2  # steps
PHASES = ("data", "rollout", "logprobs", "train", "sync", "step")


def run(script: list[str], demo: Path, steps: int, environment: dict[str, str]) -> dict[str, float]:
    """Train some steps.

    :param script: Command up to the flags.
    :param demo: The demo's folder: model and parquet.
    :param steps: Steps.
    :param environment: Added to the environment.
    :return: Median seconds of each phase.
    """
    with tempfile.TemporaryDirectory() as out:
        flags = {
            "pretrain": demo / "model",
            "prompt_data": demo / "parquet",
            "save_path": out,
            "max_samples": 16 * steps,
            "rollout_batch_size": 16,
            "n_samples_per_prompt": 8,
            "train_batch_size": 128,
            "micro_train_batch_size": 32,
            "micro_rollout_batch_size": 32,
            "generate_max_len": 16,
            "actor_learning_rate": 1e-3,
            "zero_stage": 2,
        }
        command = [*script, "--use_kl_loss", "--no-report"]
        command += [str(part) for name, v in flags.items() for part in (f"--{name}", v)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
        return {phase: statistics.median(json.loads(line)[f"time/{phase}"] for line in lines) for phase in PHASES}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightrft_home", required=True, type=Path, help="checkout of LightRFT, commit 49e62cb")
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps a run")
    args = parser.parse_args()
    report = Report("host", __doc__, args.rounds)
    train = str(ROOT / "examples" / "r1_aqa" / "train_colocate.py")
    launcher = [] if torch.cuda.is_available() else [str(ROOT / "tests" / "lightrft_launcher.py")]
    home = {"LIGHTRFT_HOME": str(args.lightrft_home.resolve())}
    ways = {"LightRFT": ([sys.executable, *launcher, train], home), "runtime": ([sys.executable, train], {})}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for round_ in range(args.rounds):
        for name, (script, environment) in ways.items():
            seconds[name].append(run(script, args.demo_dir.resolve(), args.steps, environment))
        print(
            f"round {round_ + 1}/{args.rounds}: {[round(times[-1]['step'], 2) for times in seconds.values()]} s a step"
        )
    table = {
        name: {p: round(statistics.median(t[p] for t in times), 3) for p in PHASES} for name, times in seconds.items()
    }
    for name, times in table.items():
        print(f"{name:9}", *(f"{phase} {times[phase]:6.3f} s" for phase in PHASES), sep="  ")
    steps = {name: [t["step"] for t in times] for name, times in seconds.items()}
    report.judge("a step inside LightRFT, times the runtime's", ratio(steps["LightRFT"], steps["runtime"]))
    report.finish(steps=args.steps, seconds=table)


if __name__ == "__main__":
    main()
