"""Training on several hosts: two that are made here as namespaces with a virtual cable between, see hosts.py.

The launch script is started on both, as a user would.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAUNCH_SCRIPT, child_environment, wait_for
from hosts import CABLE, Host, Pair, cannot
from support.training import comparable, end

pytestmark = pytest.mark.faults
PORT = "20092"
SETTINGS = {"RBS": 4, "N_SAMPLES": 4, "TBS": 16, "MICRO_TRAIN": 4, "GENERATE_MAX_LEN": 12, "LR": 1e-3, "WARMUP": 0}
SETTINGS |= {"MLP_WORKER_GPU": 1, "RUN_ID": "run", "EXPERIMENT_NAME": "x", "EVAL_STEPS": -1, "PYTHON": sys.executable}


@pytest.fixture
def hosts():
    if reason := cannot():
        pytest.skip(reason)
    before = Path("/proc/net/dev").read_text().count(":")
    with Pair() as pair:
        assert Path("/proc/net/dev").read_text().count(":") == before  # nothing of it is in this machine's network
        yield pair


def environment(model: Path, data: Path, steps: int, **settings: object) -> dict[str, str]:
    """What the launch script is told: steps of four prompts, a multiple of ten of them."""
    paths = {"PATH_TO_YOUR_BASE_MODEL": model, "PATH_TO_YOUR_AVQA_DATASET": data, "MAX_SAMPLES": 40}
    settings["EPISODE"] = steps // 10
    return child_environment() | {name: str(value) for name, value in (SETTINGS | paths | settings).items()}


def start(hosts: list[Host], folder: Path, settings: dict[str, str], *flags: object) -> list[subprocess.Popen]:
    """The launch script on both hosts, in one folder."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    where = {"MLP_WORKER_NUM": "2", "MLP_WORKER_0_HOST": "node0", "MLP_WORKER_0_PORT": PORT}
    return [
        host.start(["bash", LAUNCH_SCRIPT, *flags], folder, env=settings | where | {"MLP_ROLE_INDEX": str(i)}, **pipes)
        for i, host in enumerate(hosts)
    ]


def run_of(folder: Path) -> Path:
    (run,) = folder.glob("results/x/*-run")
    return run


def wait_for_steps(folder: Path, count: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not (files := list(folder.glob("results/*/*/metrics.jsonl"))) or files[0].read_text().count("\n") < count:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            pytest.fail("".join(process.communicate()[0][-3000:] for process in processes))
        time.sleep(0.1)


def assert_nothing_is_left(host: Host) -> None:
    wait_for(lambda: (host.processes(), host.listening()) == ([], []), seconds=10)  # tee ends after the launch script


@pytest.fixture
def alone(tiny_model, demo_parquet, tmp_path):
    """Metrics of the first steps of one process with the same global batch; of all if none are named."""

    def get(steps: int, until: int = 0, *flags: object) -> list[dict]:
        folder = tmp_path / "alone"
        settings = environment(tiny_model, demo_parquet, steps, MLP_WORKER_0_PORT=20394)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        folder.mkdir()
        process = subprocess.Popen(["bash", LAUNCH_SCRIPT, *flags], cwd=folder, env=settings, **pipes)
        if until:
            wait_for_steps(folder, until, [process])
            process.send_signal(signal.SIGTERM)
        shown = end(process)
        assert process.returncode == (143 if until else 0), shown[-3000:]
        return comparable(run_of(folder))[: until or None]

    return get


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-4), f"step {theirs['step']}: {name}"


def test_two_hosts_train_as_one_process_and_end_together(hosts, alone, tiny_model, demo_parquet, tmp_path):
    """The same metrics in two steps; then one host loses its power: the other says so and ends."""
    settings = environment(tiny_model, demo_parquet, 20)
    processes = start(hosts, tmp_path, settings, "--engine_type", "hf")
    wait_for_steps(tmp_path, 2, processes)
    killed = time.monotonic()
    hosts[1].kill()
    shown = end(processes[0], 60)
    seconds = time.monotonic() - killed
    assert processes[0].returncode == 1
    assert "ERROR: rank 1 on node1 is lost: its process ended without a word" in shown, shown[-3000:]
    assert "Traceback" not in shown.split("ERROR: rank 1")[0]
    assert seconds < 20, seconds
    assert_nothing_is_left(hosts[0])
    found = comparable(run_of(tmp_path))
    assert_equal(found[:2], alone(20, 2, "--engine_type", "hf"))


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_twenty_steps_are_those_of_one_process(hosts, alone, tiny_model, demo_parquet, tmp_path, engine):
    processes = start(hosts, tmp_path, environment(tiny_model, demo_parquet, 20), "--engine_type", engine)
    shown = [end(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    for host in hosts:
        assert_nothing_is_left(host)
        (state,) = json.loads(host.run("ip", "-json", "-stats", "link", "show", CABLE))
        # half of the gradients, each step
        assert state["stats64"]["tx"]["bytes"] > 20 * (tiny_model / "model.safetensors").stat().st_size / 2
    assert_equal(comparable(run_of(tmp_path)), alone(20, 0, "--engine_type", engine))


@pytest.mark.parametrize("host", [0, 1])
def test_a_cut_cable_ends_both_hosts(hosts, tiny_model, demo_parquet, tmp_path, host):
    processes = start(hosts, tmp_path, environment(tiny_model, demo_parquet, 400), "--engine_type", "hf")
    wait_for_steps(tmp_path, 2, processes)
    cut = time.monotonic()
    hosts[host].ip("link", "set", CABLE, "down")
    shown = [end(process, 60) for process in processes]
    seconds = time.monotonic() - cut
    print(f"{seconds:.1f} s")
    assert [process.returncode for process in processes] == [1, 1]
    for i in (0, 1):
        expected = f"ERROR: rank {1 - i} on node{1 - i} is lost: no answer for 30 s"
        assert expected in shown[i], shown[i][-3000:]
        assert_nothing_is_left(hosts[i])
    assert seconds < 60


def test_the_host_that_the_others_meet_at_dies(hosts, tiny_model, demo_parquet, tmp_path):
    """Node 0, where torchrun's store is; and it dies at the start, before or after the ranks have met."""
    processes = start(hosts, tmp_path, environment(tiny_model, demo_parquet, 400), "--engine_type", "hf")
    wait_for(lambda: list(tmp_path.glob("results/x/*-run/logs/rank1.log")), processes[1])
    killed = time.monotonic()
    hosts[0].kill()
    shown = end(processes[1], 60)
    seconds = time.monotonic() - killed
    print(f"{seconds:.1f} s")
    assert processes[1].returncode == 1
    met, not_met = "ERROR: rank 0 on node0 is lost", "rank 1 on node1 and the others do not meet at node0:20092"
    assert met in shown or not_met in shown, shown[-3000:]
    assert_nothing_is_left(hosts[1])


def test_an_engine_a_host(hosts, alone, tiny_model, demo_parquet, tmp_path):
    """Two hosts of two processes: data parallel over the hosts, tensor parallel in vLLM and ZeRO-3 over all four."""
    settings = environment(tiny_model, demo_parquet, 10, MLP_WORKER_GPU=2, ENGINE_TP=2)
    processes = start(hosts, tmp_path, settings, "--zero_stage", 3)
    shown = [end(process, 500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    found, expected = comparable(run_of(tmp_path)), alone(10, 0, "--engine_type", "vllm")
    assert len(found) == 10
    assert_equal(found, expected)
