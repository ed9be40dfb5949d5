#!/usr/bin/env python3
"""How a GRPO step's seconds grow with samples, clip length, response length and processes.

    python benchmarks/bench_scaling.py --demo_dir results/demo             # measure: docs/scaling.png
    python benchmarks/bench_scaling.py --predict                           # Qwen2-Audio-7B on 8 GPUs, not measured

Base point: the demo's model, float32, 8 prompts x 8 samples, clips of 5 s, responses of 16 tokens, micro-batches of 8,
one process with one thread, vLLM rollouts, reference model. One of the four is varied at a time. So that responses have
the length that is asked for, the model is copied with an end token that it never writes; lines are fitted over the
length that was measured. Rounds are interleaved, the first step of each run left out. Written to
``benchmarks/results/<date>_scaling.json`` and ``docs/scaling.png``.

``--predict`` is arithmetic: FLOPs over peak x utilisation, bytes over bandwidth x utilisation. It leaves out kernel
launches, Python, decoding of audio and waiting for the slowest rank, so that a real step takes longer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from bench_step import EXAMPLE, make_questions, medians, train
from harness import ROOT, Report, ratio

sys.path.insert(0, str(EXAMPLE))
from aqa.training.model_sizes import count, decoder_flops, head_flops, parameters, read_sizes, tower_flops
from aqa.training.plan_memory import cache_bytes

PROMPTS, MICRO = 8, 8
BASE = {"samples": 8, "clip": 5, "response": 16, "processes": 1}
VARIED = {"samples": (2, 4, 8, 16), "clip": (1, 5, 10, 30), "response": (8, 16, 32, 64), "processes": (1, 2)}
UNITS = {
    "samples": "sample per prompt",
    "clip": "second of clip",
    "response": "response token",
    "processes": "process",
}
PHASES = {"rollout": "#1f5fa8", "logprobs": "#7a4fa3", "train": "#c0392b", "sync": "#2a8a4a"}


# ------------------------------------------------------------------------------------------------------------- measure
def never_ending(model: Path, out: Path) -> Path:
    """A copy of a model folder whose end of turn is a token that the model does not write.

    :param model: The demo's model.
    :param out: Folder to write.
    :return: ``out``.
    """
    shutil.copytree(model, out)
    unused = "<|audio_eos|>"
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    number = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == unused)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = json.loads((out / name).read_text(encoding="utf-8"))
        if name == "tokenizer_config.json":
            config["eos_token"] = unused
        else:
            config["eos_token_id"] = number
            config.get("text_config", {}).update(eos_token_id=number)
        (out / name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return out


def measure(point: dict[str, int], model: Path, parquet: Path, out: Path) -> dict[str, float]:
    """Train some steps at a point.

    :param point: Values of the four.
    :param model: From :func:`never_ending`.
    :param parquet: Questions with clips of that length.
    :param out: Folder of the run.
    :return: Median seconds of the phases, CPU seconds of the step, and the mean response length.
    """
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", point["processes"]]
    launcher = torchrun if point["processes"] > 1 else []
    responses = PROMPTS * point["samples"]
    flags = {
        "pretrain": model,
        "prompt_data": parquet,
        "rollout_batch_size": PROMPTS,
        "n_samples_per_prompt": point["samples"],
        "train_batch_size": responses,
        "micro_train_batch_size": MICRO,
        "micro_rollout_batch_size": MICRO,
        "generate_max_len": point["response"],
        "actor_learning_rate": 1e-6,
        "use_kl_loss": True,
        "no-report": True,
    }
    metrics = train([sys.executable, *launcher, EXAMPLE / "train_colocate.py"], flags, 1, out)
    return medians(metrics, [*(f"time/{phase}" for phase in (*PHASES, "step")), "cpu/step", "rollout/response_length"])


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares.

    :param x: Abscissae.
    :param y: Seconds.
    :return: Seconds at 0, seconds a unit, and the coefficient of determination.
    """
    slope, start = np.polyfit(x, y, 1)
    residual = np.array(y) - (start + slope * np.array(x))
    spread = np.array(y) - np.mean(y)
    return float(start), float(slope), float(1 - residual @ residual / (spread @ spread))


