"""gloo_shutdown.py: a process ends with its own status, whatever gloo's threads are at."""

import itertools
import time

import pytest
from conftest import run_code

from aqa.training import gloo_shutdown

# A thread of gloo waits for Python's lock when main ends, which keeps it for the last 0.5 s. The tensors are large:
# main has, nearly always, let go of them before the collective is done.
SCRIPT = """
import atexit, sys, time
from aqa.training import gloo_shutdown
atexit.register(gloo_shutdown.settle)
import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sys.setswitchinterval(60)
dist.all_gather([torch.empty(10_000_000)], torch.ones(10_000_000), async_op=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    pass
"""


@pytest.mark.parametrize(("last", "status"), [("sys.exit(5)", 5), ("raise ValueError", 1)])
def test_the_status_is_the_scripts(last, status):
    done = run_code(SCRIPT + last, check=False)
    assert done.returncode == status and "terminate called" not in done.stderr


@pytest.mark.parametrize(
    ("state", "woken", "least", "most"),
    [("S", False, 1, 1), ("R", False, 5, 100), ("S", True, 5, 100)],  # asleep, running, woken again and again
)
def test_it_waits_while_a_thread_works_but_not_for_ever(monkeypatch, state, woken, least, most):
    looks = itertools.count()

    def threads():
        look = next(looks)
        return {"1": (state, (str(look if woken else 0),))}

    monkeypatch.setattr(gloo_shutdown, "_threads", threads)
    monkeypatch.setattr(gloo_shutdown, "MOST", 0.2)
    started = time.monotonic()
    gloo_shutdown.settle()
    assert time.monotonic() - started < 1 and least <= next(looks) - 1 <= most


def test_without_threads_of_gloo_nothing_is_waited_for():
    code = "import time; from aqa.training import gloo_shutdown; begin = time.monotonic(); gloo_shutdown.settle(); "
    run_code(code + "assert time.monotonic() - begin < gloo_shutdown.PAUSE")
