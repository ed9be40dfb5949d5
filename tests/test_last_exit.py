"""last_exit.py: a process ends with its own status, whatever gloo's threads are at."""

import subprocess
import sys

import pytest
from conftest import EXAMPLE

# A thread of gloo waits for Python's lock when main ends, which keeps it for the last 0.5 s. The tensors are large:
# main has, nearly always, let go of them before the collective is done.
SCRIPT = """
import atexit, sys, time
sys.path.insert(0, {example!r})
import last_exit
import torch
import torch.distributed as dist

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sys.setswitchinterval(60)
    dist.all_gather([torch.empty(10_000_000)], torch.ones(10_000_000), async_op=True)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    atexit.register(print, "a handler ran")
    sys.stdout.write("not flushed yet, ")
    {end}

{call}
"""


def run(end, call):
    script = SCRIPT.format(example=str(EXAMPLE), end=end, call=call)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_pythons_own_end_is_what_aborts():
    for _ in range(10):
        done = run("pass", "main()")
        if done.returncode:
            break
    assert done.returncode == -6 and "terminate called" in done.stderr


@pytest.mark.parametrize(
    ("end", "status"),
    [("pass", 0), ("raise SystemExit", 0), ("sys.exit(5)", 5), ("sys.exit(0)", 0)],
)
def test_the_status_is_mains(end, status):
    done = run(end, "last_exit.run(main)")
    assert (done.returncode, done.stdout, done.stderr) == (status, "not flushed yet, a handler ran\n", "")


def test_an_error_is_shown():
    script = f"import sys; sys.path.insert(0, {str(EXAMPLE)!r}); import last_exit\n"
    for raised, status, shown in (
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("raise SystemExit('said')", 1, "said\n"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
    ):
        code = f"{script}def main():\n    {raised}\nlast_exit.run(main)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == status and shown in done.stderr