def draw(table: dict[str, list[dict[str, float]]], fits: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Step, its CPU seconds and phases over each of the four, with the fitted line.

    :param table: For each, its points in order: ``x`` and medians.
    :param fits: From :func:`fit`.
    :param path: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.8), layout="constrained")
    for ax, (name, points) in zip(axes.flat, table.items(), strict=True):
        x = [point["x"] for point in points]
        for phase, colour in PHASES.items():
            ax.plot(x, [point[f"time/{phase}"] for point in points], ".-", color=colour, linewidth=1, label=phase)
        ax.plot(x, [point["time/step"] for point in points], "o", color="black", label="step")
        cpu = [point["cpu/step"] for point in points]
        ax.plot(x, cpu, "o:", color="grey", fillstyle="none", linewidth=1, label="step, CPU seconds")
        if name in fits:
            start, slope, _ = fits[name]
            ends = np.array([0, max(x)])
            ax.plot(ends, start + slope * ends, color="black", linestyle="--", linewidth=1, label="fitted to step")
            cpu_slope = 1000 * fit(x, cpu)[1]
            title = f"{start:.2f} s + {1000 * slope:.1f} ms a {UNITS[name]} (CPU: {cpu_slope:.1f} ms)"
            ax.set_title(title, fontsize=10)
        else:
            ratio = points[0]["time/step"] / points[-1]["time/step"]
            ax.set_title(f"two processes: {ratio:.2f} x as fast as one", fontsize=10)
            ax.set_xticks(x)
        labels = {"samples": "samples per prompt", "clip": "clip length (s)", "response": "response length (tokens)"}
        ax.set(xlabel=labels.get(name, "processes, one thread each"), ylabel="seconds", ylim=(0, None))
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    base = f"{PROMPTS} prompts x {BASE['samples']}, clips of {BASE['clip']} s, {BASE['response']} tokens, one process"
    figure.suptitle(f"Seconds of a GRPO step, the demo's model on a CPU; base point: {base}", fontsize=11)
    figure.savefig(path, dpi=120)


def run_all(args: argparse.Namespace) -> None:
    """Measure all points, fit, draw, write.

    :param args: Flags.
    """
    report = Report("scaling", __doc__, args.rounds)
    points = [BASE] + [BASE | {name: v} for name, values in VARIED.items() for v in values if v != BASE[name]]
    runs: list[list[dict[str, float]]] = [[] for _ in points]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = never_ending(args.demo_dir / "model", folder / "model")
        data = {s: make_questions(folder / f"clips_{s}", PROMPTS * args.steps, s, s) for s in VARIED["clip"]}
        for round_ in range(args.rounds):
            for i, point in enumerate(points):
                runs[i].append(measure(point, model, data[point["clip"]], folder / f"run_{round_}_{i}"))
                print(f"round {round_ + 1}/{args.rounds} {point}: {runs[i][-1]['time/step']:.2f} s", flush=True)
    middle = [{key: statistics.median(run[key] for run in done) for key in done[0]} for done in runs]
    table: dict[str, list[dict[str, float]]] = {}
    fits = {}
    for name, values in VARIED.items():
        chosen = [points.index(BASE | {name: v}) for v in values]
        of_x = "rollout/response_length" if name == "response" else None
        table[name] = [{"x": middle[i][of_x] if of_x else points[i][name]} | middle[i] for i in chosen]
        steps = [point["time/step"] for point in table[name]]
        if len(values) > 2:
            fits[name] = fit([point["x"] for point in table[name]], steps)
            start, slope, r2 = fits[name]
            print(f"{name:10}  step = {start:.2f} s + {1000 * slope:.1f} ms a {UNITS[name]}   (R2 {r2:.3f})")
    draw(table, fits, ROOT / "docs" / "scaling.png")
    for name, (_, slope, _) in fits.items():
        report.judge(f"scaling: milliseconds a {UNITS[name]}", 1000 * slope)
        cpu = fit([point["x"] for point in table[name]], [point["cpu/step"] for point in table[name]])
        report.judge(f"scaling: CPU milliseconds a {UNITS[name]}", 1000 * cpu[1])
    one, two = ([run["time/step"] for run in runs[points.index(BASE | {"processes": n})]] for n in (1, 2))
    report.judge("scaling: two processes, times as fast as one", ratio(one, two))
    report.finish(steps=args.steps, base=BASE, prompts=PROMPTS, micro_batch=MICRO, table=table, fits=fits)


# ------------------------------------------------------------------------------------------------------------- predict
# bf16 peak without sparsity FLOP/s, memory B/s, NVLink B/s in one direction, PCIe B/s: data sheets
GPUS = {"A100 80 GB": (312e12, 2.04e12, 300e9, 25e9), "H200": (989e12, 4.8e12, 450e9, 50e9)}
WORLD = 8
MFU_TRAIN, MFU_FORWARD, OF_MEMORY, OF_LINK = 0.4, 0.5, 0.7, 0.7
CLIP_SECONDS, TEXT_TOKENS, RESPONSE_TOKENS, MICRO_GPU = 10, 90, 24, 4

SIZES = read_sizes("Qwen/Qwen2-Audio-7B-Instruct")
PARAMETERS = count(parameters(SIZES))
TOWER, DECODER = (count(parameters(SIZES), part) for part in ("audio_tower", "language_model"))
HEAD = SIZES.width * SIZES.vocabulary  # as many again are the embeddings, which are looked up
DECODER -= HEAD
BF16 = 2  # bytes


