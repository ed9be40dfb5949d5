#!/usr/bin/env python3
"""What each method is worth on sound: the same model, data, steps and seeds for all, one table and one picture.

    python benchmarks/methods.py                        # synthetic sounds made harder, 11 methods x 3 seeds
    python benchmarks/methods.py --data real            # real recordings and Whisper's tower
    python benchmarks/methods.py --methods recipe gdpo --seeds 0 --steps 2    # to try it

Harder means: another sound plays under every clip, half of the training questions give their answer away, and the start
model can read it there but knows nothing of sounds (select_rows.py). Held-out questions give nothing away. A cell that
is finished is not made again; all of them take an hour and a half on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import select_rows
import soundfile
from harness import make_parser
from scipy.stats import t as student

from aqa.common.files import write_atomically
from demo import run_demo
from demo.sounds import CLASSES, synthesize

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Cells = dict[str, list[dict[str, float]]]  # by method, one a seed
GAIN = ("--reward", "accuracy+format+audio_gain", "--reward_weights", "1", "1", "0.5")
# flags of train_colocate.py; {n} stands for a quarter of the steps, {rest} for three quarters of them, {longer} for 1.8
# times as many, {half} for half of an optimizer step's responses
METHODS = {
    "recipe": (),
    "gdpo": ("--advantage_estimator", "gdpo"),
    "dr_grpo": ("--advantage_estimator", "dr_grpo", "--loss_agg_mode", "seq-mean-token-sum-norm"),
    "audio_gain": GAIN,
    "audio_gain-gdpo": (*GAIN, "--advantage_estimator", "gdpo"),
    "token_weights": ("--audio_token_weights", "0.7"),
    "warm_start": ("--sft_steps", "{n}", "--max_steps", "{rest}"),
    "longer": ("--max_steps", "{longer}"),
    "dynamic_sampling": ("--dynamic_sampling",),
    "two_steps": ("--train_batch_size", "{half}"),
    "cispo": ("--use_cispo", "--eps_clip_high", "4", "--train_batch_size", "{half}"),
}
# what takes the recipe's place beside a method that takes more seconds, or two steps a rollout
CONTROLS = {"dynamic_sampling": "longer", "cispo": "two_steps"}
GOOD, TRAILING = 0.8, 5  # "steps to 0.8": of the rollouts' accuracy, averaged over the last steps
COLUMNS = {
    "accuracy": "held-out accuracy",
    "silent": "in silence",
    "reordered": "options reordered",
    "steps": f"steps to {GOOD}",
    "seconds": "seconds a step",
}
UNDER_DB = -6.0  # level of the sound that plays under a clip


def main() -> None:
    """Fill the cells that are missing, and write table and picture after each."""
    parser = make_parser(__doc__, demo=False)
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic", help="sounds of the demo")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of model, data and training")
    parser.add_argument("--steps", type=int, default=120, help="rollouts of the recipe (default: %(default)s)")
    parser.add_argument("--out_dir", type=Path, default=Path("results/methods"), help="everything goes here")
    parser.add_argument("--downloads", type=Path, default=Path("results/downloads"), help="as run_demo.py's")
    args = parser.parse_args()
    out = args.out_dir.resolve() / f"{args.data}-{args.steps}"
    harder = run_demo.SYNTHETIC._replace(sounds="synthetic sounds, two at once, half the training answers given away")
    setting = (run_demo.REAL if args.data == "real" else harder)._replace(steps=args.steps)
    cells: Cells = {}
    for seed in args.seeds:
        folder = out / f"seed-{seed}"
        assets = prepare(folder, args, setting, seed)
        for method in args.methods:
            cells.setdefault(method, []).append(measure(folder / method, assets, method, setting, seed))
            write(out, cells, args.seeds, setting)
    print((out / "methods.md").read_text(encoding="utf-8"))


def prepare(folder: Path, args: argparse.Namespace, setting: run_demo.Setting, seed: int) -> dict[str, Path]:
    """Model, data and parquet of a seed, made by the demo's scripts; synthetic data are made harder."""
    wanted = argparse.Namespace(real=args.data == "real", tower="whisper", family="qwen2_audio", seed=seed)
    wanted.downloads = args.downloads
    run_demo.make_assets(folder, wanted, setting.steps * setting.prompts)
    if args.data == "real":
        return {name: folder / name for name in ("model", "data", "parquet")}
    hard = folder / "hard"
    if not (hard / "data").is_dir():
        overlay(folder / "data", hard / "data", seed)
    select_rows.write_questions(hard, hard)
    select_rows.make_start_model(folder, hard / "start")
    return {"model": hard / "start", "data": hard / "data", "parquet": hard / "rows"}


