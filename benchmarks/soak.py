#!/usr/bin/env python3
"""A long run: does memory grow, does a step get slower, do engine and trainer drift apart?

    python benchmarks/soak.py --demo_dir results/demo

Work: 2,000 GRPO steps of the demo's model in one run, vLLM rollouts, 4 prompts x 8 responses, a weight sync each.
Limits: memory (resident, of the process and its children) grows by less than 2 % from steps 200-300 to the last 100;
the last 200 steps take less than 10 % more wall time (median) and CPU time than steps 200-400 of the same run begun
anew; and the largest log-prob gap of any step stays below 1e-3. Ends with status 1 if one is passed.

The run begun anew takes turns with the last steps of the long one, 20 steps each while the other is stopped: other
users of the machine, who make it slower by a third for minutes, slow down both. Memory is judged where it is lowest,
just after the trainer has handed freed pages back: what is in use. The highest is shown beside it: how far the gaps
between what is in use are touched until the next time. Written to ``benchmarks/results/<date>_soak.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES = 4, 8
TURN, COMPARED = 20, 200  # steps
HUNDRED = 100  # steps whose memory is compared: those behind step 200, and the last
MEMORY_LIMIT, TIME_LIMIT, GAP_LIMIT = 0.02, 0.1, 1e-3
SHOWN = ("time/rollout", "time/logprobs", "time/train", "time/sync", "time/step", "rollout/response_length")


def use_of(process: psutil.Process) -> tuple[int, float]:
    """Resident bytes and CPU seconds of a process and its children.

    :param process: The process.
    """
    memory, seconds = 0, 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            memory += each.memory_info().rss
            seconds += sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return memory, seconds


class Run:
    """A training, looked at while it runs.

    :param flags: Its flags.
    :param out: Its folder.
    """

    def __init__(self, flags: list[str], out: Path) -> None:
        script = str(ROOT / "examples" / "r1_aqa" / "train_colocate.py")
        self.metrics, self.log = out / "metrics.jsonl", out / "log"
        with self.log.open("w") as log:
            command = [sys.executable, script, *flags, "--save_path", str(out)]
            self.process = psutil.Popen(command, stdout=log, stderr=log)
        self.memory: list[tuple[int, int]] = []  # the fewest and the most bytes of each step
        self.cpu: list[float] = []  # seconds until the end of each step

    def until(self, step: int, bar: tqdm | None = None) -> None:
        """Look at it until it has made so many steps, or has ended.

        :param step: Steps.
        :param bar: To show it.
        :raises SystemExit: if it fails.
        """
        seen = []
        while len(self.cpu) < step and self.process.poll() is None:
            done = self.metrics.read_text(encoding="utf-8").count("\n") if self.metrics.exists() else 0
            memory, seconds = use_of(self.process)
            seen.append(memory)
            new = done - len(self.cpu)
            if new > 0:
                self.memory += [(min(seen), max(seen))] * new
                self.cpu += [seconds] * new
                seen = [memory]
                if bar is not None:
                    bar.update(new)
            time.sleep(0.05)
        if self.process.poll():
            raise SystemExit(f"the run ended with {self.process.poll()}:\n{self.log.read_text()[-3000:]}")

    def records(self) -> list[dict[str, float]]:
        """Metrics of its steps."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


def take_turns(long: Run, fresh: Run, steps: int, bar: tqdm) -> None:
    """Let a long run make its last steps, and a new one its steps from 200 on, in turns.

    :param long: At :data:`COMPARED` steps before its end, stopped.
    :param fresh: Just begun.
    :param steps: Steps of the long one.
    :param bar: To show those.
    """
    fresh.until(COMPARED)
    for turn in range(TURN, COMPARED + 1, TURN):
        fresh.until(COMPARED + turn)
        fresh.process.suspend()
        long.process.resume()
        long.until(steps - COMPARED + turn, bar)
        if turn < COMPARED:
            long.process.suspend()
            fresh.process.resume()


def in_hundreds(metrics: list[dict[str, float]], name: str) -> list[float]:
    """Medians of a metric over each 100 steps.

    :param metrics: Of each step.
    :param name: The metric.
    """
    return [
        round(statistics.median(record[name] for record in metrics[i : i + 100]), 4)
        for i in range(0, len(metrics), 100)
    ]