def predict(gpu: str, prompts: int, samples: int) -> dict[str, float]:
    """Seconds of a step's parts on one of :data:`WORLD` GPUs.

    :param gpu: One of :data:`GPUS`.
    :param prompts: Prompts a GPU.
    :param samples: Responses a prompt.
    """
    flops, memory, link, pcie = GPUS[gpu]
    forward, update = flops * MFU_FORWARD, flops * MFU_TRAIN
    memory, link = memory * OF_MEMORY, link * OF_LINK
    responses = prompts * samples
    prompt = 25 * CLIP_SECONDS + TEXT_TOKENS
    whole = prompt + RESPONSE_TOKENS
    micros = responses / MICRO_GPU
    weights = BF16 * PARAMETERS
    gather = weights * (WORLD - 1) / WORLD / link  # all-gather of the weights; a reduce-scatter costs the same
    kv = cache_bytes(SIZES, BF16)  # a token
    # each micro-batch encodes its clip once; forward, backward (twice it) and, with checkpointing, forward again
    tower, head = tower_flops(SIZES, CLIP_SECONDS), head_flops(SIZES, MICRO_GPU * RESPONSE_TOKENS)
    per_micro = tower + decoder_flops(SIZES, MICRO_GPU * whole, whole / 2) + head
    first = tower + decoder_flops(SIZES, prompt, prompt / 2)
    reference = first + decoder_flops(SIZES, MICRO_GPU * RESPONSE_TOKENS, whole) + head  # a shared prompt goes once
    parts = {
        "prefill": prompts * first / forward,
        "decode": RESPONSE_TOKENS * (BF16 * (DECODER + HEAD) + responses * whole * kv) / memory,
        "reference": micros * max(reference / forward, gather),
        "train": micros * max(4 * per_micro / update, 3 * gather),  # two all-gathers and a reduce-scatter
        "optimizer": PARAMETERS / WORLD * 30 / memory,  # read and write float32 weight and moments, read gradient
        "sync": gather + 2 * weights / memory,
        "sleep": 2 * weights / pcie,  # vLLM's weights to CPU memory and back
    }
    return parts | {"step": sum(parts.values())}


def print_prediction() -> None:
    """Print assumptions and predicted seconds."""
    peaks = (
        f"{gpu} {flops / 1e12:.0f} TFLOP/s, {memory / 1e12:.2f} TB/s, NVLink {link / 1e9:.0f} GB/s one way, PCIe "
        f"{pcie / 1e9:.0f} GB/s"
        for gpu, (flops, memory, link, pcie) in GPUS.items()
    )
    print(f"PREDICTION, NOT MEASURED: seconds a GRPO step of Qwen2-Audio-7B on {WORLD} GPUs of one machine\n")
    for name, text in {
        "model": f"{PARAMETERS / 1e9:.2f} G parameters in bf16: tower {TOWER / 1e9:.2f} G "
        f"({SIZES.tower_layers} layers of {SIZES.tower_width}), decoder {DECODER / 1e9:.2f} G ({SIZES.layers} layers "
        f"of {SIZES.width}, intermediate {SIZES.inner}, {SIZES.kv_heads} key-value heads), embeddings and head "
        f"{2 * HEAD / 1e9:.2f} G ({SIZES.vocabulary:,} tokens)",
        "recipe": f"8 samples a prompt, clips of {CLIP_SECONDS} s (25 audio tokens a second), {TEXT_TOKENS} tokens of "
        f"text, responses of {RESPONSE_TOKENS} tokens; ZeRO-3, gradient checkpointing, micro-batches of {MICRO_GPU}, "
        "reference model, one vLLM a GPU that sleeps while the policy is trained",
        "peaks": "; ".join(peaks),
        "utilisation": f"{MFU_TRAIN:.0%} of FLOP/s in training, {MFU_FORWARD:.0%} in a forward pass alone, "
        f"{OF_MEMORY:.0%} of memory bandwidth, {OF_LINK:.0%} of NVLink; within a phase computation and communication "
        "overlap (the longer one counts), the phases do not",
        "left out": "kernel launches, Python, decoding of audio, rewards, waiting for the slowest rank",
    }.items():
        print(textwrap.fill(f"{name:13}{text}", 110, subsequent_indent=" " * 13))
    results = {(gpu, prompts): predict(gpu, prompts, 8) for gpu in GPUS for prompts in (2, 8)}
    print(f"\n{'':24}" + "".join(f"{name:>11}" for name in next(iter(results.values()))))
    for (gpu, prompts), parts in results.items():
        print(f"{gpu:11}{prompts * WORLD:4} prompts " + "".join(f"{value:9.2f} s" for value in parts.values()))
    print("\n16 prompts a step are R1-AQA's recipe, two a GPU; 64 are eight a GPU")


def main() -> None:
    """Measure or predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps a run (default: %(default)s)")
    parser.add_argument("--predict", action="store_true", help="print the prediction for Qwen2-Audio-7B and end")
    args = parser.parse_args()
    if args.predict:
        print_prediction()
    else:
        run_all(args)


if __name__ == "__main__":
    main()