def overlay(data: Path, hard: Path, seed: int) -> None:
    """Lay another sound under every clip, held-out ones too.

    :param hard: Folder to write; it appears once it is whole.
    """
    part = hard.with_name("data.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(data, part)
    rng = np.random.default_rng([seed, 2])
    for path in sorted((*part.glob("audios/*.wav"), *part.glob("test-audios/*.wav"))):
        wave, rate = soundfile.read(path, always_2d=True)
        under = np.resize(synthesize(str(rng.choice(CLASSES)), rng, rate), len(wave))[:, None]
        mixed = wave + under * 10 ** (UNDER_DB / 20) * np.abs(wave).max() / np.abs(under).max()
        soundfile.write(path, mixed / max(1.0, np.abs(mixed).max()), rate, subtype="PCM_16")
    part.rename(hard)


def measure(cell: Path, assets: dict[str, Path], method: str, setting: run_demo.Setting, seed: int) -> dict[str, float]:
    """Train, then ask the held-out questions with sound, in silence and with their options in other orders."""
    result = cell / "cell.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    print(f"== {method}, seed {seed}", flush=True)
    cell.mkdir(exist_ok=True)
    for name, made in assets.items():
        if not (cell / name).exists():
            (cell / name).symlink_to(made)
    quarter = max(1, setting.steps // 4)
    numbers = {"n": quarter, "rest": setting.steps - quarter, "longer": setting.steps * 9 // 5}
    of_step = dict(zip(setting.flags, setting.flags[1:], strict=False)).get("--train_batch_size")
    numbers["half"] = int(of_step or setting.prompts * setting.samples) // 2
    run_demo.train(cell, seed, setting, [flag.format(**numbers) for flag in METHODS[method]])
    again = ("--silent_audio", "also", "--option_orders", setting.options)
    accuracy = run_demo.evaluate(cell, cell / "run", "after", *again)
    score = json.loads((cell / "result_after.score.json").read_text(encoding="utf-8"))
    lines = (cell / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] > 0]
    training = [record["rollout/accuracy_reward"] for record in records]
    trailing = [statistics.mean(training[max(0, i + 1 - TRAILING) : i + 1]) for i in range(len(training))]
    found = {
        "accuracy": accuracy,
        "silent": score["accuracy_in_silence"],
        "reordered": score["option_orders"]["mean"],
        "steps": next((i + 1 for i, value in enumerate(trailing) if value >= GOOD), float("nan")),
        "seconds": statistics.median(record["time/step"] for record in records),
    }
    write_atomically(result, json.dumps(found) + "\n")
    return found


def write(out: Path, cells: Cells, seeds: list[int], setting: run_demo.Setting) -> None:
    """Write ``methods.json``, ``methods.md`` and ``methods.png`` of the cells so far."""
    write_atomically(out / "methods.json", json.dumps({"seeds": seeds, "cells": cells}, indent=1) + "\n")
    size = f"{setting.steps} steps of {setting.prompts} x {setting.samples} responses"
    head = f"{setting.sounds}, {size}, chance {1 / setting.options:.2f}; mean ± standard deviation over seeds {seeds}"
    lines = [head, "", f"| method | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, row in cells.items():
        lines.append(f"| {method} | " + " | ".join(describe([cell[name] for cell in row]) for name in COLUMNS) + " |")
    write_atomically(out / "methods.md", "\n".join([*lines, "", recommend(cells)]) + "\n")
    draw(out / "methods.png", cells, setting)


def describe(values: list[float]) -> str:
    """Mean and standard deviation of the seeds that reached a value, and how many did if not all."""
    there = [value for value in values if value == value]
    spread = f" ± {statistics.stdev(there):.3g}" if len(there) > 1 else ""
    missed = f" ({len(there)} of {len(values)} seeds)" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.3g}{spread}{missed}" if there else "not reached"


def recommend(cells: Cells) -> str:
    """Two sentences: what was better or worse than the recipe or its control, by Student's t test at 5 %."""
    accuracies = {method: [cell["accuracy"] for cell in row] for method, row in cells.items()}
    if len(accuracies.get("recipe", ())) < 2:
        return "No recommendation: it takes the recipe, and two seeds."
    better, worse = [], []
    for method, ours in accuracies.items():
        control = CONTROLS.get(method, "recipe")
        control = control if control in accuracies else "recipe"
        gains = [a - b for a, b in zip(ours, accuracies[control], strict=False)]
        if method == control or len(gains) < 2:
            continue
        mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
        if abs(mean) > max(student.ppf(0.975, len(gains) - 1) * error, 0.01):  # 4.3 errors with 3 seeds
            (better if mean > 0 else worse).append(f"{method} ({mean:+.3f} ± {error:.3f} beside {control})")
    first = f"Switch on {' or '.join(better)}" if better else "Keep R1-AQA's recipe: no method adds to it"
    second = f"Leave out {', '.join(worse)}" if worse else "None takes away from it"
    return f"{first}, beyond the spread of the seeds. {second} in these {len(accuracies['recipe'])} seeds."


def draw(path: Path, cells: Cells, setting: run_demo.Setting) -> None:
    """Accuracy of each method with sound, with options reordered and in silence; a dot a seed."""
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(cells) + 1.4), layout="constrained")
    for offset, (name, colour) in enumerate((("accuracy", "#2a8a4a"), ("reordered", "#1f5fa8"), ("silent", "#c0392b"))):
        values = [[cell[name] for cell in row] for row in cells.values()]
        places = [place + 0.25 * (offset - 1) for place in range(len(cells))]
        axes.barh(places, list(map(statistics.mean, values)), 0.22, color=colour, alpha=0.5, label=COLUMNS[name])
        for place, seeds in zip(places, values, strict=True):
            axes.plot(seeds, [place] * len(seeds), ".", color=colour)
    axes.axvline(1 / setting.options, color="#bbbbbb", linestyle=":")
    axes.set(yticks=range(len(cells)), yticklabels=list(cells), xlim=(0, 1), xlabel="accuracy (dotted: chance)")
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
