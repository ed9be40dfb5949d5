"""A run whose engine loses its weights whenever it sleeps is the run of one that does not sleep."""

import shutil
import sys

import pytest
from conftest import EXAMPLE, ROOT, run_command
from pytest import approx
from safetensors.torch import load_file
from support.training import SMALL, benchmark_of, comparable, train
from torch.testing import assert_close

# two rollouts an optimizer step, so that the weights are lost where no step was made; groups drawn anew; evaluations
# between the steps; and a frozen tower, which is not sent otherwise
FLAGS = ("--max_samples", 16, "--train_batch_size", 32, "--dynamic_sampling", "--eval_steps", 1, "--save_steps", 2)
FLAGS += ("--max_eval_samples", 4, "--freeze_prefix", "audio_tower")


@pytest.mark.slow
def test_a_run_with_sleep_is_one_without(tiny_model, demo_parquet, demo_data, tmp_path):
    awake, sleepy = tmp_path / "awake", tmp_path / "sleepy"
    flags = (*FLAGS, *benchmark_of(demo_data))
    train(tiny_model, demo_parquet, awake, *flags)

    def run(*more) -> None:
        arguments = ["--pretrain", tiny_model, "--prompt_data", demo_parquet, "--save_path", sleepy, *SMALL, *flags]
        runner = [sys.executable, ROOT / "tests" / "support" / "engine_sleep.py", "DROP", EXAMPLE / "train_colocate.py"]
        run_command(*runner, *arguments, *more, PYTHONPATH=ROOT / "tests")

    # a sleep empties vLLM's caches, and what is computed again is rounded otherwise
    steps = [step | {name: approx(value, abs=1e-5) for name, value in step.items()} for step in comparable(awake)]
    run()
    assert [step["step"] for step in steps] == [1, 2, 3, 4] and comparable(sleepy) == steps
    assert_close(load_file(sleepy / "model.safetensors"), load_file(awake / "model.safetensors"), atol=1e-6, rtol=0)
    # resumed: the engine has the checkpoint's weights before it samples
    shutil.rmtree(sleepy / "_actor" / "step_000004")
    (sleepy / "_actor" / "latest").write_text("step_000002")
    run("--load_checkpoint", "--allow_changes", "max_ckpt_num")
    assert comparable(sleepy) == steps
