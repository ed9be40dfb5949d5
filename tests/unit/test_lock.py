"""aqa/common/lock.py: one living process holds a lock, a dead one's is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import wait_until_gone

from aqa.common import lock as lock_module
from aqa.common.lock import LockedError, lock

EXAMPLE = str(Path(lock_module.__file__).parents[2])
HOLD = """
import sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from aqa.common.lock import lock
with lock(Path(sys.argv[1]), "--out_file x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    path = tmp_path / "lock.json"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), EXAMPLE], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process, path
        process.kill()


def test_a_living_process_is_named_and_a_killed_one_is_succeeded(holder):
    process, path = holder
    refusal = rf"--out_file x is in use by process {process.pid} on host .* since 20"
    with pytest.raises(LockedError, match=refusal), lock(path, "--out_file x"):
        pass
    process.send_signal(signal.SIGKILL)
    wait_until_gone(process.pid)  # though nobody has reaped it
    with lock(path, "--out_file x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_process_id_that_another_program_has_now_is_no_owner(tmp_path):
    path = tmp_path / "lock.json"
    with lock(path, "x"):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"pid": 1}))
    with lock(path, "x"):
        pass


@pytest.mark.parametrize(
    "differs",
    [
        {"host": "far", "sees": ["another boot", "pid:[1]", "0"]},
        {"sees": ["as here", "another container's", "0"], "pid": 2**22 + 1},  # of the same host name
        {"sees": None, "pid": 2**22 + 1, "started": None},  # there is no /proc
    ],
)
def test_an_owner_that_cannot_be_looked_up_lives_as_long_as_it_touches_the_file(tmp_path, monkeypatch, capsys, differs):
    monkeypatch.setattr(lock_module, "PATIENCE", 1.5)
    if differs["sees"] is None:
        monkeypatch.setattr(lock_module, "_sees", lambda: None)
        monkeypatch.setattr(lock_module, "_start_of", lambda pid: None)
    path = tmp_path / "lock.json"
    with lock(path, "x"):
        far = json.dumps(json.loads(path.read_text()) | differs)
    path.write_text(far)
    touch = threading.Timer(0.5, os.utime, (path,))
    touch.start()
    with pytest.raises(LockedError, match="is in use by process"), lock(path, "x"):
        pass
    assert path.read_text() == far
    with lock(path, "x"):  # nobody touched it
        assert "waiting for a sign of life" in capsys.readouterr().err


def test_an_owner_whose_place_was_taken_while_it_was_stopped_ends(tmp_path):
    path = tmp_path / "lock.json"
    hold = HOLD.replace("with lock", "import aqa.common.lock\naqa.common.lock.BEAT = 0.1\nwith lock")
    command = [sys.executable, "-c", hold, str(path), EXAMPLE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        path.write_text("another's")
        process.send_signal(signal.SIGCONT)
        try:
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 1 and "--out_file x: this process gave no sign of life" in said
    assert path.read_text() == "another's"


@pytest.mark.parametrize("left", ["", "{", "[1]", "\0"])
def test_what_a_kill_left_of_a_lock_is_replaced(tmp_path, left):
    path = tmp_path / "lock.json"
    path.write_text(left)
    with lock(path, "x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_of_several_that_take_over_at_once_one_has_it(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text("{")
    race = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(path), EXAMPLE], stdout=subprocess.PIPE) for _ in range(4)
    ]
    try:
        race_ended = [process.stdout.readline() for process in race]
    finally:
        for process in race:
            process.kill()
            process.communicate()
    assert race_ended.count(b"held\n") == 1
