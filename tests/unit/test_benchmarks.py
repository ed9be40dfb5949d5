"""The benchmarks start, one of them runs to its end, and limits are judged."""

import json
import math
import subprocess
import sys

import bench_rewards
import harness
import pytest
import run_all
from conftest import ROOT, child_environment

SCRIPTS = sorted(
    path for path in (ROOT / "benchmarks").rglob("*.py") if "def main(" in path.read_text(encoding="utf-8")
)


def test_run_all_runs_every_benchmark():
    assert sorted(run_all.BENCHMARKS) == sorted(
        p.stem.removeprefix("bench_") for p in SCRIPTS if p.parent.name != "gpu" and p.stem.startswith("bench_")
    )
    for name in run_all.BENCHMARKS:
        takes_demo = "demo=False" not in (ROOT / "benchmarks" / f"bench_{name}.py").read_text(encoding="utf-8")
        assert takes_demo == (name not in run_all.WITHOUT_DEMO), name


def test_every_script_explains_itself():

    for script in SCRIPTS:
        command = [sys.executable, str(script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=120)
        assert done.returncode == 0, f"{script.name}: {done.stderr[-2000:]}"
        assert done.stdout.startswith("usage: "), script.name


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
