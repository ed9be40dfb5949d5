"""A Python that lacks the packages is told so in one line."""

import sys

import pytest
from conftest import EXAMPLE, run_command

EVALUATION = ("--model_path", "m", "--data_file", "nowhere.json", "--out_file", "out.json")


@pytest.mark.parametrize(
    "command", [("train_colocate.py", "--pretrain", "."), ("eval_mmau.py", *EVALUATION, "--audio_dir", ".")]
)
def test_a_python_without_packages_is_told_where_they_are(tmp_path, command):
    script, *arguments = command
    # -S: none but Python's own
    done = run_command(sys.executable, "-S", EXAMPLE / script, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "torch, transformers" in done.stderr and "activate its environment" in done.stderr
    assert "Traceback" not in done.stderr
