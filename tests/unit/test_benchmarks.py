"""One of the benchmarks runs to its end, limits are judged, and what is for a GPU runs on a CPU."""

import importlib
import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import bench_rewards
import harness
import predict
import pytest
import torch
from conftest import ROOT, run_command, wait_until_gone
from gpu import record
from gpu import run as gpu_run


def test_a_folder_without_the_demo_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--demo_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        harness.parse(harness.make_parser("what it does"))
    assert end.value.code == 2
    assert f"{tmp_path}/model is no folder; run make demo first" in capsys.readouterr().err


def test_rewards_run_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_rewards.py", "--questions", "5", "--rounds", "1"])
    with pytest.raises(SystemExit):  # with 1 where so few questions do not reach the limit
        bench_rewards.main()
    (path,) = tmp_path.glob("*.json")
    speed, different = json.loads(path.read_text())["rewards"]["figures"]
    assert speed["value"] > 0
    assert different == {"what": "rewards: values that differ, of 80", "value": 0, "limit": "at most 0", "met": True}


@pytest.mark.parametrize(("value", "met"), [(0.5, True), (0.51, False), (math.nan, False)])
def test_a_missed_limit_ends_with_status_1(tmp_path, monkeypatch, value, met):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    for name in ("first", "second"):  # the second leaves the first in the file
        report = harness.Report(name, 5)
        report.judge("share", value, at_most=0.5)
        report.judge("times", 3.0, at_least=3)
        report.judge("seconds", 7.25)
        with pytest.raises(SystemExit) as end:
            report.finish(detail=1)
        assert end.value.code == int(not met)
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert list(found) == ["first", "second"]
    assert [figure["met"] for figure in found["first"]["figures"]] == [met, True, None]


def test_rounds_take_turns_and_the_ratio_is_the_median_of_pairs():
    order = []
    found = harness.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b"] * 3 and [len(times) for times in found.values()] == [2, 2]  # the first warms up
    assert harness.ratio([2.0, 4.0, 10.0], [1.0, 4.0, 1.0]) == 2.0  # of 2, 1, 10; the medians' ratio is 4


# ------------------------------------------------------------------------------------------------------------ on a GPU
def test_a_case_that_fails_is_recorded_and_done_again(tmp_path, capsys):
    args = Namespace(small=True, out=tmp_path, demo_dir=tmp_path)

    def work(kind):
        def run():
            calls.append(kind)
            if kind == "skipped":
                raise record.Skip("no such package")
            if kind == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return record.judge({"share": math.nan if kind == "missed" else 0.5, "n": 3}, share=(0.5, None))

        return run

    for again in (False, True):
        calls = []
        section = record.Section(record.Results(tmp_path / "results.json", True), "steps", args, [])
        for kind in ("out of memory", "missed", "ok", "skipped"):
            section.case(kind, work(kind))
        assert calls == ["out of memory", "missed", *["ok"] * (not again), "skipped"]  # it may be possible now
    results = record.Results(tmp_path / "results.json", True)
    cases = results.section("steps")["cases"]
    assert {name: case["status"] for name, case in cases.items()} == {name: name for name in cases}
    assert cases["missed"]["message"] == "share is nan, at least 0.5 was wanted"
    assert cases["ok"]["figures"] == {"share": 0.5, "n": 3} and "share 0.5; n 3" in capsys.readouterr().out
    results.section("steps")["status"] = "ok"
    assert results.is_wrong("steps") and not results.is_whole("steps")
    real = record.Results(tmp_path / "results.json", False)
    assert real.section("steps")["cases"] == {}  # tiny sizes count as no figures


