#!/usr/bin/env python3
"""Seconds from starting a program to what a person waits for: help, a refused configuration, the first step.

    python benchmarks/bench_startup.py --demo_dir results/demo

Each program is run several times with a warm file cache, after one run that does not count; the figure is the median,
with interpreter start and exit. The first step is that of the demo's training (16 prompts x 8 responses; model,
reference model and vLLM), from the start of the process to the step's line. Ends with status 1 if a limit is passed.
Written to ``benchmarks/results/<date>_startup.json``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, Report

EXAMPLE = ROOT / "examples" / "r1_aqa"
TRAIN, EVALUATE = str(EXAMPLE / "train_colocate.py"), str(EXAMPLE / "eval_mmau.py")
FILES = ["--model_path", "m", "--data_file", "nowhere.json", "--out_file", "nowhere.json.out.json"]
HELP_S, REFUSED_S, FIRST_STEP_S = 0.5, 1.0, 25.0  # limits
SHORT = {
    "train --help": (HELP_S, 0, [TRAIN, "--help"]),
    "eval --help": (HELP_S, 0, [EVALUATE, "--help"]),
    "train, wrong batch sizes": (REFUSED_S, 2, [TRAIN, "--rollout_batch_size", "3"]),
    "train, missing folder": (REFUSED_S, 2, [TRAIN, "--pretrain", "./nowhere", "--prompt_data", "./nowhere"]),
    "eval, missing folder": (REFUSED_S, 2, [EVALUATE, *FILES, "--audio_dir", "./nowhere"]),
    "eval, missing questions": (REFUSED_S, 2, [EVALUATE, *FILES, "--audio_dir", "."]),
}


def whole(arguments: list[str], status: int) -> float:
    """Seconds of a program that ends by itself.

    :param arguments: Script and its arguments.
    :param status: Exit status it must have.
    :raises SystemExit: if it has another.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode != status:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return seconds


def first_step(demo: Path) -> float:
    """Seconds from the start of the demo's training to the line of its first step.

    :param demo: The demo's folder: model and parquet.
    :raises SystemExit: if there is none.
    """
    with tempfile.TemporaryDirectory() as out:
        flags = {
            "pretrain": demo / "model",
            "prompt_data": demo / "parquet",
            "save_path": out,
            "max_samples": 16,
            "rollout_batch_size": 16,
            "n_samples_per_prompt": 8,
            "train_batch_size": 128,
            "micro_train_batch_size": 32,
            "micro_rollout_batch_size": 32,
            "generate_max_len": 16,
            "actor_learning_rate": 1e-3,
        }
        command = [sys.executable, TRAIN, "--use_kl_loss"]
        command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        started, seconds, lines = time.perf_counter(), None, []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            for line in run.stdout:
                lines.append(line)
                if seconds is None and line.lstrip().startswith("step "):
                    seconds = time.perf_counter() - started
    if seconds is None or run.returncode != 0:
        raise SystemExit(f"the training ended with {run.returncode}\n{''.join(lines)[-3000:]}")
    return seconds


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program (default: %(default)s)")
    args = parser.parse_args()
    if not (args.demo_dir / "model").is_dir():
        raise SystemExit(f"{args.demo_dir}/model: no such folder; run make demo first, or give its --demo_dir")
    report = Report("startup", __doc__, args.rounds)
    seconds: dict[str, list[float]] = {name: [] for name in (*SHORT, "start to first step")}
    for round_ in range(args.rounds + 1):
        for name, (_, status, arguments) in SHORT.items():
            taken = whole(arguments, status)
            if round_:  # the first warms up
                seconds[name].append(taken)
        taken = first_step(args.demo_dir.resolve())
        if round_:
            seconds["start to first step"].append(taken)
    limits = {name: limit for name, (limit, _, _) in SHORT.items()} | {"start to first step": FIRST_STEP_S}
    for name, times in seconds.items():
        report.judge(f"{name}: seconds", statistics.median(times), at_most=limits[name])
    report.finish(seconds={name: [round(s, 3) for s in times] for name, times in seconds.items()})


if __name__ == "__main__":
    main()
