"""``--plan``: what it says, what it would change, and that the advice fits."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from conftest import EXAMPLE, child_environment

from aqa.policy import token_log_probs
from aqa.training import planner
from aqa.training.flags import build_parser, find_problems, finish
from aqa.training.model_sizes import count, parameters, read_sizes
from aqa.training.plan_memory import GIB, LOGITS, PHASES
from lightrft.utils import add_arguments

SEVEN_B = "Qwen/Qwen2-Audio-7B-Instruct"
RECIPE = ("--bf16", "--zero_stage", "3", "--gradient_checkpointing", "--micro_rollout_batch_size", "4")


def plan(*flags, gpus=8, gib=80.0) -> planner.Plan:
    args = build_parser(add_arguments).parse_args(["--plan", "--pretrain", SEVEN_B, *flags])
    finish(args)
    return planner.make_plan(args, read_sizes(SEVEN_B), planner.GPUs(gpus, gib, "as asked"))


def change(before: planner.Plan, advice: dict) -> planner.Plan:
    args = argparse.Namespace(**(vars(before.args) | advice))
    return planner.make_plan(args, before.sizes, before.gpus)


def run(*flags, **kwargs):
    command = [sys.executable, str(EXAMPLE / "train_colocate.py"), "--plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_environment(), **kwargs)


def test_states_by_hand():
    values = count(parameters(read_sizes(SEVEN_B))) - 1500 * 1280  # the sinusoids do not train
    zero2 = plan("--bf16", "--zero_stage", "2").memory
    assert zero2["backward"]["weights"] == 2 * (values + 1500 * 1280)
    assert zero2["backward"]["optimizer states"] == 12 * values / 8
    assert zero2["backward"]["gradients"] == 2 * values / 8
    assert zero2["optimizer"]["gradients"] == 4 * values / 8  # in float32
    assert zero2["rollout"]["gradients"] == 0
    assert zero2["backward"]["sharding buffers"] == 2 * 2 * 5e8
    assert zero2["backward"]["reference model"] == 0  # in the machine's memory
    zero3 = plan(*RECIPE).memory
    assert zero3["rollout"]["weights"] == pytest.approx(2 * values / 8, rel=0.01)
    assert zero3["rollout"]["gradients"] == 2 * values / 8
    zero0 = plan("--no-bf16", "--zero_stage", "0").memory
    assert zero0["rollout"]["optimizer states"] == 8 * values  # no second copy of the weights
    offloaded = plan("--bf16", "--adam_offload").memory
    assert offloaded["optimizer"]["optimizer states"] == offloaded["optimizer"]["gradients"] == 0


def test_fsdp_by_hand():
    values = count(parameters(read_sizes(SEVEN_B))) - 1500 * 1280
    fixed = 2 * 1500 * 1280 / 8
    memory = plan("--bf16", "--fsdp").memory
    assert memory["rollout"]["weights"] == 4 * values / 8 + fixed  # those that train are float32
    assert memory["backward"]["gradients"] == memory["optimizer"]["gradients"] == 4 * values / 8
    assert memory["optimizer"]["optimizer states"] == 8 * values / 8
    assert memory["sync"]["reference model"] == pytest.approx(2 * values / 8 + fixed)
    layer = 4 * 4096 * 4096 + 3 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    tower = 32 * (4 * 1280**2 + 3 * 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280)
    rest = values + 1500 * 1280 - tower - 32 * layer - 2 * 156032 * 4096
    assert memory["backward"]["sharding buffers"] == pytest.approx(2 * (rest + 156032 * 4096 + layer))
    offloaded = plan("--bf16", "--fsdp", "--fsdp_cpu_offload")
    kept = ("weights", "gradients", "optimizer states", "reference model")
    assert not any(row[name] for row in offloaded.memory.values() for name in kept)
    host = planner.host_memory(offloaded.sizes, offloaded.args, 8)
    assert host["training"] == 16 * values / 8 + fixed
    assert host["reference model"] == pytest.approx(2 * values / 8 + fixed)


def test_parameters_offloaded():
    held, moved = (plan(*RECIPE, *more) for more in ((), ("--param_offload",)))
    less = held.memory["sync"]["weights"] - moved.memory["sync"]["weights"]
    assert moved.memory["sync"]["weights"] < 0.01 * 2**30  # small ones that stay whole
    assert planner.host_memory(moved.sizes, moved.args, 8)["training"] == less


def test_the_engines_share_and_what_is_left_for_its_cache():
    engine = planner.engine_of(read_sizes(SEVEN_B), plan(*RECIPE).args, 8, 80.0)
    assert engine.share == 40 * GIB
    assert engine.weights == 2 * count(parameters(read_sizes(SEVEN_B)))
    assert engine.cache == engine.share - engine.weights - 2 * GIB
    token = 2 * 32 * 4096 * 2  # keys and values of 32 layers, two bytes each
    assert engine.sequences == pytest.approx(engine.cache / (token * (512 - 1 + 750 + 256)))
    split = planner.engine_of(read_sizes(SEVEN_B), plan(*RECIPE, "--engine_tp_size", "2").args, 8, 80.0)
    assert split.weights == engine.weights / 2


def test_logits_at_once_are_the_trainers():
    assert LOGITS == token_log_probs.LOGITS_AT_ONCE


@pytest.mark.parametrize(
    ("flags", "gpus", "gib", "changed"),
    [
        (("--bf16", "--zero_stage", "2"), 8, 80.0, {"engine_mem_util"}),
        (("--bf16", "--zero_stage", "2"), 2, 80.0, {"adam_offload"}),
        (
            (*RECIPE, "--micro_train_batch_size", "16", "--generate_max_len", "8192"),
            8,
            80.0,
            {"micro_train_batch_size"},
        ),
        (("--bf16", "--fsdp"), 2, 80.0, {"fsdp_cpu_offload"}),
        (("--bf16",), 1, 24.0, {"lora_rank", "load_in_4bit", "engine_type", "gradient_checkpointing"}),
    ],
)
def test_what_it_would_change_fits_and_nothing_less_does(flags, gpus, gib, changed):
    before = plan(*flags, gpus=gpus, gib=gib)
    advice = planner.advise(before)
    assert before.missing
    assert set(advice) == changed
    after = change(before, advice)
    assert not after.missing
    assert find_problems(after.args, gpus, paths=False) == []
    for name in advice:
        assert change(before, {other: value for other, value in advice.items() if other != name}).missing


def test_the_recipe_fits_and_the_batch_is_the_trainers(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n" * 1000)
    whole = plan(*RECIPE, "--prompt_data", str(tmp_path), "--num_episodes", "3", gpus=8)
    assert not whole.missing
    numbers = planner.batch(whole)
    assert numbers["responses_a_rollout"] == 128
    assert numbers["micro_batches_a_gpu"] == 4
    assert numbers["steps_an_episode"] == 62  # 1000 rows, 125 a rank, 2 a rollout: 62 rollouts
    assert numbers["steps"] == 186
    # 16 prompts of 512 - 1 + 750 tokens, 128 responses of 256
    assert numbers["most_tokens_a_rollout"] == 16 * 1261 + 128 * 256


def test_from_the_command_line(tmp_path):
    fits = run("--pretrain", SEVEN_B, *RECIPE, "--plan_gpus", "8", "--plan_gpu_gib", "80", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr
    assert "It fits" in fits.stdout
    assert "8,397,094,912 parameters" in fits.stdout
    assert max(map(len, fits.stdout.splitlines())) <= 80
    command = ("json", "--pretrain", SEVEN_B, "--bf16", "--plan_gpus", "1", "--plan_gpu_gib", "24")
    too_much = run(*command, cwd=tmp_path)
    assert too_much.returncode == planner.DOES_NOT_FIT
    document = json.loads(too_much.stdout)
    assert not document["fits"] and document["fits_changed"]
    assert set(document["bytes_a_gpu"]) == set(PHASES)
    wrong = run("--pretrain", SEVEN_B, "--plan_gpus", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "do not divide among 3 ranks" in wrong.stderr
