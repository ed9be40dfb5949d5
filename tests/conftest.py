"""Shared fixtures: a tiny warm-started model, and the demo's data processed as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "r1_aqa"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def run_script(script: str, *args: object, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the example's scripts in a process of its own.

    :param script: Path below examples/r1_aqa.
    :param args: Arguments.
    :param check: Fail the test, with the output, if it fails.
    :param kwargs: For subprocess.run.
    """
    command = [sys.executable, str(EXAMPLE / script), *map(str, args)]
    # a process group that a test has made in this process is no business of the child's
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in group}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, **kwargs)
    if check and done.returncode != 0:
        pytest.fail(f"{script} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The demo's model, warm-started to answer in the right format."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    run_script("demo/make_model.py", "--out_dir", folder, "--warm_start_steps", 60)
    return folder


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """A small set of the demo's data: train_qa.data, audios/, demo-test.json, test-audios/."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    questions = ("--train_questions", 96, "--train_clips", 40, "--test_questions", 24)
    run_script("demo/make_data.py", "--out_dir", folder, *questions)
    return folder


@pytest.fixture(scope="session")
def demo_parquet(demo_data, tmp_path_factory) -> Path:
    """The demo's training rows through avqa.py, with a validation split."""
    folder = tmp_path_factory.mktemp("parquet")
    source = ("--input_jsonl", demo_data / "train_qa.data", "--audio_dir", demo_data)
    run_script("data_preprocess/avqa.py", *source, "--local_save_dir", folder, "--val_ratio", 0.2)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark files beside the checkout; tests that need them are skipped where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real benchmark files (../shared/data) are not here")
    return folder
