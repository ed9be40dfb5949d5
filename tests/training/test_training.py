"""The whole training, in processes of its own, as a user starts it."""

import csv
import functools
import json
import math
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAUNCH_SCRIPT, ROOT, run_command, run_script
from support.training import METRICS, benchmark_of, contents, metrics_of, moved, same_weights, train
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from aqa.evaluation.checkpoints import missing_files
from aqa.evaluation.items import read_rows
from aqa.report import metrics
from aqa.rewards.choices import is_right
from lightrft.strategy.checkpoint import damage

JUDGE = """
import os
calls = 0

def out_of_tokens(response, reference, think):
    global calls
    calls += 1
    world = int(os.environ["WORLD_SIZE"])
    if calls > 32 // world and os.environ["RANK"] == str(world - 1):  # in the third rollout of 16 responses
        raise ValueError("no tokens are left")
    return len(response) % 3
"""


@pytest.fixture(scope="module")
def run(tiny_model, demo_parquet, demo_data, tmp_path_factory):
    """Four steps, with checkpoints after two and four, evaluations, the best kept, and trajectories."""
    out = tmp_path_factory.mktemp("run")
    every = ("--save_steps", 2, "--eval_steps", 2, "--max_ckpt_num", 1, "--keep_best", *benchmark_of(demo_data))
    switches = ("--save_hf_ckpt", "--save_trajectories", "--num_trajectories_to_save", 5, "--report")
    done = train(tiny_model, demo_parquet, out, "--max_samples", 16, *every, *switches)
    return out, done


def test_metrics_are_all_there_and_engine_and_trainer_agree(run):
    records = metrics_of(run[0])
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert set(METRICS) <= record.keys()
        assert all(record[name] is not None for name in METRICS)
        assert record["rollout/logprob_gap_max"] < 1e-3
        assert record["rollout/reward"] == pytest.approx(
            record["rollout/accuracy_reward"] + record["rollout/format_reward"]
        )
    assert [("eval/accuracy_reward" in record) for record in records] == [False, True, False, True]


def test_the_screen_shows_our_lines_and_the_log_the_rest(run):
    out, done = run
    assert "\nhost      this repository's runtime" in done.stdout
    assert "step 4/4  reward" in done.stdout
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 or str(out) in line or "data: " in line or "WARNING" in line for line in lines[1:])
    assert "\x1b" not in done.stdout
    shown = {line[:18].strip(): line[18:].split() for line in lines[lines.index("") :]}
    rewards = [f"{record['rollout/reward']:.3f}" for record in metrics_of(out)]
    assert shown["reward"][:2] == [rewards[0], rewards[-1]] and "held-out accuracy" in shown
    assert lines[-4] == f"metrics   {out / 'metrics.jsonl'}" and lines[-2].startswith("report    ")
    assert "learned   held-out accuracy" in done.stdout  # 4 steps teach nothing, so that more are offered
    assert re.fullmatch(r"next      \S+ \S*train_colocate.py .* --load_checkpoint --max_steps 8 .*", lines[-1])
    assert "vllm" not in done.stdout.split("step 1/4")[1].lower()
    assert "vllm" in (out / "logs" / "rank0.log").read_text().lower()


def test_every_parameter_moves_the_towers_too(run, tiny_model):
    changed, same = moved(tiny_model, run[0])
    assert any(name.startswith("audio_tower.") for name in changed)
    # positions are fixed in Qwen2-Audio; a key's bias has no gradient, see test_engines
    assert {name for name in same if "k_proj.bias" not in name} == {"audio_tower.embed_positions.weight"}


def test_the_folder_loads_in_transformers_with_its_processor(run):
    for folder in (run[0], run[0] / "hf_step_000002"):
        model, info = Qwen2AudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
        assert AutoProcessor.from_pretrained(folder).audio_token == "<|AUDIO|>"


