"""A run that is killed or asked to stop, anywhere, goes on as if nothing had happened.

All points run with ``make test-faults``; the ordinary suite takes a sample.
"""

import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, LAUNCH_SCRIPT, ROOT, child_environment, python_on, run_command, wait_for
from fault_runner import POINTS
from safetensors.torch import load_file
from support.training import SMALL, comparable, end, metrics_of, same_weights

from lightrft.strategy.checkpoint import damage

FLAGS = [*SMALL, *shlex.split("--max_samples 20 --save_steps 2 --max_ckpt_num 1 --kl_target 0.05 --save_hf_ckpt")]
FLAGS += shlex.split("--eval_steps 3 --max_eval_samples 8 --keep_best")
SAVING = {
    point
    for point, (module, *_) in POINTS.items()
    if module.endswith("checkpoint") and not point.startswith("best model")  # the first is kept at step 3
}
SAMPLE = [("SIGKILL", "written, not renamed"), ("SIGTERM", "before the sync")]
CASES = [(number, point) for number in ("SIGKILL", "SIGTERM") for point in POINTS]
CASES += [("SIGUSR1", "first micro-batch"), ("SIGINT", "second micro-batch"), ("SIGINT", "before the sync")]
EXIT = {"SIGKILL": -9, "SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130}


def start(model: Path, data: Path, out: Path, *more: str, fault=(), processes=1) -> subprocess.Popen:
    environment = child_environment() | {"PYTHONPATH": str(ROOT / "tests")}
    command = python_on(processes)
    command += [ROOT / "tests" / "faults" / "fault_runner.py", *fault] if fault else []
    command += [EXAMPLE / "train_colocate.py", "--pretrain", model, "--prompt_data", data]
    command = list(map(str, [*command, "--save_path", out, "--no-save_hf_on_stop", *FLAGS, *more]))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def orphans(out: Path) -> list[str]:
    """Processes that still name the run's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if str(out) in command:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def whole(tiny_model, demo_parquet, tmp_path_factory):
    """Runs that nothing happened to, by engine, processes and other flags."""
    runs: dict[tuple, Path] = {}

    def get(engine: str, processes: int, *flags: str) -> Path:
        key = (engine, processes, *flags)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("whole") / "run"
            flags = ("--engine_type", engine, *flags)
            process = start(tiny_model, demo_parquet, runs[key], *flags, processes=processes)
            shown = end(process)
            assert process.returncode == 0, shown[-3000:]
        return runs[key]

    return get


def engine_of(case: int) -> str:
    return "vllm" if case % 4 == 0 else "hf"  # vLLM takes longer to start, and is no other to the trainer


@pytest.mark.parametrize(
    ("case", "number", "point"),
    [
        pytest.param(i, *case, id=" ".join(case), marks=[pytest.mark.faults] * (case not in SAMPLE))
        for i, case in enumerate(CASES)
    ],
)
def test_a_run_that_was_ended_goes_on_to_the_same_weights(
    whole, tiny_model, demo_parquet, tmp_path, case, number, point
):
    engine = engine_of(case)
    out = tmp_path / "run"
    step = "4" if point in SAVING else "3"
    process = start(tiny_model, demo_parquet, out, "--engine_type", engine, fault=(point, step, number))
    shown = end(process)
    assert process.returncode == EXIT[number], shown[-3000:]
    assert orphans(out) == []
    if number != "SIGKILL":
        assert f"{number}: step" in shown and "Traceback" not in shown
    assert (out / "_actor" / "latest").is_file()
    process = start(tiny_model, demo_parquet, out, "--engine_type", engine, "--load_checkpoint")
    shown = end(process)
    assert process.returncode == 0, shown[-3000:]
    reference = whole(engine, 1)
    assert same_weights(reference, out)
    assert comparable(out) == comparable(reference)
    record, best = ((folder / "best" / "best.json").read_text() for folder in (reference, out))
    assert best == record
    assert same_weights(reference / "best", out / "best")
    for pattern in ("_actor/*", "hf_step_*"):
        assert {path.name for path in out.glob(pattern)} == {path.name for path in reference.glob(pattern)}
    assert not list(out.rglob("*.part"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "engine"), [("SIGTERM", ["hf"]), ("SIGKILL", ["hf"]), ("SIGKILL", ["vllm", "--engine_tp_size", "2"])]
)
def test_two_processes_go_on_to_the_same_weights(whole, tiny_model, demo_parquet, tmp_path, number, engine):
    """One rank gets the signal. Asked to stop, both save; killed, the other ends soon, and rank and cause are named."""
    out = tmp_path / "run"
    fault = ("first micro-batch", "3", number)
    flags = ("--engine_type", *engine)
    process = start(tiny_model, demo_parquet, out, *flags, fault=fault, processes=2)
    started = time.monotonic()
    shown = end(process)
    assert process.returncode != 0
    if number == "SIGKILL":
        assert "exitcode  : -9" in shown and "Signal 9" in shown and "rank      : 1" in shown
        assert f"ERROR: rank 1 on {socket.gethostname()} is lost" in shown, shown[-3000:]
    else:
        assert "SIGTERM: step 3 is the last one that is done and saved" in shown, shown[-3000:]
    assert time.monotonic() - started < 120
    assert orphans(out) == []
    process = start(tiny_model, demo_parquet, out, *flags, "--load_checkpoint", processes=2)
    shown = end(process)
    assert process.returncode == 0, shown[-3000:]
    reference = whole(engine[0], 2, *engine[1:])
    assert same_weights(reference, out)
    assert comparable(out) == comparable(reference)


@pytest.mark.parametrize(
    ("action", "processes"),
    [("warn", 1), *(pytest.param(*case, marks=pytest.mark.faults) for case in [("stop", 1), ("warn", 2), ("stop", 2)])],
)
def test_a_full_disk_costs_one_checkpoint_at_most(whole, tiny_model, demo_parquet, tmp_path, action, processes):
    """It fills up in the second save: the first one stays, the run goes on or ends, and no weight is another."""
    out = tmp_path / "run"
    flags = ("--engine_type", "hf", "--on_save_error", action)
    process = start(tiny_model, demo_parquet, out, *flags, fault=("before a save", "4", "FULL"), processes=processes)
    shown = end(process)
    folder = out / "_actor"
    assert "File too large" in shown, shown[-3000:]
    assert processes > 1 or "Traceback (most recent call last)" not in shown, shown[-3000:]  # torchrun has its own
    left = sorted(path.name for path in folder.iterdir() if path.suffix != ".py")
    assert left == ["latest", "run.json", "step_000002"]
    assert damage(folder / "step_000002") is None
    if action == "warn":
        assert process.returncode == 0 and "step 4 could not be saved (rank 0: " in shown, shown[-3000:]
        assert [record["health/failed_saves"] for record in metrics_of(out)] == [0, 0, 0, 0, 1]
    else:
        assert process.returncode == (5 if processes == 1 else 1), shown[-3000:]
        assert shown.count("train_colocate.py: error: rank 0: ") == 1
        process = start(tiny_model, demo_parquet, out, *flags, "--load_checkpoint", processes=processes)
        assert end(process) and process.returncode == 0
    reference = whole("hf", processes)
    assert same_weights(reference, out)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("several", "last"),
    [("--train_batch_size 8 --max_epochs 2", 3), ("--train_batch_size 32 --eval_steps 1 --save_steps 5", 2)],
)
def test_between_two_optimizer_steps_of_a_rollout_a_run_does_not_stop(
    whole, tiny_model, demo_parquet, tmp_path, several, last
):
    """The weights are no whole step's there: it stops after the last of them, and goes on to the same weights.

    Where an optimizer step takes two rollouts, it goes on from the last one that is whole.
    """
    out, several = tmp_path / "run", shlex.split(several)
    flags = ("--engine_type", "hf", *several)
    process = start(tiny_model, demo_parquet, out, *flags, fault=("second micro-batch", "3", "SIGTERM"))
    shown = end(process)
    assert f"SIGTERM: step {last} is the last one that is done and saved" in shown, shown[-3000:]
    process = start(tiny_model, demo_parquet, out, *flags, "--load_checkpoint")
    assert end(process) and process.returncode == 0
    reference = whole("hf", 1, *several)
    assert same_weights(reference, out)
    assert comparable(out) == comparable(reference)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("action", "flags", "steps"), [("warn", (), 1), ("skip", (), 1), ("skip", ("--train_batch_size", "8"), 2)]
)
def test_a_loss_that_is_no_number_ends_the_run_or_costs_one_step(
    tiny_model, demo_parquet, tmp_path, action, flags, steps
):
    """``steps``: optimizer steps a rollout, of which the second one's only loss is the one that is no number."""
    out = tmp_path / "run"
    flags = ("--engine_type", "hf", "--on_anomaly", action, *flags)
    process = start(tiny_model, demo_parquet, out, *flags, fault=("second micro-batch", "3", "NAN"))
    shown = end(process)
    if action == "warn":
        assert process.returncode == 1 and "the loss of step 3, epoch 0, micro-batch 1 is nan" in shown, shown[-3000:]
        assert "ends the run: step" not in shown  # the weights may be the cause
        return
    assert process.returncode == 0, shown[-3000:]
    assert shown.count("step 3: 1 micro-batch(es) with a loss or gradient that is not finite; its optimizer step") == 1
    records = metrics_of(out)
    assert [record["train/not_finite"] for record in records] == [0, 0, 1, 0, 0]
    alike = [record["rollout/groups_without_spread"] == 1 for record in records]
    left_out = [steps * one or record["train/not_finite"] for one, record in zip(alike, records, strict=True)]
    assert [record["health/skipped_steps"] for record in records] == list(itertools.accumulate(left_out))
    weights = load_file(out / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.faults
def test_a_second_ctrl_c_leaves_at_once(tiny_model, demo_parquet, tmp_path):
    out = tmp_path / "run"
    process = start(tiny_model, demo_parquet, out, "--engine_type", "hf", "--num_episodes", "50")
    wait_for(lambda: (out / "metrics.jsonl").exists() and metrics_of(out), process)
    # stopped in between, it cannot finish its step before the second one
    os.kill(process.pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    shown = end(process, 60)
    assert process.returncode == 130, shown[-2000:]


@pytest.mark.faults
def test_the_launch_script_saves_on_a_signal_and_resumes(tiny_model, demo_parquet, tmp_path):
    sizes = "MLP_WORKER_0_PORT=20393 MLP_WORKER_GPU=1 RBS=4 N_SAMPLES=4 TBS=16 GENERATE_MAX_LEN=12"
    environment = os.environ | dict(pair.split("=") for pair in sizes.split()) | {"PYTHON": sys.executable}
    environment |= {"PATH_TO_YOUR_BASE_MODEL": str(tiny_model), "PATH_TO_YOUR_AVQA_DATASET": str(demo_parquet)}
    command = ["bash", str(LAUNCH_SCRIPT), "--engine_type", "hf", "--num_episodes"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    process = subprocess.Popen([*command, "50"], env=environment, start_new_session=True, **pipes)
    wait_for(lambda: any(metrics_of(path.parent) for path in tmp_path.glob("results/*/*/metrics.jsonl")), process)
    os.killpg(process.pid, signal.SIGUSR1)  # as Slurm does
    shown = end(process)
    assert process.returncode == 138 and "SIGUSR1: step" in shown, shown[-2000:]
    [run] = tmp_path.glob("results/*/*")
    done = len(metrics_of(run))
    command += ["1", "--allow_changes", "num_episodes", "max_samples"]
    process = subprocess.Popen(command, env=environment | {"RESUME": "1", "MAX_SAMPLES": "16"}, **pipes)
    shown = end(process)
    assert process.returncode == 0 and f"resuming {run.relative_to(tmp_path)}" in shown, shown[-2000:]
    assert [record["step"] for record in metrics_of(run)] == list(range(1, max(done, 4) + 1))
    assert list(tmp_path.glob("results/*/*")) == [run]


def test_several_nodes_must_name_the_run(tmp_path):
    environment = {"MLP_WORKER_NUM": 2, "PATH_TO_YOUR_AVQA_DATASET": "x", "PYTHON": sys.executable}
    done = run_command("bash", LAUNCH_SCRIPT, cwd=tmp_path, check=False, **environment)
    assert done.returncode == 2 and "RUN_ID is not set" in done.stderr
    assert list(tmp_path.iterdir()) == []
