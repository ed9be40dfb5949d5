"""Help and refused configurations come without loading what trains: torch alone takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import EXAMPLE, child_environment

HEAVY = {"torch", "transformers", "vllm", "deepspeed", "datasets", "numpy", "pyarrow"}
# runs a script as its user does and says which modules it has loaded when it ends
PROBE = """
import os, runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, os.path.dirname(script))  # as Python itself does for a script, and runpy does not
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    status = end.code
print("status", status, "loaded", *sorted({module.partition(".")[0] for module in sys.modules}))
"""
EVALUATION = ("--model_path", "m", "--data_file", "nowhere.json", "--out_file", "out.json")


@pytest.mark.parametrize(
    ("script", "arguments", "status", "message"),
    [
        ("train_colocate.py", ("--help_all",), 0, "--freeze_prefix"),
        ("train_colocate.py", ("--rollout_batch_size", "3"), 2, "3 x 8 = 24"),
        ("train_colocate.py", ("--pretrain", "./nowhere"), 2, "./nowhere: no such folder"),
        ("eval_mmau.py", ("--help",), 0, "--silent_audio"),
        ("eval_mmau.py", (*EVALUATION, "--audio_dir", "nowhere"), 2, "--audio_dir nowhere: is no folder"),
        ("eval_mmau.py", (*EVALUATION, "--audio_dir", "."), 2, "nowhere.json"),
    ],
)
def test_nothing_heavy_is_loaded(tmp_path, script, arguments, status, message):
    command = [sys.executable, "-c", PROBE, str(EXAMPLE / script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=child_environment())
    found, _, loaded = done.stdout.rpartition("loaded")
    assert f"status {status}" in found, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert "argparse" in loaded.split()  # the probe sees what is there
    assert HEAVY & set(loaded.split()) == set()


@pytest.mark.parametrize(
    "command",
    [
        ("train_colocate.py", "--pretrain", "."),
        ("eval_mmau.py", *EVALUATION, "--audio_dir", "."),
    ],
)
def test_a_python_without_packages_is_told_where_they_are(tmp_path, command):
    script, *arguments = command
    command = [sys.executable, "-S", str(EXAMPLE / script), *arguments]  # -S: none but Python's own
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=child_environment())
    assert done.returncode == 2, done.stderr
    assert "torch, transformers" in done.stderr and "activate its environment" in done.stderr
    assert "Traceback" not in done.stderr