def main() -> None:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--steps", type=int, default=2000, help="steps (default: %(default)s; at least 600)")
    args = parser.parse_args()
    if args.steps < 600:
        raise SystemExit(f"--steps {args.steps}: steps 200 to 400 and the last 200 are compared; use 600 or more")
    if not (args.demo_dir / "model").is_dir():
        raise SystemExit(f"{args.demo_dir}/model: no such folder; run make demo first, or give its --demo_dir")
    flags = {
        "pretrain": args.demo_dir / "model",
        "prompt_data": args.demo_dir / "parquet",
        "max_samples": 100 * PROMPTS,  # an episode
        "num_episodes": -(-args.steps // 100),
        "rollout_batch_size": PROMPTS,
        "n_samples_per_prompt": SAMPLES,
        "train_batch_size": PROMPTS * SAMPLES,
        "micro_train_batch_size": PROMPTS * SAMPLES,
        "micro_rollout_batch_size": PROMPTS * SAMPLES,
        "generate_max_len": 16,
        "actor_learning_rate": 1e-4,
        "zero_stage": 2,
    }
    command = ["--use_kl_loss", "--no-report"]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as out, tqdm(total=args.steps, desc="soak", unit="step") as bar:
        folders = Path(out) / "long", Path(out) / "fresh"
        for folder in folders:
            folder.mkdir()
        long, fresh = Run(command, folders[0]), None
        try:
            long.until(args.steps - COMPARED, bar)
            long.process.suspend()
            fresh = Run(command, folders[1])
            take_turns(long, fresh, args.steps, bar)
            long.until(args.steps + 1)  # to its end
            metrics, control = long.records(), fresh.records()
        finally:
            for run in (long, fresh):
                if run is not None and run.process.is_running():
                    run.process.kill()
                    run.process.wait()

    lowest, highest = zip(*long.memory, strict=True)
    seconds, anew = ([record["time/step"] for record in records] for records in (metrics, control))
    begin = slice(COMPARED, COMPARED + HUNDRED)
    first, last = min(lowest[begin]), min(lowest[-HUNDRED:])
    most = max(highest[begin]), max(highest[-HUNDRED:])
    early, late = statistics.median(anew[COMPARED : 2 * COMPARED]), statistics.median(seconds[-COMPARED:])
    cpu_early = (fresh.cpu[2 * COMPARED - 1] - fresh.cpu[COMPARED - 1]) / COMPARED
    cpu_late = (long.cpu[-1] - long.cpu[-COMPARED - 1]) / COMPARED
    gap = max(record["rollout/logprob_gap_max"] for record in metrics)
    growth, drift, wall_drift = last / first - 1, cpu_late / cpu_early - 1, late / early - 1
    result = {
        "steps": len(metrics),
        "torch": version("torch"),
        "cores": psutil.cpu_count(),
        "mebibytes": [round(first / 2**20, 1), round(last / 2**20, 1)],
        "lowest_mebibytes": [round(min(lowest[i : i + 100]) / 2**20, 1) for i in range(0, len(lowest), 100)],
        "highest_mebibytes": [round(max(highest[i : i + 100]) / 2**20, 1) for i in range(0, len(highest), 100)],
        "memory_growth": round(growth, 4),
        "seconds_a_step": [round(early, 3), round(late, 3)],
        "every_100_steps": {name: in_hundreds(metrics, name) for name in SHOWN},
        "cpu_seconds_a_step": [round(cpu_early, 3), round(cpu_late, 3)],
        "cpu_time_drift": round(drift, 4),
        "wall_time_drift": round(wall_drift, 4),
        "largest_logprob_gap": gap,
    }
    path = ROOT / "benchmarks" / "results" / f"{date.today()}_soak.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"steps      {len(metrics)}, {sum(seconds) / 60:.0f} min")
    print(f"memory     {first / 2**20:.0f} -> {last / 2**20:.0f} MiB in use ({growth:+.2%}, limit 2 %)")
    print(f"           {most[0] / 2**20:.0f} -> {most[1] / 2**20:.0f} MiB at most ({most[1] / most[0] - 1:+.2%})")
    print(f"CPU time   {cpu_early:.3f} begun anew, {cpu_late:.3f} s a step at the end ({drift:+.1%}, limit 10 %)")
    print(f"wall time  {early:.3f} begun anew, {late:.3f} s a step at the end ({wall_drift:+.1%}, limit 10 %)")
    print(f"gap        {gap:.1e} at most (limit 1e-3)")
    print(path.relative_to(ROOT))
    raise SystemExit(int(growth >= MEMORY_LIMIT or max(drift, wall_drift) >= TIME_LIMIT or not gap < GAP_LIMIT))


if __name__ == "__main__":
    main()
