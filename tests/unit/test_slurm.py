"""The Slurm script, with stand-ins for Slurm's commands: what the launch script is told, and what a signal does."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, wait_for

SCRIPT = EXAMPLE / "slurm.sbatch"
SRUN = """#!/bin/bash
# two nodes' tasks, one after the other; hands signals on
echo "$@" > srun.txt
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
wait $first; wait $first || status=$?
wait $second || status=$?
exit ${status:-0}
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo "$3" | tr , '\\n'
[ "$1" = requeue ] && echo "$2" > requeued.txt
exit 0
"""
LAUNCH = """#!/bin/bash
trap 'echo saved; exit 138' USR1
env | grep -E '^(MLP_|RUN_ID|EXPERIMENT|RESUME)' | sort > "node$MLP_ROLE_INDEX.txt"
echo "$@" >> "node$MLP_ROLE_INDEX.txt"
for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as a job of two nodes."""
    files = {"bin/srun": SRUN, "bin/scontrol": SCONTROL}
    files["examples/r1_aqa/run_grpo_r1_aqa_qwen2_audio_7b.sh"] = LAUNCH
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu07,gpu11"}
    slurm |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}
    # as Slurm's: nothing of this machine's own settings
    slurm |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def start(*arguments: str, **settings: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", SCRIPT, *arguments], cwd=tmp_path, env=slurm | settings)

    return start


def told(folder: Path, node: int) -> tuple[dict[str, str], str]:
    *variables, arguments = (folder / f"node{node}.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in variables), arguments


def test_slurms_variables_become_the_launch_scripts(job, tmp_path):
    assert job("--lora_rank", "8").wait(30) == 0
    for node in (0, 1):
        variables, arguments = told(tmp_path, node)
        expected = f"MLP_WORKER_NUM=2 MLP_WORKER_GPU=4 MLP_ROLE_INDEX={node} MLP_WORKER_0_HOST=gpu07"
        expected += " MLP_WORKER_0_PORT=23456 RUN_ID=slurm123456 EXPERIMENT_NAME=r1-aqa-slurm123456 RESUME=0"
        assert variables == dict(pair.split("=") for pair in expected.split())
        assert arguments == "--lora_rank 8"
    assert "--cpus-per-task=16 bash -c" in (tmp_path / "srun.txt").read_text()
    assert not (tmp_path / "requeued.txt").exists()


def test_a_requeued_job_goes_on_and_settings_win(job, tmp_path):
    settings = {"SLURM_RESTART_COUNT": "1", "MLP_WORKER_GPU": "2", "EXPERIMENT_NAME": "mine", "MLP_WORKER_0_PORT": "9"}
    assert job(**settings).wait(30) == 0
    variables, _ = told(tmp_path, 1)
    assert variables["RESUME"] == "1" and variables["MLP_WORKER_GPU"] == "2"
    assert variables["EXPERIMENT_NAME"] == "mine" and variables["MLP_WORKER_0_PORT"] == "9"


@pytest.mark.parametrize("tenths", ["600", "20"])
def test_a_signal_reaches_the_training_and_the_job_goes_back_into_the_queue(job, tmp_path, tenths):
    """Not, if the training was at its end anyway."""
    process = job(TENTHS=tenths)
    wait_for(lambda: all((tmp_path / f"node{node}.txt").exists() for node in (0, 1)))
    time.sleep(0.3)
    if tenths == "20":
        assert process.wait(30) == 0
        assert not (tmp_path / "requeued.txt").exists()
        return
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 138
    assert (tmp_path / "requeued.txt").read_text() == "123456\n"


def test_slurm_reads_what_is_meant():
    """Its options are comments: one behind the first command would be passed over."""
    lines = SCRIPT.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(options)] == options
    assert "#SBATCH --signal=B:USR1@120" in options and "#SBATCH --ntasks-per-node=1" in options
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
