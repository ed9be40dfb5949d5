#!/usr/bin/env python3
"""How much of the decoding and resampling of audio hides behind the training step.

    python benchmarks/bench_decode.py --demo_dir results/demo

Work: GRPO steps of the demo's model, 16 prompts x 8 responses, vLLM rollouts, a clip of 10 s in stereo at 44.1 kHz for
each prompt, none twice in an episode. Baseline: the same run with batches decoded when the loop asks for them, one clip
after another. Ours: the run as it is, two episodes, the second of which finds the clips in memory. Hidden fraction:
1 - (seconds waited for batches) / (seconds the baseline waited), over all steps of an episode. Runs are interleaved;
figures are medians over the pairs. Limit: 95 %, in both episodes; status 1 if less is hidden. Written to
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
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "r1_aqa"
PROMPTS, SAMPLES = 16, 8
RATE, SECONDS = 44_100, 10
WHEN_ASKED_FOR = f"""
import sys
sys.path.insert(0, {str(EXAMPLE)!r})
import audio_loader, train_colocate
audio_loader.DECODE_THREADS = 1
train_colocate.PrefetchLoader = lambda loader: loader
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


def run(script: list[str], demo: Path, data: Path, episodes: int, cache: int) -> list[dict[str, float]]:
    """Train.

    :param script: Command up to the flags.
    :param demo: The demo's folder.
    :param data: From :func:`make_data`.
    :param episodes: Passes over the data.
    :param cache: ``--audio_cache_mib``.
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
            "audio_cache_mib": cache,
        }
        command = [*script, "--use_kl_loss", *(str(part) for name, v in flags.items() for part in (f"--{name}", v))]
        done = subprocess.run(command, env=os.environ | {"LIGHTRFT_HOME": ""}, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
        return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def waited(steps: list[dict[str, float]]) -> float:
    """Seconds waited for batches.

    :param steps: Metrics of the steps.
    """
    return sum(step["time/data"] for step in steps)


def main() -> None:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=ROOT / "results" / "demo", help="what make demo wrote")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of runs")
    parser.add_argument("--steps", type=int, default=8, help="steps an episode")
    args = parser.parse_args()
    demo, steps = args.demo_dir.resolve(), args.steps
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(demo, Path(folder), PROMPTS * steps)
        for _ in tqdm(range(args.pairs), desc="decode", unit="pair"):
            plain = run([sys.executable, "-c", WHEN_ASKED_FOR], demo, Path(folder), 1, 0)
            ours = run([sys.executable, str(EXAMPLE / "train_colocate.py")], demo, Path(folder), 2, 1024)
            episodes = {"first": ours[:steps], "second": ours[steps:]}
            rounds.append(
                {
                    "decode": waited(plain) / steps,
                    "step": statistics.median(s["time/step"] for s in plain),
                    "first_batch": ours[0]["time/data"],
                }
                | {f"wait_{name}": waited(part) / steps for name, part in episodes.items()}
                | {f"hidden_{name}": 1 - waited(part) / waited(plain) for name, part in episodes.items()}
                | {f"step_{name}": statistics.median(s["time/step"] for s in part) for name, part in episodes.items()}
            )
    median = {name: round(statistics.median(r[name] for r in rounds), 4) for name in rounds[0]}
    least = {name: round(min(r[f"hidden_{name}"] for r in rounds), 4) for name in ("first", "second")}
    print(f"baseline         decodes {median['decode']:.3f} s of a step of {median['step']:.2f} s")
    for name, what in (("first", "first episode"), ("second", "from memory")):
        print(
            f"{what:15}  waits {median[f'wait_{name}']:.4f} s of a step of {median[f'step_{name}']:.2f} s: "
            f"{median[f'hidden_{name}']:.1%} hidden (least of {args.pairs} runs {least[name]:.1%})"
        )
    print(f"first batch of a run: {median['first_batch']:.3f} s")
    result = {"pairs": args.pairs, "steps": steps, "torch": torch.__version__, "threads": torch.get_num_threads()}
    result |= {"cores": os.cpu_count(), "seconds": median, "least_hidden": least}
    out = ROOT / "benchmarks" / "results" / f"{date.today()}_decode.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out.relative_to(ROOT)}")
    raise SystemExit(int(min(median["hidden_first"], median["hidden_second"]) < 0.95))


if __name__ == "__main__":
    main()
