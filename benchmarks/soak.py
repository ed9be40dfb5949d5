#!/usr/bin/env python3
"""A long run: does memory grow, does a step get slower, do engine and trainer drift apart?

    python benchmarks/soak.py --demo_dir results/demo

Work: 2,000 GRPO steps of the demo's model in one run, vLLM rollouts, 4 prompts x 8 responses, a weight sync each.
Limits: memory (resident, of the process and its children) grows by less than 2 % from steps 200-300 to the last 100;
the last 200 steps take less than 10 % more wall time (median) and CPU time than steps 200-400 of a second, fresh run;
and the largest log-prob gap of any step stays below 1e-3.

Other users can slow the machine down by a third for minutes. So the fresh run alternates with the last steps of the
long one, 20 steps each while the other is stopped, and both are slowed down alike. Of each step's resident memory the
minimum is judged, because freed pages go back to the system only once a step.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from harness import EXAMPLE, Report, make_parser, parse, use_of
from tqdm import tqdm

PROMPTS, SAMPLES = 4, 8
TURN, COMPARED = 20, 200  # steps
HUNDRED = 100  # steps whose memory is compared: those after step 200, and the last
SHOWN = ("time/rollout", "time/logprobs", "time/train", "time/sync", "time/step", "rollout/response_length")


class Run:
    """A training process that is watched while it runs."""

    def __init__(self, flags: list[str], out: Path) -> None:
        script = str(EXAMPLE / "train_colocate.py")
        self.metrics, self.log = out / "metrics.jsonl", out / "log"
        with self.log.open("w") as log:
            command = [sys.executable, script, *flags, "--save_path", str(out)]
            self.process = psutil.Popen(command, stdout=log, stderr=log)
        self.memory: list[tuple[int, int]] = []  # least and most bytes during each step
        self.cpu: list[float] = []  # seconds until the end of each step

    def until(self, step: int, bar: tqdm | None = None) -> None:
        """Watch it until it has made so many steps or has ended; :raises SystemExit: if it failed."""
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
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


def take_turns(long: Run, fresh: Run, steps: int, bar: tqdm) -> None:
    """Let a long run make its last steps, and a fresh one its steps from 200 on, in turns.

    :param long: Stopped, :data:`COMPARED` steps before its end.
    :param steps: Steps of the long run, which ``bar`` counts.
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


def training_flags(demo_dir: Path, steps: int) -> list[str]:
    """Flags of ``train_colocate.py`` for a run of so many steps."""
    flags = {
        "pretrain": demo_dir / "model",
        "prompt_data": demo_dir / "parquet",
        "max_samples": HUNDRED * PROMPTS,  # an episode
        "num_episodes": -(-steps // HUNDRED),
        "rollout_batch_size": PROMPTS,
        "n_samples_per_prompt": SAMPLES,
        "train_batch_size": PROMPTS * SAMPLES,
        "micro_train_batch_size": PROMPTS * SAMPLES,
        "micro_rollout_batch_size": PROMPTS * SAMPLES,
        "generate_max_len": 16,
        "actor_learning_rate": 1e-4,
        "zero_stage": 2,
    }
    words = (str(part) for name, value in flags.items() for part in (f"--{name}", value))
    return ["--use_kl_loss", "--no-report", *words]


def train_both(flags: list[str], steps: int, folder: Path) -> tuple[Run, Run]:
    """Train the long run and, beside its last steps, the fresh one.

    :param folder: Gets a folder of each.
    :return: Long and fresh run, both ended.
    """
    runs: list[Run] = []
    with tqdm(total=steps, desc="soak", unit="step") as bar:
        try:
            for name in ("long", "fresh"):
                (folder / name).mkdir()
                runs.append(Run(flags, folder / name))
                if name == "long":
                    runs[0].until(steps - COMPARED, bar)
                    runs[0].process.suspend()
            long, fresh = runs
            take_turns(long, fresh, steps, bar)
            long.until(steps + 1)  # to its end
        finally:
            for run in runs:
                if run.process.is_running():
                    run.process.kill()
                    run.process.wait()
    return long, fresh


def by_hundreds(values: list[float]) -> list[float]:
    return [round(statistics.median(values[i : i + HUNDRED]), 4) for i in range(0, len(values), HUNDRED)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps (default: %(default)s; at least 600)")
    args = parse(parser)
    if args.steps < 600:
        parser.error(f"--steps {args.steps}: steps 200 to 400 and the last 200 are compared; use 600 or more")
    report = Report("soak", 1)
    with tempfile.TemporaryDirectory() as folder:
        long, fresh = train_both(training_flags(args.demo_dir, args.steps), args.steps, Path(folder))
        metrics, fresh_metrics = long.records(), fresh.records()
    early, late = slice(COMPARED, COMPARED + HUNDRED), slice(-HUNDRED, None)
    lowest, highest = ([step[i] / 2**20 for step in long.memory] for i in (0, 1))
    first, last = min(lowest[early]), min(lowest[late])
    begun = statistics.median(record["time/step"] for record in fresh_metrics[COMPARED : 2 * COMPARED])
    end = statistics.median(record["time/step"] for record in metrics[-COMPARED:])
    cpu_begun = (fresh.cpu[2 * COMPARED - 1] - fresh.cpu[COMPARED - 1]) / COMPARED
    cpu_end = (long.cpu[-1] - long.cpu[-COMPARED - 1]) / COMPARED
    report.say(f"memory {first:.0f} -> {last:.0f} MiB, peak {max(highest[early]):.0f} -> {max(highest[late]):.0f} MiB")
    report.say(f"a step: {begun:.3f} -> {end:.3f} s, {cpu_begun:.3f} -> {cpu_end:.3f} CPU seconds")
    report.judge("soak: growth of memory", last / first - 1, at_most=0.02)
    report.judge("soak: growth of a step's seconds", end / begun - 1, at_most=0.1)
    report.judge("soak: growth of a step's CPU seconds", cpu_end / cpu_begun - 1, at_most=0.1)
    report.judge("soak: largest log-prob gap", max(m["rollout/logprob_gap_max"] for m in metrics), at_most=1e-3)
    report.finish(
        steps=len(metrics),
        mebibytes=[first, last],
        seconds_a_step=[begun, end],
        cpu_seconds_a_step=[cpu_begun, cpu_end],
        every_100_steps={name: by_hundreds([m[name] for m in metrics]) for name in SHOWN}
        | {"lowest_mebibytes": by_hundreds(lowest)},
    )


if __name__ == "__main__":
    main()
