"""A Python that lacks the packages is told so in one line."""

import subprocess
import sys

import pytest
from conftest import EXAMPLE, child_environment

EVALUATION = ("--model_path", "m", "--data_file", "nowhere.json", "--out_file", "out.json")


@pytest.mark.parametrize(
    "command", [("train_colocate.py", "--pretrain", "."), ("eval_mmau.py", *EVALUATION, "--audio_dir", ".")]
)
def test_a_python_without_packages_is_told_where_they_are(tmp_path, command):
    script, *arguments = command
    command = [sys.executable, "-S", str(EXAMPLE / script), *arguments]  # -S: none but Python's own
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=child_environment())
    assert done.returncode == 2, done.stderr
    assert "torch, transformers" in done.stderr and "activate its environment" in done.stderr
    assert "Traceback" not in done.stderr
