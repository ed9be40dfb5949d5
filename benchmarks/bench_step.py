#!/usr/bin/env python3
"""Seconds a whole GRPO step: this project against R1-AQA's scheme and, where they are installed, ms-swift and LightRFT.

    python benchmarks/bench_step.py --demo_dir results/demo
    python benchmarks/bench_step.py --swift_python /path/to/swift-venv/bin/python --lightrft_home /path/to/LightRFT

Work: the demo's model in float32, 16 prompts x 8 responses of up to 16 tokens, with a reference model, two threads and
the same micro-batch on every side. Each prompt has a clip of its own, 1 to 10 s of the demo's sounds. Ways:

- ``R1-AQA's scheme``: ``r1_aqa_scheme.py``. It ends with a comparison of log-probs, loss and gradient with the
  runtime's on one micro-batch; a difference above 1e-4 ends the benchmark.
- ``runtime, vllm``: ``train_colocate.py`` as a user runs it.
- ``ms-swift, vllm``: ``swift_step.py`` with the interpreter of an environment that has ms-swift 4.6.0 (that file says
  how to make one).
- ``LightRFT, vllm``: ``train_colocate.py`` inside a checkout of LightRFT, commit 49e62cb; without a GPU through
  ``tests/lightrft_launcher.py``. What differs from ``runtime, vllm`` is LightRFT's own trainer and rollout path.

Limits: at least 4 times as fast as R1-AQA's scheme and 5 times as fast as ms-swift with vLLM. Each way is a process of
its own and writes seconds to ``metrics.jsonl``; the first step is left out. The figure is the median over the rounds of
the ratio to ``runtime, vllm``, in seconds and, because other work on the machine lengthens those, in CPU seconds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import soundfile
from harness import EXAMPLE, ROOT, Report, make_parser, parse, ratio, use_of

from demo.make_data import train_rows
from demo.sounds import CLASSES, SAMPLING_RATE, synthesize

WARM_UP = 1  # steps
PHASES = ("rollout", "logprobs", "train", "sync", "step")
PROMPTS, SAMPLES, MAX_NEW_TOKENS = 16, 8, 16
CLIP_SECONDS = 1.0, 10.0
LEARNING = ("rollout/reward", "rollout/response_length", "train/kl", "train/loss", "train/policy_loss")
LIMIT = 1e-4  # of the comparison
OURS, BASELINE, SWIFT, LIGHTRFT = "runtime, vllm", "R1-AQA's scheme", "ms-swift, vllm", "LightRFT, vllm"
LIMITS = {BASELINE: 4.0, SWIFT: 5.0}  # times as fast


class Way(NamedTuple):
    """A command that trains some steps.

    :param script: Words up to the flags.
    :param flags: Flags and values; True for a switch.
    """

    script: list[object]
    flags: dict[str, object]
    environment: dict[str, str] | None = None


def make_questions(folder: Path, count: int, shortest: float, longest: float, seed: int = 0) -> Path:
    """Questions about clips of given lengths, through ``avqa.py`` as a user's.

    :param count: Questions, each with a clip of its own.
    :param shortest: Seconds; lengths are drawn evenly between this and ``longest``.
    :param seed: Of the clips, questions and lengths.
    :return: Folder of the parquet file.
    """
    rng = np.random.default_rng(seed)
    (folder / "audios").mkdir(parents=True)
    clips = []
    for i in range(count):
        label = CLASSES[i % len(CLASSES)]
        samples, wave = round(rng.uniform(shortest, longest) * SAMPLING_RATE), np.empty(0, np.float32)
        while len(wave) < samples:
            wave = np.concatenate([wave, synthesize(label, rng)])
        clips.append((f"clip_{i:05d}.wav", label))
        soundfile.write(folder / "audios" / clips[-1][0], wave[:samples], SAMPLING_RATE, subtype="PCM_16")
    rows = train_rows(clips, count, rng)
    (folder / "train_qa.data").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = ["--input_jsonl", folder / "train_qa.data", "--audio_dir", folder, "--local_save_dir", folder / "parquet"]
    run_script([sys.executable, EXAMPLE / "data_preprocess" / "avqa.py", *source], {})
    return folder / "parquet"


def run_script(command: list[object], environment: dict[str, str], metrics: Path | None = None) -> list[float]:
    """Run a command, and end with its message if it fails.

    :param metrics: The ``metrics.jsonl`` that it writes.
    :return: CPU seconds used when each line of that appeared.
    """
    words, used = [str(word) for word in command], []
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen(words, env=os.environ | environment, stdout=output, stderr=output)
        process = psutil.Process(run.pid)
        while run.poll() is None:
            if metrics is not None and metrics.exists():
                lines = metrics.read_text(encoding="utf-8").count("\n")
                if lines > len(used):
                    used += [use_of(process)[1]] * (lines - len(used))
            time.sleep(0.02)
        if run.returncode != 0:
            output.seek(0)
            raise SystemExit(f"{' '.join(words)} ended with {run.returncode}\n{output.read()[-4000:]}")
    return used


def train(way: Way, threads: int, out: Path) -> list[dict[str, float]]:
    """Train some steps.

    :param threads: OpenMP threads of the process.
    :return: Metrics of each step after the first :data:`WARM_UP`, with ``cpu/step``, its CPU seconds.
    """
    words = [word for name, v in way.flags.items() for word in ((f"--{name}",) if v is True else (f"--{name}", v))]
    # spinning threads slow all ways down beside other work; the runtime sets the same
    environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "3000", "HF_HUB_OFFLINE": "1"}
    command = [*way.script, *words, "--save_path", out]
    used = run_script(command, environment | (way.environment or {}), out / "metrics.jsonl")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for i in range(WARM_UP, min(len(used), len(metrics))):
        metrics[i]["cpu/step"] = used[i] - used[i - 1]
    metrics = metrics[WARM_UP:]
    bad = [m["step"] for m in metrics if not all(math.isfinite(v) for k, v in m.items() if k.startswith("train/"))]
    if bad:
        raise SystemExit(f"{way.script[-1]}: a loss, KL or gradient of steps {bad} is not finite")
    return metrics


def medians(metrics: list[dict[str, float]], names: list[str]) -> dict[str, float]:
    """Median over the steps of each metric that all of them have."""
    return {name: statistics.median(m[name] for m in metrics) for name in names if all(name in m for m in metrics)}


def make_ways(args: argparse.Namespace) -> dict[str, Way]:
    """The ways that the flags ask for."""
    flags: dict[str, object] = {
        "pretrain": (args.demo_dir / "model").resolve(),
        "rollout_batch_size": PROMPTS,
        "n_samples_per_prompt": SAMPLES,
        "micro_train_batch_size": args.micro_batch,
        "generate_max_len": MAX_NEW_TOKENS,
        # small, so that all ways go on sampling from nearly the same policy: responses of the same length
        "actor_learning_rate": 1e-6,
    }
    user = flags | {"train_batch_size": PROMPTS * SAMPLES, "micro_rollout_batch_size": args.micro_batch}
    user |= {"use_kl_loss": True, "no-report": True}
    script = EXAMPLE / "train_colocate.py"
    ways = {
        BASELINE: Way([sys.executable, ROOT / "benchmarks" / "r1_aqa_scheme.py"], flags),
        OURS: Way([sys.executable, script], user),
    }
    if args.swift_python:
        ways[SWIFT] = Way([args.swift_python, ROOT / "benchmarks" / "swift_step.py"], flags | {"vllm": True})
    if args.lightrft_home:
        import torch

        launcher = [] if torch.cuda.is_available() else [ROOT / "tests" / "lightrft_launcher.py"]
        home = {"LIGHTRFT_HOME": str(args.lightrft_home.resolve())}
        ways[LIGHTRFT] = Way([sys.executable, *launcher, script], user, home)
    return ways


def run_rounds(args: argparse.Namespace, ways: dict[str, Way], names: list[str]) -> tuple[dict, dict[str, float]]:
    """Let the ways train in turn.

    :return: Each way's medians by round, and the largest differences between baseline and runtime.
    :raises SystemExit: if those compute different things.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    gaps = dict.fromkeys(("log_probs", "loss", "gradient"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        parquet = make_questions(Path(folder) / "data", PROMPTS * args.steps, *CLIP_SECONDS)
        for round_ in range(args.rounds):
            for number, (name, way) in enumerate(ways.items()):
                out = Path(folder) / f"{round_}_{number}"
                metrics = train(way._replace(flags=way.flags | {"prompt_data": parquet}), args.threads, out)
                runs[name].append(medians(metrics, names))
                if name == BASELINE:
                    check = json.loads((out / "check.json").read_text(encoding="utf-8"))
                    if not all(check[key] < LIMIT for key in gaps):
                        raise SystemExit(f"baseline and runtime compute different things: {check}")
                    gaps = {key: max(gap, check[key]) for key, gap in gaps.items()}
            seconds = {name: round(done[-1]["time/step"], 2) for name, done in runs.items()}
            print(f"round {round_ + 1}/{args.rounds}: {seconds} s a step", flush=True)
    return runs, gaps


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--micro_batch", type=int, default=8, help="responses a forward and backward, a multiple of 8")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of each process")
    parser.add_argument("--steps", type=int, default=5, help="steps a run (default: %(default)s)")
    parser.add_argument("--swift_python", type=Path, help="interpreter of an environment with ms-swift 4.6.0")
    parser.add_argument("--lightrft_home", type=Path, help="checkout of LightRFT, commit 49e62cb")
    args = parse(parser)
    if args.micro_batch % SAMPLES or PROMPTS * SAMPLES % args.micro_batch:
        parser.error(f"--micro_batch {args.micro_batch}: use 8, 16, 32, 64 or 128")
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} is left out; use {WARM_UP + 1} or more")
    report = Report("step", args.rounds)
    names = [*(f"time/{phase}" for phase in PHASES), "cpu/step", *LEARNING]
    runs, gaps = run_rounds(args, make_ways(args), names)
    table = {}
    for name, done in runs.items():
        table[name] = row = {key: round(value, 4) for key, value in medians(done, names).items()}
        for kind in ("time", "cpu"):
            row[f"{kind}/ratio"] = round(ratio(*([m[f"{kind}/step"] for m in way] for way in (done, runs[OURS]))), 2)
        phases = "  ".join(f"{p} {row[f'time/{p}']:.2f}" for p in PHASES if f"time/{p}" in row)
        print(
            f"{name:16}  seconds: {phases}   {row['time/ratio']:.2f} x   CPU seconds: {row['cpu/step']:.2f}   "
            f"{row['cpu/ratio']:.2f} x   reward {row['rollout/reward']:.2f}   "
            f"tokens {row['rollout/response_length']:.1f}"
        )
    for name, row in table.items():
        if name != OURS:
            report.judge(f"step: times as fast as {name}", row["time/ratio"], at_least=LIMITS.get(name))
            report.judge(f"step: the same in CPU seconds, {name}", row["cpu/ratio"])
    report.judge("step: largest difference from R1-AQA's scheme", max(gaps.values()), at_most=LIMIT)
    settings = {key: getattr(args, key) for key in ("micro_batch", "threads", "steps")}
    report.finish(**settings, reference_model=True, largest_differences=gaps, ways=table)


if __name__ == "__main__":
    main()
