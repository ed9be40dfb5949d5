"""Training itself: train_colocate.py on the demo's tiny model, with the hf engine and gradient checkpointing.

Each case is a run of a few steps; in bf16 on a GPU, in float32 on a CPU. A run must end, with finite metrics, gradients
that are not 0, and an engine whose log-probs are near the trainer's. A run that resumes from its second step's
checkpoint must sample what the uninterrupted one sampled in the third.
"""

import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from harness import EXAMPLE

from gpu.record import Figures, Section, Skip, judge

QUESTIONS, STEPS = 16, 4
GAP = 3e-2  # mean difference of log-probs in bf16
COMMON = shlex.split(f"""
    --engine_type hf --rollout_batch_size 4 --n_samples_per_prompt 8 --train_batch_size 32 --micro_train_batch_size 16
    --micro_rollout_batch_size 16 --generate_max_len 16 --actor_learning_rate 1e-3 --lr_warmup_ratio 0
    --max_samples {QUESTIONS} --gradient_checkpointing --no-report --verbose
""")
CASES = {
    "ZeRO-3": "--zero_stage 3",
    "ZeRO-2, save and resume": "--zero_stage 2 --save_steps 2 --max_ckpt_num 9",
    "LoRA": "--zero_stage 2 --lora_rank 4 --actor_learning_rate 1e-2",
    "FSDP2, save and resume": "--fsdp --save_steps 2 --max_ckpt_num 9",
    "ZeRO-3, offload": "--zero_stage 3 --adam_offload --param_offload",
    "FSDP2, offload": "--fsdp --fsdp_cpu_offload",
}


def run(section: Section) -> None:
    """Run the section: a few runs at once, because each of them spends most of its time on imports."""
    due = [name for name in CASES if section.is_due(name)]
    cores = os.cpu_count() or 1
    at_once = max(1, min(4, cores // 3))
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // at_once))  # else all of them want all cores
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        work = Path(folder)
        assets = pool.submit(make_assets, section.demo, work)
        runs = {name: pool.submit(train_case, name, work, assets) for name in due}
        for name in CASES:
            section.case(name, lambda n=name: runs[n].result())


def make_assets(demo: Path, work: Path) -> None:
    """The demo's model, made anew unless it is there, and a few sounds and questions.

    :param demo: Where make demo put its files.
    """
    if (demo / "model").is_dir():
        (work / "model").symlink_to(demo / "model")
    else:
        start("demo/make_model.py", "--out_dir", work / "model", "--warm_start_steps", 60)
    start("demo/make_data.py", "--out_dir", work / "data", "--train_questions", QUESTIONS, "--train_clips", QUESTIONS)
    source = ("--input_jsonl", work / "data" / "train_qa.data", "--audio_dir", work / "data")
    start("data_preprocess/avqa.py", *source, "--local_save_dir", work / "parquet")


def start(script: str, *args: object) -> str:
    """Run one of the example's scripts.

    :return: What it prints.
    :raises RuntimeError: with the end of its output, if it fails.
    """
    command = [sys.executable, str(EXAMPLE / script), *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(f"---- {' '.join(command)}\n{done.stdout}", flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"{script} ended with {done.returncode}: ... {done.stdout[-1500:]}")
    return done.stdout


def train_case(name: str, work: Path, assets: Future[None]) -> Figures:
    """One of :data:`CASES`; its figures are of the last step.

    :param assets: Ends, or fails, before training begins.
    """
    flags = shlex.split(CASES[name])
    if "--fsdp" not in flags and importlib.util.find_spec("deepspeed") is None:
        raise Skip("DeepSpeed is not installed")
    assets.result()
    out, started = work / name.replace(", ", "_").replace(" ", "_"), time.monotonic()
    metrics, figures = train(work, out, flags), {}
    if "--save_steps" in flags:
        figures = resume(work, out, flags, metrics)
    last = metrics[-1]
    figures |= {
        "run, s": time.monotonic() - started,  # the case's own seconds are those waited for it: runs overlap
        "reward": last["rollout/reward"],
        "gradient": max(record["train/grad_norm"] for record in metrics),
        "gap": max(record["rollout/logprob_gap_mean"] for record in metrics),
        "KL": last["train/kl"],
        "step, s": last["time/step"],
    }
    figures |= {f"{part}, s": last[f"time/{part}"] for part in ("rollout", "logprobs", "train", "sync")}
    return judge(figures, gap=(None, GAP), gradient=(1e-6, None))


def train(work: Path, out: Path, flags: list[str]) -> list[dict[str, float]]:
    """A run.

    :return: Metrics of all its steps.
    :raises RuntimeError: if it fails, is on the wrong device, or a metric is not finite.
    """
    import torch

    bf16 = ["--bf16"] if torch.cuda.is_available() else ["--no-bf16"]
    source = ("--pretrain", work / "model", "--prompt_data", work / "parquet", "--save_path", out)
    said = start("train_colocate.py", *source, *COMMON, *bf16, *flags)
    if torch.cuda.is_available() and torch.cuda.get_device_name() not in said:
        raise RuntimeError(f"{torch.cuda.get_device_name()} is here, and the run does not name it among its devices")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    odd = {k: v for record in metrics for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    if len(metrics) != STEPS or odd or not (out / "model.safetensors").is_file():
        raise RuntimeError(f"{len(metrics)} of {STEPS} steps, metrics that are not finite: {odd}, in {out}")
    return metrics


def resume(work: Path, out: Path, flags: list[str], whole: list[dict[str, float]]) -> Figures:
    """Go on from a copy of a run's second checkpoint.

    :param whole: The run's own metrics.
    :return: How far the gradient's norm is from that of the uninterrupted run, relatively: 0 where kernels add up in
        the same order each time.
    :raises RuntimeError: if the third step's responses earned other rewards, or had other lengths.
    """
    again = out.with_name(out.name + "_again")
    shutil.copytree(out, again)
    (again / "r1_aqa.json").unlink()  # it says that the run has ended
    for folder in (again / "_actor").glob("step_*"):
        if folder.name != "step_000002":
            shutil.rmtree(folder)
    mine, theirs = train(work, again, [*flags, "--load_checkpoint"])[2], whole[2]
    for name in ("rollout/reward", "rollout/response_length", "train/lr"):
        if mine[name] != theirs[name]:
            raise RuntimeError(f"step 3 after resuming: {name} is {mine[name]}, uninterrupted {theirs[name]}")
    norms = mine["train/grad_norm"], theirs["train/grad_norm"]
    return {"resumed, gradient off by": abs(norms[0] / norms[1] - 1) if norms[1] else abs(norms[0])}
