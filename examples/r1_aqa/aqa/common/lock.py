"""Locks that tell who holds them: two processes must not write one run's folder, or one evaluation's files.

A lock is a small JSON file with its owner's host, process and time. A process that can be seen from here is looked up;
an owner on another host or in another container is alive if it touches the file, which needs no clocks that agree.
``flock`` says neither who holds it nor works on every cluster's file system.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 10.0  # seconds between two touches
SETTLE = 0.2  # seconds in which a process that has created or taken over a lock has written it
PATIENCE = 60.0  # seconds without a touch after which an owner that cannot be looked up counts as dead


class LockedError(OSError):
    """Another living process holds the lock; the message says which, and what to do."""


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock during a ``with`` block. A dead owner's lock is taken over.

    :param what: What it protects, as the user knows it, such as ``--save_path results/run``.
    :raises LockedError: if a living process holds it.
    :raises OSError: if the file cannot be written.
    """
    owner = {
        "host": socket.gethostname(),
        "sees": _sees(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    mine = json.dumps(owner)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        _refuse_if_alive(path, what)
        path.write_text(mine, encoding="utf-8")
        time.sleep(SETTLE)  # several may take over a dead owner's lock at once: the last one to write has it
        if _read(path)[0] != mine:
            raise LockedError(f"{what} has just been taken by another process") from None
    ended = threading.Event()
    threading.Thread(target=_touch, args=(path, mine, what, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if os.getpid() == owner["pid"] and _read(path)[0] == mine:  # a forked child leaves its parent's lock alone
            path.unlink()


def _touch(path: Path, mine: str, what: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # a file system that is away for a moment ends no training
            if _read(path)[0] not in (mine, ""):
                print(
                    f"{what}: this process gave no sign of life for a while, and another has taken its place; it ends "
                    "at once and writes nothing more there",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # an orderly end would save first, over the files of the process that now holds the lock
            os.utime(path)


def _refuse_if_alive(path: Path, what: str) -> None:
    text, touched = _read(path)
    if not text:  # its owner is about to write it, or was killed before it did
        time.sleep(SETTLE)
        text, touched = _read(path)
    try:
        owner = json.loads(text)
        host, pid, started = owner["host"], owner["pid"], owner["started"]
        known = f"process {pid} on host {host} since {owner['since']} ({owner['command']})"
    except (ValueError, TypeError, KeyError):
        return  # gone meanwhile, or not written by this module
    if owner.get("sees") == _sees() is not None:
        alive = _start_of(pid) == started
    else:
        print(f"{what} was in use by {known}: waiting for a sign of life", file=sys.stderr, flush=True)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and _read(path) == (text, touched):
            time.sleep(1.0)
        alive = _read(path) not in ((text, touched), ("", 0))
    if alive:
        raise LockedError(f"{what} is in use by {known}; wait until it has ended, or name another place")


def _read(path: Path) -> tuple[str, int]:
    """Content and time of the last touch (ns); empty and 0 if there is no such file."""
    try:
        with path.open(encoding="utf-8") as file:  # opened, because NFS answers stat from a cache
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, UnicodeDecodeError):
        return "", 0


def _sees() -> list[str] | None:
    """What two processes that can look each other up have in common; None where no process can be looked up.

    Host names do not tell: containers may share one, and a user may not be shown another's processes.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None  # /proc is another container's
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return [boot, os.readlink("/proc/self/ns/pid"), str(os.getuid())]
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """When a process that can be looked up started, in clock ticks since boot; None if it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
