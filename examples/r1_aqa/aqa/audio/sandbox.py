"""Guards for audio that others provide: decode it in a process with limits, keep its paths inside a folder.

The worker is a bare interpreter without torch; it lives as long as its owner and is started again when it dies. It
bounds what a hostile or broken file can cost (memory, time, a crash). It runs as the same user, so it does not protect
against a file that takes over the decoder. Overhead: 0.3 s once a process, 0.2 ms a clip of 10 s.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aqa.common.constants import HOP_LENGTH, MAX_FRAMES

if TYPE_CHECKING:
    import numpy as np

PACKAGES = str(Path(__file__).resolve().parents[2])
SECONDS = 30.0  # a clip decodes in milliseconds; the rest is for a slow network file system
MEBIBYTES = 512  # 30 s of 192 kHz in 8 channels need less than a tenth
START_SECONDS = 120.0  # to import numpy and soundfile from a cold disk
REQUEST, REPLY = struct.Struct("<cI"), struct.Struct("<cI")  # kind, bytes that follow
HEADER = struct.Struct("<qi")  # frames, rate
LOAD, LOAD_SILENCE, READ_HEADER = b"L", b"S", b"H"
READY, DONE, FAILED = b"R", b"D", b"F"
LARGEST_REPLY = 4 * MAX_FRAMES * HOP_LENGTH  # bytes of 30 s of float32


class Sandbox:
    """Decodes in a worker process: one at a time, whatever the number of threads that ask.

    A process that was forked from the owner starts a worker of its own.

    :param seconds: Most time a file may take.
    :param mebibytes: Most memory the worker may allocate, on top of what it has when it is ready.
    :param command: Program of the worker, followed by the two limits; this file if None.
    """

    def __init__(self, seconds: float = SECONDS, mebibytes: int = MEBIBYTES, command: list[str] | None = None) -> None:
        self.seconds, self.mebibytes = seconds, mebibytes
        self.command = command or [sys.executable, "-m", "aqa.audio.sandbox"]
        self._worker: subprocess.Popen | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self.seconds, self.mebibytes, self.command)  # a copy starts its own worker

    def load(self, path: str | Path, silence_ok: bool = False) -> np.ndarray:
        """As :func:`aqa.audio.decode.load_audio`.

        :param silence_ok: Accept a clip of digital silence.
        :raises AudioError: as there, and if the decoder crashes or passes a limit.
        """
        import numpy as np

        from aqa.audio.decode import AudioError, show

        data = self._ask(LOAD_SILENCE if silence_ok else LOAD, path)
        wave = np.frombuffer(data[: len(data) // 4 * 4], dtype=np.float32).copy()
        if len(data) % 4 or not np.isfinite(wave).all():  # what comes back is as little trusted as the file
            raise AudioError(f"{show(path)}: the decoder gave {len(data)} bytes that are no finite samples")
        return wave

    def read_header(self, path: str | Path) -> tuple[int, int]:
        """As :func:`aqa.audio.decode.read_header`.

        :return: Frames and rate (Hz).
        :raises AudioError: as there, and if the decoder crashes or passes a limit.
        """
        frames, rate = HEADER.unpack(self._ask(READ_HEADER, path)[: HEADER.size].ljust(HEADER.size, b"\0"))
        return frames, rate

    def close(self) -> None:
        """End the worker; the next file starts another."""
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            worker.kill()
            worker.wait()
            worker.stdin.close()
            worker.stdout.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end anything may be gone
            self.close()

    def _ask(self, kind: bytes, path: str | Path) -> bytes:
        from aqa.audio.decode import AudioError, show

        try:
            name = os.fsencode(os.path.abspath(path))
        except ValueError as error:
            raise AudioError(f"{show(path)}: is no file name ({error})") from error
        if self._owner != os.getpid():  # after a fork: the worker is the parent's, and so may be who holds the lock
            self._worker, self._owner, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            if self._worker is None or self._worker.poll() is not None:
                self._start()
            try:
                self._worker.stdin.write(REQUEST.pack(kind, len(name)) + name)
                status, reply = self._read_reply(self.seconds)
            except TimeoutError as error:
                self.close()
                raise AudioError(f"{show(path)}: decoding took more than {self.seconds:g} s and was stopped") from error
            except (OSError, EOFError) as error:
                worker = self._worker
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(1)
                how = f"signal {-worker.returncode}" if (worker.returncode or 0) < 0 else f"exit {worker.returncode}"
                self.close()
                raise AudioError(f"{show(path)}: the decoder crashed ({how}; {error})") from error
            except BaseException:  # Ctrl-C between request and reply: the next reply would be this file's
                self.close()
                raise
        if status == FAILED:
            raise AudioError(f"{show(path)}: {reply.decode('utf-8', 'replace')}")
        return reply

    def _start(self) -> None:
        self.close()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # their stacks would count as memory
        # the worker finds this package, and takes no module from the folder that the run was started in
        modules = os.pathsep.join(filter(None, (PACKAGES, os.environ.get("PYTHONPATH"))))
        self._worker = subprocess.Popen(
            [*self.command, str(self.seconds), str(self.mebibytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **threads, "PYTHONPATH": modules, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is the owner's to handle
        )
        try:
            if self._read_reply(START_SECONDS)[0] == READY:
                return
            problem = "wrong greeting"
        except (TimeoutError, EOFError) as error:
            problem = str(error)
        self.close()
        raise RuntimeError(f"--sandbox_audio: the decoder process does not start: {self.command} ({problem})")

    def _read_reply(self, seconds: float) -> tuple[bytes, bytes]:
        deadline = time.monotonic() + seconds
        status, length = REPLY.unpack(self._read(REPLY.size, deadline))
        if length > LARGEST_REPLY:
            raise EOFError(f"a reply of {length} bytes")
        return status, self._read(length, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        pipe, data = self._worker.stdout.fileno(), bytearray()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError("no reply in time")
            chunk = os.read(pipe, size - len(data))
            if not chunk:
                raise EOFError("no reply")
            data += chunk
        return bytes(data)


def serve(load: Callable[..., Any], read_header: Callable[[str], tuple[int, int]]) -> None:
    """The worker: answer requests from stdin on stdout until the owner is gone. Limits are the last two arguments.

    :param load: Decodes a file, :func:`aqa.audio.decode.load_audio`.
    :param read_header: Reads a header, :func:`aqa.audio.decode.read_header`.
    """
    import resource

    seconds, mebibytes = float(sys.argv[-2]), int(sys.argv[-1])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # decoders complain on stderr, which must not become the owner's
        os.dup2(null, descriptor)
    # The address space, not RLIMIT_DATA: nothing here maps more than it uses, and not every kernel keeps the latter.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: used + mebibytes * 2**20, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    reply(replies, READY, b"")
    while request := requests.read(REQUEST.size):
        kind, length = REQUEST.unpack(request)
        path = os.fsdecode(requests.read(length))
        signal.alarm(math.ceil(seconds) + 5)  # ends the worker if its owner was killed meanwhile
        try:
            if kind == READ_HEADER:
                answer = DONE, HEADER.pack(*read_header(path))
            else:
                answer = DONE, load(path, silence_ok=kind == LOAD_SILENCE).tobytes()
        except MemoryError:
            answer = FAILED, f"decoding needs more than {mebibytes} MiB".encode()
        except Exception as error:
            from aqa.audio.decode import AudioError, show

            text = str(error).removeprefix(f"{show(path)}: ") if isinstance(error, AudioError) else repr(error)
            answer = FAILED, text[:1000].encode("utf-8", "replace")
        signal.alarm(0)
        reply(replies, *answer)


def reply(pipe: BinaryIO, status: bytes, data: bytes) -> None:
    """Send an answer.

    :param pipe: To the owner.
    :param status: Kind of answer.
    :param data: What follows.
    """
    pipe.write(REPLY.pack(status, len(data)) + data)
    pipe.flush()


def escape_of(path: str | Path, folder: str | Path) -> str | None:
    """Where a path leads if that is outside a folder, links and ``..`` resolved; None if it stays inside.

    Hard links cannot be told from other files.

    :param path: The path; need not exist.
    :param folder: The folder.
    """
    root = os.path.realpath(folder)
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:
        return f"{path!a} ({error})"
    return None if real == root or real.startswith(root.rstrip(os.sep) + os.sep) else real


if __name__ == "__main__":
    from aqa.audio.decode import load_audio, read_header

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(load_audio, read_header)