@pytest.mark.timeout(60)
def test_a_section_over_its_time_is_ended_with_its_children(tmp_path, monkeypatch):
    """What it was at is named; another section's record stays."""
    monkeypatch.setattr(gpu_run, "LEAST", 0.0)
    results = record.Results(tmp_path / "results.json", True)
    results.section("sync")["cases"] = {"checksums": {"status": "running", "seconds": 0.0, "figures": {}}}
    results.section("adamw")["status"] = "ok"
    results.write()
    popen, log = subprocess.Popen, tmp_path / "all.log"

    def start(command, **kwargs):
        process = popen(["bash", "-c", "sleep 600 & echo $!; wait"], **kwargs)
        while not log.read_text().endswith("\n"):
            time.sleep(0.01)
        return process

    monkeypatch.setattr(gpu_run.subprocess, "Popen", start)
    gpu_run.run_section(Namespace(small=True, out=tmp_path, only=[], demo_dir=tmp_path), "sync", 0.1, [])
    wait_until_gone(int(log.read_text()))
    results = record.Results(tmp_path / "results.json", True)
    assert results.section("sync")["status"] == "over 0 s"
    assert results.section("sync")["cases"]["checksums"]["status"] == "not ended"
    assert results.is_wrong("sync") and results.is_whole("adamw")


def test_a_section_for_the_gpu_runs_on_a_cpu(tmp_path):
    """The slow test below runs the others."""
    args = Namespace(small=True, out=tmp_path, demo_dir=tmp_path)
    section = record.Section(record.Results(tmp_path / "results.json", True), "planner", args, [])
    importlib.import_module("gpu.planner").run(section)
    assert len(section.cases) == 4 and {case["status"] for case in section.cases.values()} == {"ok"}


def run_all_sh(out: Path, *flags: object, **kwargs) -> subprocess.CompletedProcess:
    script = ROOT / "benchmarks" / "gpu" / "all.sh"
    settings = ("--small", "--out", out, "--minutes", 60)
    return run_command("bash", script, *settings, *flags, PYTHON=sys.executable, timeout=900, **kwargs)


def test_one_command_runs_sections_and_a_second_call_only_what_is_left(tmp_path, tiny_model):
    (tmp_path / "model").symlink_to(tiny_model)
    flags = ("--demo_dir", tmp_path, "--only", "training:FSDP2, offload")
    done = run_all_sh(tmp_path / "out", *flags)
    assert "training: in part" in done.stdout and "FSDP2, offload" in (tmp_path / "out" / "summary.txt").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sections"]["training"]["cases"]
    assert list(found) == ["FSDP2, offload"] and found["FSDP2, offload"]["figures"]["gap"] < 1e-5
    assert run_all_sh(tmp_path / "out", "--only", "nothing", check=False).returncode == 2


@pytest.mark.slow
def test_everything_for_the_gpu_runs_on_a_cpu(tmp_path, tiny_model):
    (tmp_path / "model").symlink_to(tiny_model)
    run_all_sh(tmp_path / "out", "--demo_dir", tmp_path)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sections"]
    assert list(found) == list(gpu_run.SECTIONS)
    resumed = found["training"]["cases"]["ZeRO-2, save and resume"]["figures"]
    assert resumed["resumed, gradient off by"] < 1e-6


def test_the_prediction_by_hand():
    """Two prompts of 340 tokens with 8 answers of 24 on each of 8 A100."""
    today, before = (predict.predict(predict.GPUS["A100"], way) for way in (predict.Way(), predict.BEFORE))
    # a layer's 4 matrices of 4096^2 and 3 of 4096 * 11008; the head; keys and values of 16 sequences of 364 tokens
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 156_032 * 4096
    small = 32 * (3 * 4096 + 2 * 4096)  # biases and norms
    read = 2 * (layers + small + head) + 16 * 364 * 32 * 2 * 4096 * 2
    assert today["decode"] == before["decode"] == pytest.approx(24 * read / (0.7 * 2.04e12))
    # a group: 340 + 192 tokens, each attending to all; 192 logits; 500 states of the tower, 250 of the projector
    tower = 500 * 32 * (4 * 1280**2 + 2 * 1280 * 5120) + 1000 * 3 * 128 * 1280 + 500 * 3 * 1280**2 + 250 * 1280 * 4096
    attention = 4 * 32 * 532**2 * 4096 + 4 * 32 * 500**2 * 1280
    flops = 2 * (532 * layers + 192 * head + tower) + attention
    assert today["train"] == pytest.approx(2 * 4 * flops / (0.4 * 312e12))  # more than the three gathers take
    assert (before["sleep"], today["sleep"]) == (pytest.approx(2 * 2 * 8_397_094_912 / 25e9), 0)
    assert sum(today.values()) < 1.8 < 4.6 < sum(before.values())
