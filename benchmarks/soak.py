#!/usr/bin/env python3
"""A long run: does memory grow, does a step get slower, do engine and trainer drift apart?

    python benchmarks/soak.py --demo_dir results/demo

Work: 2,000 GRPO steps of the demo's model in one run, vLLM rollouts, 4 prompts x 8 responses, a weight sync each.
Limits: memory (resident, of the process and its children) grows by less than 2 % from steps 200-300 to the last 100,
a step takes less than 10 % more wall time (median) and CPU time from steps 200-400 to the last 200, and the largest
log-prob gap of any step stays below 1e-3. Ends with status 1 if one is passed.

Times are judged against a fixed calculation, timed beside the run every second: other users of the machine slow down
both. Memory is judged where it is lowest, just after the trainer has handed freed pages back: what is in use. The
highest is shown beside it: how far the gaps between what is in use are touched until the next time. Written to
``benchmarks/results/<date>_soak.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES = 4, 8
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


def machine_speed(matrix: torch.Tensor) -> float:
    """CPU seconds of a fixed calculation on one thread, about a hundredth of one.

    :param matrix: What is calculated with.
    """
    started = time.thread_time()
    for _ in range(4):
        matrix @ matrix
    return time.thread_time() - started


def watch(
    command: list[str], metrics: Path, steps: int
) -> tuple[list[tuple[int, int, float, float]], list[dict[str, float]]]:
    """Run a training and look at what it uses at every step.

    :param command: The training.
    :param metrics: Its ``metrics.jsonl``.
    :param steps: Steps it will take.
    :return: Of each step the fewest and the most bytes, the CPU seconds so far, and the last :func:`machine_speed`;
        and its metrics.
    :raises SystemExit: if it fails.
    """
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output)
        process, used, seen = psutil.Process(run.pid), [], []
        matrix, speed, timed = torch.ones(400, 400), 0.0, 0.0
        with tqdm(total=steps, desc="soak", unit="step") as bar:
            while run.poll() is None:
                done = metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0
                memory, seconds = use_of(process)
                seen.append(memory)
                if time.monotonic() > timed + 1:
                    speed, timed = machine_speed(matrix), time.monotonic()
                if done > len(used):
                    used += [(min(seen), max(seen), seconds, speed)] * (done - len(used))
                    seen = [memory]
                    bar.update(done - bar.n)
                time.sleep(0.05)
        if run.returncode != 0:
            output.seek(0)
            raise SystemExit(f"the run ended with {run.returncode}:\n{output.read()[-3000:]}")
    return used, [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


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
        raise SystemExit(f"--steps {args.steps}: the first 400 and the last 200 are compared; use 600 or more")
    if not (args.demo_dir / "model").is_dir():
        raise SystemExit(f"{args.demo_dir}/model: no such folder; run make demo first, or give its --demo_dir")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here; the run has its own
    with tempfile.TemporaryDirectory() as out:
        rows = 100 * PROMPTS  # an episode
        flags = {
            "pretrain": args.demo_dir / "model",
            "prompt_data": args.demo_dir / "parquet",
            "save_path": out,
            "max_samples": rows,
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
        script = str(ROOT / "examples" / "r1_aqa" / "train_colocate.py")
        command = [sys.executable, script, "--use_kl_loss", "--no-report"]
        command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        used, metrics = watch(command, Path(out) / "metrics.jsonl", args.steps)

    lowest, highest, cpu, speed = zip(*used, strict=True)
    seconds = [record["time/step"] for record in metrics]
    first, last = min(lowest[200:300]), min(lowest[-100:])
    most = max(highest[200:300]), max(highest[-100:])
    early, late = statistics.median(seconds[200:400]), statistics.median(seconds[-200:])
    cpu_early, cpu_late = (cpu[399] - cpu[199]) / 200, (cpu[-1] - cpu[-201]) / 200
    gap = max(record["rollout/logprob_gap_max"] for record in metrics)
    machine = statistics.median(speed[-200:]) / statistics.median(speed[200:400])
    growth, drift, wall_drift = last / first - 1, cpu_late / cpu_early / machine - 1, late / early / machine - 1
    result = {
        "steps": len(metrics),
        "torch": torch.__version__,
        "threads": threads,
        "mebibytes": [round(first / 2**20, 1), round(last / 2**20, 1)],
        "lowest_mebibytes": [round(min(lowest[i : i + 100]) / 2**20, 1) for i in range(0, len(lowest), 100)],
        "highest_mebibytes": [round(max(highest[i : i + 100]) / 2**20, 1) for i in range(0, len(highest), 100)],
        "memory_growth": round(growth, 4),
        "seconds_a_step": [round(early, 3), round(late, 3)],
        "every_100_steps": {name: in_hundreds(metrics, name) for name in SHOWN},
        "cpu_seconds_a_step": [round(cpu_early, 3), round(cpu_late, 3)],
        "machine_drift": round(machine - 1, 4),
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
    print(f"machine    {machine - 1:+.1%} time for a fixed calculation; what follows is beside that")
    print(f"CPU time   {cpu_early:.3f} -> {cpu_late:.3f} s a step ({drift:+.1%}, limit 10 %)")
    print(f"wall time  {early:.3f} -> {late:.3f} s a step ({wall_drift:+.1%}, limit 10 %)")
    print(f"gap        {gap:.1e} at most (limit 1e-3)")
    print(path.relative_to(ROOT))
    raise SystemExit(int(growth >= 0.02 or max(drift, wall_drift) >= 0.1 or not gap < 1e-3))


if __name__ == "__main__":
    main()
