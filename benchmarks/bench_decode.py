#!/usr/bin/env python3
"""How much of the decoding and resampling of audio hides behind the training step.

    python benchmarks/bench_decode.py --demo_dir results/demo

Work: GRPO steps of the demo's model, 16 prompts x 8 responses, vLLM rollouts, a clip of 10 s in stereo at 44.1 kHz for
each prompt. Episodes of one run take turns: clips decoded ahead, clips found in memory, and, as baseline, clips decoded
when the loop asks for a batch, one after another. Hidden fraction: 1 - (seconds waited for batches) / (seconds that the
baseline waited), over the steps of an episode but its first, whose batch nothing is in front of; what that one costs is
printed too. Figures are medians over the rounds. Limit: 95 %; status 1 if less is hidden. Written to
``benchmarks/results/<date>_decode.json``.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from harness import ROOT, Report

EXAMPLE = ROOT / "examples" / "r1_aqa"
PROMPTS, SAMPLES = 16, 8
RATE, SECONDS = 44_100, 10
WAYS = ("ahead", "memory", "baseline")
LIMIT = 0.95
TAKING_TURNS = f"""
import sys
sys.path.insert(0, {str(EXAMPLE)!r})
import train_colocate
from audio_loader import DECODE_THREADS, PrefetchLoader

class TakingTurns(PrefetchLoader):
    episodes = 0

    def __iter__(self):
        import audio_dataset
        way = {WAYS!r}[self.episodes % {len(WAYS)}]
        clips = self.dataset.clips
        if self.episodes and way != "memory":
            clips.__init__(clips.load, clips.limit)
        self.episodes += 1
        audio_dataset.DECODE_THREADS = 1 if way == "baseline" else DECODE_THREADS
        yield from self.loader if way == "baseline" else super().__iter__()

train_colocate.PrefetchLoader = TakingTurns
train_colocate.main()
"""


def make_data(demo: Path, folder: Path, rows: int) -> None:
    """Rows of the demo with clips of their own.

    :param demo: The demo's folder.
    :param folder: Gets ``train.parquet`` and the clips.
    :param rows: Rows.
    """
    rng = np.random.default_rng(0)
    there = pq.read_table(demo / "parquet" / "train.parquet").to_pylist()
    made = []
    for i in range(rows):
        path = str(folder / f"{i}.wav")
        sound = rng.uniform(-0.5, 0.5, (SECONDS * RATE, 2)).astype(np.float32)
        soundfile.write(path, sound, RATE, subtype="PCM_16")
        row = there[i % len(there)]
        prompt = [
            {**m, "content": [part | ({"audio_url": path} if part["type"] == "audio" else {}) for part in m["content"]]}
            for m in row["prompt"]
        ]
        made.append(row | {"audio_path": path, "prompt": prompt})
    pq.write_table(pa.Table.from_pylist(made), folder / "train.parquet")


def run(demo: Path, data: Path, episodes: int) -> list[dict[str, float]]:
    """Train.

    :param demo: The demo's folder.
    :param data: From :func:`make_data`.
    :param episodes: Passes over the data.
    :return: Metrics of each step.
    """
    with tempfile.TemporaryDirectory() as out:
        flags = {
            "pretrain": demo / "model",
            "prompt_data": data,
            "save_path": out,
            "num_episodes": episodes,
            "rollout_batch_size": PROMPTS,
            "n_samples_per_prompt": SAMPLES,
            "train_batch_size": PROMPTS * SAMPLES,
            "micro_train_batch_size": 32,
            "micro_rollout_batch_size": 32,
            "generate_max_len": 16,
            "actor_learning_rate": 1e-4,
            "zero_stage": 2,
        }
        command = [sys.executable, "-c", TAKING_TURNS, "--use_kl_loss"]
        command += [str(part) for name, v in flags.items() for part in (f"--{name}", v)]
        done = subprocess.run(command, env=os.environ | {"LIGHTRFT_HOME": ""}, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"the training ended with {done.returncode}\n{done.stderr[-3000:]}")
        return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of three episodes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps an episode")
    args = parser.parse_args()
    report = Report("decode", __doc__, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        make_data(args.demo_dir.resolve(), Path(folder), PROMPTS * args.steps)
        steps = run(args.demo_dir.resolve(), Path(folder), len(WAYS) * args.rounds)
    rounds = []
    for start in range(0, len(steps), len(WAYS) * args.steps):
        times: dict[str, float] = {}
        for number, way in enumerate(WAYS):
            first, *rest = steps[start + number * args.steps :][: args.steps]
            times |= {
                f"{way}_first_wait": first["time/data"],
                f"{way}_wait": statistics.mean(step["time/data"] for step in rest),
                f"{way}_step": statistics.median(step["time/step"] for step in rest),
            }
        rounds.append(times | {f"{way}_hidden": 1 - times[f"{way}_wait"] / times["baseline_wait"] for way in WAYS[:2]})
    median = {name: round(statistics.median(r[name] for r in rounds), 4) for name in rounds[0]}
    for way in reversed(WAYS):
        hidden = f": {median[f'{way}_hidden']:.1%} hidden" if way != "baseline" else ""
        print(f"{way:8}  waits {median[f'{way}_wait']:.4f} s of a step of {median[f'{way}_step']:.2f} s{hidden}")
    start = steps[0]["time/data"]
    print(f"the first batch of a run: {start:.4f} s, of an episode not in memory: {median['ahead_first_wait']:.3f} s")
    report.judge("decoding ahead: share hidden", median["ahead_hidden"], at_least=LIMIT)
    report.judge("decoded clips in memory: share hidden", median["memory_hidden"], at_least=LIMIT)
    all_ = [{name: round(value, 4) for name, value in times.items()} for times in rounds]
    report.finish(steps=args.steps, first_wait_of_the_run=round(start, 4), median=median, all=all_)


if __name__ == "__main__":
    main()
