"""Let gloo's threads finish before Python ends, so that a training of several processes ends with its own exit status.

gloo lets go of a collective's tensors on a thread of its own, a moment after the collective is done, and needs Python's
lock for it. Python ends a thread that asks for the lock while the interpreter is taken apart; within a C++ destructor
that aborts the process: "terminate called without an active exception", status 134, after a run in which all went well.
So the script's last exit handler waits for these threads, without holding the lock.
"""

import time
from pathlib import Path

THREAD = "pt_gloo_runloop"
PAUSE = 0.02  # seconds in which a thread that waits for the lock gets it
MOST = 5.0  # seconds to wait; a collective that other ranks never join keeps its thread for ever


def settle() -> None:
    """Wait until the threads of gloo sleep, and nothing has woken them for :data:`PAUSE`."""
    deadline = time.monotonic() + MOST
    before = _threads()
    while before and time.monotonic() < deadline:
        time.sleep(PAUSE)
        now = _threads()
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now


def _threads() -> dict[str, tuple[str, tuple[str, ...]]]:
    """gloo's threads by id: state (R: runs or could, S: sleeps), and how often each was switched to."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            if (task / "comm").read_text().strip() != THREAD:
                continue
            lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        except OSError:  # it has just ended
            continue
        switches = tuple(value.strip() for name, value in lines.items() if name.endswith("ctxt_switches"))
        found[task.name] = (lines["State"].split()[0], switches)
    return found
