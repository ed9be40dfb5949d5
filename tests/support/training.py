"""Runs of train_colocate.py in processes of their own, and what they leave behind."""

import json
import shlex
import subprocess
from pathlib import Path

import eval_mmau
import pytest
import torch
from conftest import EXAMPLE, ROOT, python_on, run_command
from safetensors.torch import load_file

METRICS = [f"time/{part}" for part in ("data", "rollout", "logprobs", "train", "sync", "step")] + ["samples_per_second"]
METRICS += [f"rollout/{name}" for name in ("reward", "accuracy_reward", "format_reward", "response_length")]
METRICS += [f"rollout/{name}" for name in ("truncated_fraction", "logprob_gap_mean", "logprob_gap_max")]
METRICS += [f"train/{name}" for name in ("policy_loss", "kl", "clip_fraction", "grad_norm", "lr")]
SMALL = shlex.split("""
    --rollout_batch_size 4 --n_samples_per_prompt 4 --train_batch_size 16 --micro_train_batch_size 8
    --micro_rollout_batch_size 8 --generate_max_len 12 --actor_learning_rate 1e-3 --lr_warmup_ratio 0
    --no-report
""")
# what a strategy of the runtime reads of the flags
FLAGS = {"engine_tp_size": 1, "seed": 0, "bf16": False, "lora_rank": 0, "lora_alpha": 16, "l2": 0.1, "max_norm": 0.5}
FLAGS |= {"actor_learning_rate": 1e-2, "lr_warmup_ratio": 0, "adam_betas": (0.9, 0.95), "train_batch_size": 2}
FLAGS |= {"micro_train_batch_size": 1, "fsdp_cpu_offload": False, "sync_bucket_mb": 1, "sft_steps": 0}


def train(model, data, out, *extra, processes=1, check=True):
    """Run train_colocate.py, under torchrun for several processes."""
    command = (*python_on(processes), EXAMPLE / "train_colocate.py", "--pretrain", model, "--prompt_data", data)
    done = run_command(*command, "--save_path", out, *SMALL, *extra, check=check and processes == 1)
    if check and done.returncode != 0:
        logs = "".join(path.read_text(errors="replace")[-3000:] for path in sorted((out / "logs").glob("*.log")))
        pytest.fail(f"torchrun ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}\n{logs}")
    return done


def train_recorded(model, data, folder, *flags, processes=1):
    """A run in ``folder / "run"`` whose optimizer steps ``gradient_capture.py`` records in ``updates.pt``."""
    recorder = (ROOT / "tests" / "support" / "gradient_capture.py", folder / "updates.pt")
    command = (*python_on(processes), *recorder, EXAMPLE / "train_colocate.py", "--pretrain", model)
    return run_command(*command, "--prompt_data", data, "--save_path", folder / "run", *flags)


def metrics_of(out):
    """A run's records of its steps, without that of the evaluation before them, step 0."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"] > 0]


def moved(model, out):
    """Names of the parameters that training changed, and of those it did not."""
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    return changed, old.keys() - changed


def same_weights(first, second):
    """Whether two models' folders hold the same."""
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def contents(folder):
    """Every file of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def benchmark_of(data):
    return ("--eval_benchmark", data / "demo-test.json", "--eval_audio_dir", data)


def end(process: subprocess.Popen, seconds: float = 300) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {seconds} s: {process.communicate()[0][-3000:]}")


def comparable(out: Path) -> list[dict]:
    timed = ("time/", "samples_per_second")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in metrics_of(out)]


def answers_of(model, data, folder, *extra):
    """What eval_mmau.py's model says to the test questions."""
    out = folder / "answers.json"
    source = ("--model_path", model, "--data_file", data / "demo-test.json", "--audio_dir", data, "--out_file", out)
    assert eval_mmau.main([str(value) for value in (*source, "--max_new_tokens", 12, "--overwrite", *extra)]) == 0
    return [row["raw_output"] for row in json.loads(out.read_text())]
