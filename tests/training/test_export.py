"""A model of a checkpoint that two ranks wrote, made by one process."""

import shutil

import pytest
from conftest import run_script
from support.training import contents, train


@pytest.mark.slow  # test_training.py has one rank's
@pytest.mark.parametrize(
    "flags",
    [
        ("--zero_stage", 0, "--bf16"),
        ("--zero_stage", 2, "--bf16", "--lora_rank", 4),
        ("--zero_stage", 3, "--bf16", "--freeze_prefix"),
        ("--zero_stage", 3, "--lora_rank", 4),
        ("--fsdp", "--bf16", "--lora_rank", 4),
        ("--fsdp",),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_the_exported_model_is_the_one_that_the_run_saved(tiny_model, demo_parquet, tmp_path, flags):
    out = tmp_path / "run"
    flags = (*flags, "--engine_type", "hf", "--max_samples", 8)
    train(tiny_model, demo_parquet, out, *flags, "--save_steps", 2, "--save_hf_ckpt", processes=2)
    run_script("export_checkpoint.py", "--checkpoint", out, "--pretrain", tiny_model, "--out", tmp_path / "model")
    shutil.rmtree(out / "hf_step_000002" / "adapter", ignore_errors=True)
    assert contents(tmp_path / "model") == contents(out / "hf_step_000002")
