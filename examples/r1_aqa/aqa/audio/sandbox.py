"""Guards against untrusted audio: decode it in a process with limits, and keep its paths inside a folder.

The worker is an interpreter without torch. It ends with its owner, which starts another if it dies. It bounds what a
hostile or broken file can cost: memory, time, a crash. It runs as the same user, so it does not protect against a file
that takes over the decoder. It costs 0.3 s per process and 0.2 ms per clip of 10 s.
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

from aqa.common.constants import SAMPLING_RATE

if TYPE_CHECKING:
    import numpy as np

PACKAGES = str(Path(__file__).resolve().parents[2])
SECONDS = 30.0  # a clip decodes in milliseconds; the rest is for a slow network file system
MEBIBYTES = 512  # a clip of 30 s at 192 kHz needs less than a tenth of this, one of 10 minutes at 48 kHz half
START_SECONDS = 120.0  # to import numpy and soundfile from a cold disk
REQUEST, REPLY = struct.Struct("<cI"), struct.Struct("<cI")  # kind, bytes that follow
HEADER = struct.Struct("<qi")  # frames, rate
LOAD, LOAD_SILENCE, READ_HEADER = b"L", b"S", b"H"
READY, DONE, FAILED = b"R", b"D", b"F"


class Sandbox:
    """Decodes in a worker process, one file at a time. Any thread may call it; a forked process starts its own worker.

    :param mebibytes: Most memory that the worker may allocate after its start.
    :param command: Program of the worker, to which the limits are appended; None: this module.
    :param audio_seconds: Longest clip; what is longer is cut.
    """

    def __init__(
        self,
        seconds: float = SECONDS,
        mebibytes: int = MEBIBYTES,
        command: list[str] | None = None,
        audio_seconds: float = 30.0,
    ) -> None:
        self.seconds, self.mebibytes, self.audio_seconds = seconds, mebibytes, audio_seconds
        self.command = command or [sys.executable, "-m", "aqa.audio.sandbox"]
        self._worker: subprocess.Popen | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        # a pickled copy starts its own worker
        return type(self), (self.seconds, self.mebibytes, self.command, self.audio_seconds)

    def load(self, path: str | Path, silence_ok: bool = False) -> np.ndarray:
        """As :func:`aqa.audio.decode.load_audio`; also raises AudioError if the decoder crashes or passes a limit."""
        import numpy as np

        from aqa.audio.decode import AudioError, show

        data = self._ask(LOAD_SILENCE if silence_ok else LOAD, path)
        wave = np.frombuffer(data[: len(data) // 4 * 4], dtype=np.float32).copy()
        if len(data) % 4 or not np.isfinite(wave).all():  # the reply is as untrusted as the file
            raise AudioError(f"{show(path)}: the decoder returned {len(data)} bytes that are not finite samples")
        return wave

    def read_header(self, path: str | Path) -> tuple[int, int]:
        """As :func:`aqa.audio.decode.read_header`: frames and rate (Hz); raises as :meth:`load` does."""
        frames, rate = HEADER.unpack(self._ask(READ_HEADER, path)[: HEADER.size].ljust(HEADER.size, b"\0"))
        return frames, rate

    def close(self) -> None:
        """End the worker, if there is one; the next file starts another."""
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            worker.kill()
            worker.wait()
            worker.stdin.close()
            worker.stdout.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # when the interpreter exits, any module may be gone already
            self.close()

    def _ask(self, kind: bytes, path: str | Path) -> bytes:
        from aqa.audio.decode import AudioError, show

        try:
            name = os.fsencode(os.path.abspath(path))
        except ValueError as error:
            raise AudioError(f"{show(path)}: is no file name ({error})") from error
        if (
            self._owner != os.getpid()
        ):  # after a fork: the worker is the parent's, and a parent's thread may hold the lock
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
            except BaseException:  # after Ctrl-C here, the next file would be given this one's reply
                self.close()
                raise
        if status == FAILED:
            raise AudioError(f"{show(path)}: {reply.decode('utf-8', 'replace')}")
        return reply

    def _start(self) -> None:
        self.close()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads' stacks would count as memory
        # with these the worker finds this package, and imports nothing from the folder that the run was started in
        modules = os.pathsep.join(filter(None, (PACKAGES, os.environ.get("PYTHONPATH"))))
        self._worker = subprocess.Popen(
            [*self.command, str(self.seconds), str(self.mebibytes), str(self.audio_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **threads, "PYTHONPATH": modules, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # a terminal's Ctrl-C reaches only the owner
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
        if length > 4 * SAMPLING_RATE * self.audio_seconds:  # float32
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


def serve(load: Callable[..., Any], read_header: Callable[..., tuple[int, int]]) -> None:
    """The worker's main function: answer requests on stdin until the owner has ended.

    The limits are the last three arguments of the command line.

    :param load: Decodes a file as :func:`aqa.audio.decode.load_audio` does.
    :param read_header: Reads a header as :func:`aqa.audio.decode.read_header` does.
    """
    import resource

    seconds, mebibytes, audio_seconds = float(sys.argv[-3]), int(sys.argv[-2]), float(sys.argv[-1])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # decoders print to stderr, which is the owner's
        os.dup2(null, descriptor)
    # RLIMIT_AS works because nothing here maps more than it uses; not every kernel enforces RLIMIT_DATA.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: used + mebibytes * 2**20, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    reply(replies, READY, b"")
    while request := requests.read(REQUEST.size):
        kind, length = REQUEST.unpack(request)
        path = os.fsdecode(requests.read(length))
        signal.alarm(math.ceil(seconds) + 5)  # ends the worker even if its owner, which watches the time, was killed
        try:
            if kind == READ_HEADER:
                answer = DONE, HEADER.pack(*read_header(path, seconds=audio_seconds))
            else:
                answer = DONE, load(path, silence_ok=kind == LOAD_SILENCE, seconds=audio_seconds).tobytes()
        except MemoryError:
            answer = FAILED, f"decoding needs more than {mebibytes} MiB".encode()
        except Exception as error:
            from aqa.audio.decode import AudioError, show

            text = str(error).removeprefix(f"{show(path)}: ") if isinstance(error, AudioError) else repr(error)
            answer = FAILED, text[:1000].encode("utf-8", "replace")
        signal.alarm(0)
        reply(replies, *answer)


def reply(pipe: BinaryIO, status: bytes, data: bytes) -> None:
    """Send an answer to the owner: its kind (:data:`READY`, :data:`DONE` or :data:`FAILED`) and data."""
    pipe.write(REPLY.pack(status, len(data)) + data)
    pipe.flush()


def escape_of(path: str | Path, folder: str | Path) -> str | None:
    """The real path, links and ``..`` resolved, if it is outside a folder; None if it is inside.

    The path need not exist. A hard link looks like any other file.
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