def test_trajectories_hold_what_was_said_and_earned(run):
    lines = (run[0] / "trajectories" / "step_000004.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["group"] for record in records] == [0] * 4 + [1] * 4  # five, in whole groups
    for group in (records[:4], records[4:]):
        assert len({(record["prompt"], record["audio_path"], record["reference"]) for record in group}) == 1
        assert sum(record["advantage"] for record in group) == pytest.approx(0, abs=1e-4)
    record = records[0]
    assert Path(record["audio_path"]).is_file() and record["step"] == 4
    assert record["prompt"].endswith("<|im_start|>assistant\n") and "options" in record["prompt"]
    assert record["reward"] == record["accuracy_reward"] + record["format_reward"]


def test_a_benchmark_is_scored_as_afterwards_on_the_same_engine(run, demo_data, tmp_path):
    result = tmp_path / "result.json"
    source = ("--model_path", run[0], "--data_file", demo_data / "demo-test.json", "--audio_dir", demo_data)
    run_script("eval_mmau.py", *source, "--out_file", result, "--engine", "vllm", "--max_new_tokens", 12)
    assert json.loads(result.read_text()) == json.loads((run[0] / "eval" / "demo-test_step_000004.json").read_text())
    score = json.loads(result.with_suffix(".score.json").read_text())
    record = metrics_of(run[0])[3]
    assert record["eval/demo-test/accuracy"] == score["accuracy"]
    assert record["eval/demo-test/sound"] == score["by"]["task"]["sound"]["accuracy"]


def test_the_best_model_is_kept(run):
    values = {record["step"]: record.get("eval/demo-test/accuracy") for record in metrics_of(run[0])}
    assert values[1] is None and values[3] is None
    step = 4 if values[4] > values[2] else 2  # of equal ones the first
    best = run[0] / "best"
    record = {"step": step, "metric": "eval/demo-test/accuracy", "value": values[step]}
    assert json.loads((best / "best.json").read_text()) == record
    assert same_weights(best, run[0] / f"hf_step_{step:06d}")
    assert AutoProcessor.from_pretrained(best).audio_token == "<|AUDIO|>"


def test_settings_and_report_are_left_in_the_folder(run):
    out, done = run
    config = json.loads((out / "run_config.json").read_text())
    assert config["flags"]["n_samples_per_prompt"] == 4 and "n_samples_per_prompt" in config["changed"]
    assert "temperature" not in config["changed"] and config["versions"]["torch"] == torch.__version__
    assert f"report    {out / 'report.html'}" in done.stdout
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    for row, record in zip(rows[1:], metrics_of(out), strict=True):  # the first is the evaluation of the start model
        assert {name: float(value) for name, value in row.items() if value} == {
            name: value for name, value in record.items() if value is not None
        }
    page = (out / "report.html").read_text()
    assert "8 groups of 4 steps; the run saved 4 steps" in page and 1 <= page.count('"mp3":"') <= 80


def test_an_exported_checkpoint_is_the_model_that_was_saved(run, tiny_model, tmp_path):
    where = ("--checkpoint", run[0], "--pretrain", tiny_model, "--out", tmp_path / "out")
    done = run_script("export_checkpoint.py", *where)
    assert done.stdout == f"{tmp_path / 'out'}: the model of {run[0]}/_actor/step_000004\n" and done.stderr == ""
    assert contents(tmp_path / "out") == contents(run[0] / "hf_step_000004")
    refused = run_script("export_checkpoint.py", *where, check=False)
    assert refused.returncode == 1 and "exists already; name a new folder" in refused.stderr


def test_resume_continues_after_the_checkpoint(run, tiny_model, demo_parquet, demo_data):
    out = run[0]
    better = {"step": 4, "metric": "eval/demo-test/accuracy", "value": 2.0}  # than any that will come
    (out / "best" / "best.json").write_text(json.dumps(better))
    weights = (out / "best" / "model.safetensors").read_bytes()
    assert [path.name for path in (out / "_actor").iterdir() if path.is_dir()] == ["step_000004"]  # rotated
    every = ("--eval_steps", 4, "--keep_best", *benchmark_of(demo_data))
    more = ("--load_checkpoint", "--allow_changes", "max_steps")
    done = train(tiny_model, demo_parquet, out, "--max_samples", 16, "--max_steps", 7, *more, *every)
    assert "16 prompts were already used" in done.stdout
    assert "16 rows / 4 prompts = 4 steps an episode; --max_steps 7: 1.75 episodes" in done.stdout
    assert [record["step"] for record in metrics_of(out)] == [1, 2, 3, 4, 5, 6, 7]
    # of the cosine from 1e-3 down to a tenth, 4 and 6 of 7 optimizer steps are done before steps 5 and 7
    rates = [1e-3 * (0.55 + 0.45 * math.cos(math.pi * share)) for share in (4 / 7, 6 / 7)]
    assert [metrics_of(out)[step - 1]["train/lr"] for step in (5, 7)] == pytest.approx(rates)
    [start] = [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if r["step"] == 0]
    assert "eval/demo-test/accuracy" in start and "rollout/reward" not in start  # the start model's, asked once
    assert json.loads((out / "best" / "best.json").read_text()) == better
    assert (out / "best" / "model.safetensors").read_bytes() == weights
    assert metrics_of(out)[6]["eval/best"] == 2.0 and metrics_of(out)[6]["eval/demo-test/accuracy"] < 2.0


def test_methods_together(run, tiny_model, demo_parquet, tmp_path):
    """DAPO's and GSPO's parts and a KL in the reward; engine and trainer are one model, so corrections weigh 1."""
    methods = ("--advantage_estimator", "rloo", "--use_gspo", "--no-use_kl_loss", "--kl_estimator", "k1")
    dapo = ("--eps_clip_high", 0.3, "--dynamic_sampling", "--overlong_buffer", "--overlong_buffer_len", 6)
    extra = ("--engine_type", "hf", "--rollout_correction", "mis", "--max_epochs", 2, "--max_samples", 8)
    extra = (*extra, "--reward", "accuracy+format+audio_gain", "--reward_weights", 1, 1, 0.5)
    train(tiny_model, demo_parquet, tmp_path, *methods, *dapo, *extra)
    for record in metrics_of(tmp_path):
        assert record["train/correction_weight"] == pytest.approx(1, abs=1e-3)
        assert record["train/correction_limited"] == 0
        # 12 tokens at most, of which the last 6 cost up to 1; an answer has 8
        assert -1 <= record["rollout/overlong_penalty"] < -0.2
        total = record["rollout/accuracy_reward"] + record["rollout/format_reward"] + record["rollout/overlong_penalty"]
        assert 0 < record["rollout/audio_gain_reward"] < 1 and record["time/silence"] > 0
        total += 0.5 * record["rollout/audio_gain_reward"]
        assert record["rollout/reward"] == pytest.approx(total, abs=1e-5)
        assert 0 <= record["rollout/replaced"] <= 1
        assert record["rollout/groups_without_spread"] <= 0.5
        assert record["rollout/logprob_gap_max"] < 1e-3
    assert record["train/kl"] != 0
    # these two runs write nearly every metric that there is; docs/metrics.md shows the table
    written = set().union(*metrics_of(run[0]), *metrics_of(tmp_path)) - {"step"}
    assert [name for name in written if not metrics.known(name)] == []
    # test_evaluation.py and test_warm_start.py have these
    assert metrics.METRICS.keys() - written == {"eval/accuracy_reward_silent", "train/sft_loss", "train/heard"}


def left_behind(request, path):
    """A file that is there until the test is over."""
    if not path.exists():
        path.touch()
        request.addfinalizer(lambda: path.unlink(missing_ok=True))


@pytest.mark.parametrize(
    ("tensor_parallel", "stage"),
    [(1, 3), (2, 2), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_two_processes(tiny_model, demo_parquet, demo_data, tmp_path, request, tensor_parallel, stage):
    """Data parallel 2 and tensor parallel 2, ZeRO 2 and 3; 7 rows and 24 questions are evaluated by both."""
    extra = ("--zero_stage", stage, "--engine_tp_size", tensor_parallel, "--max_samples", 12)
    evaluated = ("--eval_steps", 3, "--max_eval_samples", 7, "--keep_best", "eval/reward", "--eval_silent")
    evaluated += tuple(benchmark_of(demo_data))
    if tensor_parallel > 1:  # as vLLM names it; a run that was killed had left it, and the next could not make its own
        left_behind(request, Path("/dev/shm/-tp:0-[0-1]-cpushm_0"))
    train(tiny_model, demo_parquet, tmp_path, *extra, *evaluated, processes=2)
    records = metrics_of(tmp_path)
    assert len(records) == 3
    assert all(record["rollout/logprob_gap_max"] < 1e-3 for record in records)
    _, same = moved(tiny_model, tmp_path)
    assert {name for name in same if "embed_positions" not in name and "k_proj.bias" not in name} == set()
    answers = json.loads((tmp_path / "eval" / "demo-test_step_000003.json").read_text())
    right = sum(is_right(row["model_output"], row["answer"], row["choices"]) for row in answers)
    assert records[2]["eval/demo-test/accuracy"] == right / len(answers)
    silent = json.loads((tmp_path / "eval" / "demo-test_silent_step_000003.json").read_text())
    right = sum(is_right(row["model_output"], row["answer"], row["choices"]) for row in silent)
    assert records[2]["eval/demo-test_silent/accuracy"] == right / len(answers)
    assert all(row["silent_audio"] for row in silent) and "eval/accuracy_reward_silent" in records[2]
    assert [row["id"] for row in answers] == [row["id"] for row in read_rows(demo_data / "demo-test.json")[1]]
    assert records[2]["eval/reward"] * 7 == pytest.approx(round(records[2]["eval/reward"] * 7))  # of 7 rows, not 8
    assert json.loads((tmp_path / "best" / "best.json").read_text())["value"] == records[2]["eval/reward"]


def test_launch_script_dry_run(tiny_model, demo_parquet, tmp_path):
    """The manual's dry run, on twelve prompts: its names, its folders, its exit status; with parts that are frozen."""
    values = "EPISODE=1 RBS=4 TBS=32 N_SAMPLES=4 MLP_WORKER_GPU=1 ENGINE_TP=1 ENGINE_MEM_UTIL=0.5 GENERATE_MAX_LEN=12"
    env = dict(pair.split("=") for pair in values.split()) | {"PYTHON": sys.executable, "WANDB_MODE": "disabled"}
    env |= {"PATH_TO_YOUR_BASE_MODEL": tiny_model, "PATH_TO_YOUR_AVQA_DATASET": demo_parquet, "WANDB_API_KEY": "s3cret"}
    flags = ("--max_samples", 12, "--actor_learning_rate", 1e-3, "--zero_stage", 0, "--lr_warmup_ratio", 0)
    flags += ("--freeze_prefix", "audio_tower", "multi_modal_projector")
    done = run_command("bash", LAUNCH_SCRIPT, *flags, cwd=tmp_path, **env)
    (folder,) = (tmp_path / "results" / "lightrft-r1-aqa-grpo-training").iterdir()
    assert (folder / "model.safetensors").is_file()
    records = metrics_of(folder)
    # 16 responses a rollout, 32 a step: the second rollout fills the first optimizer step
    assert [record["train/grad_norm"] is None for record in records] == [True, False, True]
    assert all(record["rollout/logprob_gap_max"] < 1e-4 for record in records)  # frozen parts are sent to vLLM once
    changed, same = moved(tiny_model, folder)
    frozen = ("audio_tower.", "multi_modal_projector.")
    assert not [name for name in changed if name.startswith(frozen)]
    assert not [name for name in same if not name.startswith(frozen) and "k_proj.bias" not in name]
    assert "frozen: audio_tower (" in done.stdout
    (log,) = (tmp_path / "rft_logs" / "lightrft-r1-aqa-grpo-training").iterdir()
    assert "step 3/3" in log.read_text()
    assert "s3cret" not in done.stdout + log.read_text()


def test_launch_script_plans_without_starting_or_writing_anything(tmp_path):
    """``--plan``: for all ranks, in a GPU's precision whatever this machine has, with the planner's exit status."""
    env = {"PYTHON": sys.executable, "PATH_TO_YOUR_AVQA_DATASET": "nothing yet", "RUN_ID": "first"}
    for settings, status, said in (
        ({"MLP_WORKER_NUM": "2", "RBS": "32", "TBS": "256"}, 0, "GPUs       16 x 80 GiB (assumed"),
        ({"MLP_WORKER_NUM": "2", "RBS": "32", "TBS": "256", "MLP_ROLE_INDEX": "1"}, 0, ""),  # node 0 has said it
        ({"MLP_WORKER_GPU": "1"}, 3, "It does not fit: "),
    ):
        done = run_command("bash", LAUNCH_SCRIPT, "--plan", cwd=tmp_path, check=False, **env | settings)
        assert (done.returncode, done.stderr, said in done.stdout) == (status, "", True), done
        assert bool(done.stdout) == bool(said)
        assert not said or "ZeRO-3, bf16" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_launch_script_fails_when_training_fails(tiny_model, tmp_path):
    """Beside another launch with the default port; with a path as an env file has it."""
    (tmp_path / "model").symlink_to(tiny_model)
    env = {"PYTHON": sys.executable, "PATH_TO_YOUR_BASE_MODEL": "~/model", "MLP_WORKER_GPU": 1}
    env |= {"PATH_TO_YOUR_AVQA_DATASET": tmp_path / "nowhere", "HOME": tmp_path}
    launch = functools.partial(run_command, "bash", LAUNCH_SCRIPT, cwd=tmp_path, check=False, **env)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", 20092))
        other.listen()
        done, refused = launch(), launch(MLP_WORKER_0_PORT=20092)
    assert done.returncode != 0
    assert "these settings cannot be used" in done.stdout and "nowhere: does not exist" in done.stdout
    assert refused.returncode == 2 and "port 20092 cannot be used" in refused.stderr
    assert "set MLP_WORKER_0_PORT" in refused.stderr


def test_a_run_that_is_told_to_stops_and_has_saved(tiny_model, demo_parquet, tmp_path):
    flags = ("--engine_type", "hf", "--generate_max_len", 2, "--reward", "format", "--max_samples", 8)
    done = train(tiny_model, demo_parquet, tmp_path, *flags, "--on_anomaly", "stop", check=False)
    assert done.returncode == 4
    assert "stopped by --on_anomaly stop: step 1: no response ended by itself" in done.stdout
    assert "step 1 is the last one that is done and saved; " in done.stdout
    assert f"; {tmp_path}/hf_step_000001 is its model" in done.stdout
    assert (tmp_path / "_actor" / "step_000001").is_dir()
    assert missing_files(tmp_path / "hf_step_000001") == []
    assert [record["step"] for record in metrics_of(tmp_path)] == [1]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_in_mid_run_costs_no_step_that_is_done(tiny_model, demo_parquet, tmp_path, monkeypatch, processes):
    """A reward that raises on one rank: all of them save, and the error's message and exit status stay."""
    (tmp_path / "my_judge.py").write_text(JUDGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ("--engine_type", "hf", "--reward", "my_judge:out_of_tokens", "--max_samples", 16)
    out = tmp_path / "out"
    done = train(tiny_model, demo_parquet, out, *flags, processes=processes, check=False)
    shown = done.stdout + done.stderr
    error = "sample 0 (label 'avqa_rule'): no tokens are left"
    who = "" if processes == 1 else "rank 1: "
    assert f"{who}ValueError ({error}) ends the run: step 2 is the last one that is done and saved" in shown
    assert done.returncode == 1 and f"ValueError: {error}" in shown and "RankError" not in shown
    assert damage(out / "_actor" / "step_000002", slice(None)) is None and not list(out.glob("hf_step_*"))


def test_missing_audio_stops_the_training(tiny_model, demo_data, tmp_path):
    source = ("--input_jsonl", demo_data / "train_qa.data", "--audio_dir", tmp_path / "gone", "--no_check_audio")
    run_script("data_preprocess/avqa.py", *source, "--local_save_dir", tmp_path / "data")
    done = train(tiny_model, tmp_path / "data", tmp_path / "out", check=False)
    assert done.returncode != 0
    assert "does not exist" in done.stdout and "96 rows" in done.stdout
    assert not (ROOT / "ckpt").exists()
