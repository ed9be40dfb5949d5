"""aqa/common/lock.py: one living process holds a lock, a dead one's is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

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
    while " Z " not in Path(f"/proc/{process.pid}/stat").read_text():  # dead, though nobody has reaped it
        pass
    with lock(path, "--out_file x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_process_id_that_another_program_has_now_is_no_owner(tmp_path):
    path = tmp_path / "lock.json"
    with lock(path, "x"):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"pid": os.getppid()}))
    with lock(path, "x"):
        pass


def test_an_owner_on_another_host_lives_as_long_as_it_touches_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock_module, "PATIENCE", 1.5)
    path = tmp_path / "lock.json"
    with lock(path, "x"):
        far = json.dumps(json.loads(path.read_text()) | {"host": "far"})
    path.write_text(far)
    touch = threading.Timer(0.5, os.utime, (path,))
    touch.start()
    with pytest.raises(LockedError, match="on host far"), lock(path, "x"):
        pass
    assert path.read_text() == far
    with lock(path, "x"):  # nobody touched it
        assert "waiting for a sign of life" in capsys.readouterr().err


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
