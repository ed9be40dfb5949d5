"""The end of a process that has trained with several: its own status, whatever gloo's threads are at.

gloo lets go of a collective's tensors on a thread of its own, a moment after the collective is done, and needs Python's
lock for it. Python ends a thread that asks for the lock while the interpreter is taken apart; within a C++ destructor
that aborts the process: "terminate called without an active exception", status 134, after a run in which all went well.
So the process ends before the interpreter is taken apart, after everything else that Python does at an end: non-daemon
threads joined, exit handlers called, output flushed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable

_status: int | None = None  # None: Python ends as it always does


def run(main: Callable[[], None]) -> None:
    """Call a script's main function, and have the process end with its status.

    :param main: Returns, or raises ``SystemExit``, for a status of 0 or its own. After any other exception Python's
        own end follows.
    """
    global _status
    try:
        main()
        _status = 0
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            _status = done.code or 0
        raise


def _end() -> None:
    if _status is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a closed stream
            stream.flush()
    os._exit(_status)


atexit.register(_end)  # handlers run in reverse order: imported before all that has one, this comes last
