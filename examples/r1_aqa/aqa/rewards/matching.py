"""Decide whether a response agrees with the reference: R1-AQA's accuracy rule, in bounded time and without exceptions.

R1-AQA (``src/utils/rewards.py``) scores an answer 1 when ``math_verify`` finds response and reference equal **or** when
their answer texts are equal. The order of an OR does not matter, so the cheap half comes first:

1. The text rule compares the answers as strings. It settles every right answer that is written as the reference is.
2. A regular expression finds texts from which ``math_verify`` can extract nothing, which it never finds equal to
   anything. It settles nearly every other sample of AVQA, whose choices are words.
3. ``math_verify`` itself judges the rest, in a worker process.

``math_verify`` needs a process because it bounds its own time by signals, which work in the main thread only and cannot
interrupt one long step in C such as ``9**9**9**9``. The worker is a new interpreter that imports neither torch nor
CUDA. It is started when first needed and answers one request at a time; the kernel kills it when a check has used
:data:`CHECK_CPU_LIMIT_S`. A check that is cut off, or that exhausts the worker's memory, counts as "not equal", as a
time-out does in R1-AQA. If the worker is killed from outside, for example because the machine runs out of memory, that
says nothing about the texts, so the next worker repeats the check.

Checks that are sure to be cut off are not started (:func:`is_endless`): each would cost the whole limit and a new
worker.

In three cases only the text rule counts, so the value may differ from R1-AQA's: a check takes longer than the limit
here but less than R1-AQA's 5 s a step; a text has a number of millions of digits or brackets nested deeper than
:data:`MATH_MAX_DEPTH` (which take such times); or it is longer than :data:`MATH_MAX_CHARS`. The recipe's limit of 256
tokens keeps responses shorter than that.
"""

import atexit
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache

logger = logging.getLogger(__name__)

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

CHECK_CPU_LIMIT_S = 1.0
"""CPU time of one check; a limit on wall time would let a busy machine change rewards."""
CHECK_WALL_LIMIT_S = 15.0
"""Wall time of one check; it is reached only if the worker is stopped or gets no CPU."""
START_LIMIT_S = 120.0
"""Wall time to import ``math_verify``: about 1 s from a local disk, far longer from a busy network disk."""
RESTART_PAUSE_S = 60.0
"""How long no new start is tried after one has failed."""
WORKER_MEMORY_BYTES = 2 << 30
"""Address space of the worker: enough for any expression that a person writes, too little for towers of powers."""
MATH_MAX_CHARS = 4_096
"""Longest text that ``math_verify`` gets; its patterns take quadratic time."""
MATH_MAX_DEPTH = 10
"""Deepest nesting of brackets that it gets: its LaTeX parser takes about 1 s for 12 levels and minutes for 30."""
CHECK_ATTEMPTS = 3
"""A check is given up when this many workers in a row are killed from outside while they make it."""

_READY, _EQUAL, _DIFFERENT = b"r", b"1", b"0"
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
_EXIT_NO_MATH_VERIFY = 3
_WORKER_FILE = os.path.abspath(__file__)  # resolved on import: the host may change its working directory later

# What math_verify can extract (0.7.0 to 0.9.0, default configuration) holds one of: a `$` environment, `\(` or `\[`,
# ` [...] `, `\frac{`, `\boxed{`, or a number that stands at the start of the text or after white space or `=`, with at
# most `**`, a currency sign, `-`, `(` and `.` before its first digit. This pattern matches wherever one of these can;
# tests/unit/test_rewards.py compares it with the installed math_verify.
_MATH_CANDIDATE = re.compile(r"\$|\\(?:[(\[]|frac\{|boxed\{)|\s\[|(?:^|[\s=])[^\w\s]{0,6}\d")
# sympy computes these in full: powers with an exponent of 10 million or more, whether in digits or as a power itself
# (8^8 is the least), and in LaTeX the factorial of a number of more than 6 digits.
_POWER = r"(?:\^|\*\*)[\s{(]*"
_HUGE_POWER = rf"{_POWER}(?:[1-9]\d{{7}}|(?:[89]|[1-9]\d+)\s*{_POWER}(?:[89]|[1-9]\d))"
_HUGE = re.compile(rf"{_HUGE_POWER}|(?<!\d)[1-9]\d{{6,}}[\s)}}]*![\s)}}!]*(?:\$|\\[)\]])")
_BRACKET = re.compile(r"[(\[{]|[)\]}]")


class MathCheckUnavailable(RuntimeError):
    """No worker runs, so whether the texts are equal is not known."""


def first_answer(text: str) -> str | None:
    r"""Text inside the first ``<answer>...</answer>`` that lies on one line, not stripped; None if there is none.

    The result is that of ``re.search(r"<answer>(.*?)</answer>", text)`` (R1-AQA's pattern, where ``.`` does not match
    a line feed), in linear time: the pattern takes minutes on a megabyte of ``<answer>``.
    """
    start = text.find(ANSWER_OPEN)
    close = -1
    while start >= 0:
        start += len(ANSWER_OPEN)
        if close < start:
            close = text.find(ANSWER_CLOSE, start)
            if close < 0:
                return None
        line_end = text.find("\n", start, close)
        if line_end < 0:
            return text[start:close]
        # This line has no closing tag, so the line's other opening tags match nothing either.
        start = text.find(ANSWER_OPEN, line_end + 1)
    return None


def texts_equal(content: str, solution: str) -> bool:
    """R1-AQA's text rule: the stripped first answers, or the whole texts where there is no tag, are the same string.

    :param content: Response.
    :param solution: Reference as R1-AQA writes it, ``<answer>GOLD</answer>``.
    """
    answer, gold = first_answer(content), first_answer(solution)
    return (content if answer is None else answer).strip() == (solution if gold is None else gold).strip()


def may_hold_math(text: str) -> bool:
    """False only if ``math_verify.parse(text)`` returns an empty list, which is never equal to anything."""
    return _MATH_CANDIDATE.search(text) is not None


def is_endless(text: str) -> bool:
    """Whether ``math_verify`` is sure to pass the limits here: on numbers that fill the memory and on brackets nested
    deeper than :data:`MATH_MAX_DEPTH`. Takes linear time.
    """
    if _HUGE.search(text):
        return True
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        if depth > MATH_MAX_DEPTH:
            return True
    return False


class MathChecker:
    """Calls ``math_verify`` in a worker process of bounded time and memory.

    Any thread may call it; one check is made at a time. After a fork the child must call :meth:`abandon`, which the
    module does for its own checker. The worker ends with :meth:`close`, and by itself when its parent has died.

    :param cpu_limit_s: CPU time of one check, in seconds.
    :param worker_file: Script that the worker runs.
    """

    def __init__(self, cpu_limit_s: float = CHECK_CPU_LIMIT_S, worker_file: str = _WORKER_FILE) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._worker_file = worker_file
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._no_start_before = 0.0

    def agree(self, content: str, solution: str) -> bool:
        """``verify(parse(content), parse(solution))``, R1-AQA's order of arguments; False if the check was cut off.

        If the worker is killed from outside, a new one repeats the check.

        :raises MathCheckUnavailable: The worker does not start, or :data:`CHECK_ATTEMPTS` workers were killed.
        """
        request = json.dumps([content, solution]).encode("ascii") + b"\n"
        with self._lock:
            for _ in range(CHECK_ATTEMPTS):
                if self._process is not None and self._process.poll() is not None:
                    self._stop()  # it died while idle
                reply = b""
                try:
                    process = self._process or self._start()
                    deadline = time.monotonic() + CHECK_WALL_LIMIT_S
                    _write_all(process, request, deadline)
                    reply = _read_byte(process, deadline)
                    if not reply and process.wait(CHECK_WALL_LIMIT_S) not in _FROM_OUTSIDE:
                        return False  # the texts are to blame: the worker reached its time limit or crashed
                except BrokenPipeError:
                    continue
                except (TimeoutError, subprocess.TimeoutExpired):
                    logger.debug("math_verify gave no answer within %s s", CHECK_WALL_LIMIT_S)
                    return False
                finally:
                    # Also after KeyboardInterrupt: the next check would read the reply that nobody has read.
                    if reply not in (_EQUAL, _DIFFERENT):
                        self._stop()
                if reply:
                    return reply == _EQUAL
        raise MathCheckUnavailable(f"{CHECK_ATTEMPTS} workers in a row were killed")

    def close(self) -> None:
        """End the worker, if there is one; a later check starts another."""
        self._stop()

    def abandon(self) -> None:
        """Forget the worker without ending it, in a forked child: the worker belongs to the parent."""
        self._lock = threading.Lock()  # a thread of the parent may have held the old one during the fork
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            process.stdout.close()
            process.returncode = 0  # it is no child of this process; this keeps Popen from warning about it

    def _start(self) -> subprocess.Popen[bytes]:
        if time.monotonic() < self._no_start_before:
            raise MathCheckUnavailable("its last start failed; a new start is tried later")
        reason = "it ended while starting"
        process, ready, status = None, False, None
        try:
            # With PYTHONSAFEPATH no module beside the worker's script can take the place of a library's.
            process = subprocess.Popen(
                [sys.executable, self._worker_file, str(os.getpid()), str(self._cpu_limit_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
            os.set_blocking(process.stdin.fileno(), False)
            ready = _read_byte(process, time.monotonic() + START_LIMIT_S) == _READY
            if not ready:
                status = process.wait(timeout=START_LIMIT_S)
            if status == _EXIT_NO_MATH_VERIFY:
                reason = "math_verify is absent or broken (pip install 'math-verify[antlr4_13_2]')"
        except (OSError, subprocess.TimeoutExpired) as error:  # TimeoutError is an OSError
            reason = f"{type(error).__name__}: {error}"
        finally:
            if process is not None and not ready:
                _end(process)
        if status in _FROM_OUTSIDE:
            raise BrokenPipeError("the worker was killed while starting")
        if not ready:
            self._no_start_before = time.monotonic() + RESTART_PAUSE_S
            raise MathCheckUnavailable(reason)
        self._process = process
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill and reap the worker, which holds nothing that must be saved."""
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _write_all(process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
    """Write to the worker. Raises TimeoutError at ``deadline`` (seconds of ``time.monotonic``)."""
    view = memoryview(data)
    while view:
        if not _wait(process.stdin.fileno(), select.POLLOUT, deadline):
            raise TimeoutError("the worker does not read")
        try:
            view = view[os.write(process.stdin.fileno(), view) :]
        except BlockingIOError:
            continue


def _read_byte(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Read one byte from the worker; ``b""`` when it has ended. Raises TimeoutError at ``deadline``."""
    if not _wait(process.stdout.fileno(), select.POLLIN, deadline):
        raise TimeoutError("the worker does not answer")
    return os.read(process.stdout.fileno(), 1)


def _wait(descriptor: int, event: int, deadline: float) -> bool:
    """Whether ``descriptor`` gets ready before ``deadline``. Uses poll: select fails on descriptors above 1023."""
    poller = select.poll()
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000.0))


_CHECKER = MathChecker()
atexit.register(_CHECKER.close)
os.register_at_fork(after_in_child=_CHECKER.abandon)


@lru_cache(maxsize=8192)
def _math_equal(content: str, solution: str) -> bool:
    return _CHECKER.agree(content, solution)


@lru_cache(maxsize=1)
def _warn_unavailable(reason: str) -> None:
    logger.warning("math_verify does not run, so answers are compared as text only: %s", reason)


def answers_agree(content: str, solution: str) -> bool:
    """R1-AQA's accuracy rule: the two are equal for ``math_verify`` or as text.

    Takes bounded time and never raises, on any text and in any thread. Without ``math_verify`` it logs a warning and
    only the text rule counts.

    :param content: Response.
    :param solution: Reference as R1-AQA writes it, ``<answer>GOLD</answer>``.
    """
    if texts_equal(content, solution):
        return True
    if max(len(content), len(solution)) > MATH_MAX_CHARS or not (may_hold_math(solution) and may_hold_math(content)):
        return False
    if is_endless(content) or is_endless(solution):
        return False
    try:
        return _math_equal(content, solution)
    except MathCheckUnavailable as error:
        _warn_unavailable(str(error))
        return False


def _requests(parent_pid: int) -> Iterator[bytes]:
    """Yield request lines until the pipe closes or the parent has ended (one of its forks may keep the pipe open)."""
    pending = b""
    while os.getppid() == parent_pid:
        if not _wait(0, select.POLLIN, time.monotonic() + 1.0):
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines


def _load_math_verify() -> Callable[[str, str], bool]:
    """Import and try ``math_verify``; return R1-AQA's call of it, a function of (content, solution).

    :raises ImportError: It is absent, or does not understand LaTeX (its parser lacks the antlr runtime that it needs).
    """
    from math_verify import parse, verify

    def equal(content: str, solution: str) -> bool:
        try:
            return bool(verify(parse(content), parse(solution)))
        except Exception:  # as in R1-AQA: texts on which math_verify fails are not equal
            return False

    # These two also import what math_verify imports late, so that no check's time is spent on it.
    if not (equal(r"$\frac{x^2 - 1}{x - 1}$", "$x + 1$") and equal("it is 0.50", "= 0.5")):
        raise ImportError("math_verify does not find equal expressions equal")
    return equal


def _serve(parent_pid: int, cpu_limit_s: float) -> int:
    """The worker's main function: answer the checks on standard input until the parent ends; return the exit status."""
    import resource

    # Libraries print to standard output (antlr does), so the replies use a private copy of it.
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the worker
    # With SIGPROF's default action the kernel ends the process, even within one endless step in C.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    try:
        equal = _load_math_verify()
    except ImportError:
        return _EXIT_NO_MATH_VERIFY
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.write(replies, _READY)
    for line in _requests(parent_pid):
        content, solution = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        agreed = equal(content, solution)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        os.write(replies, _EQUAL if agreed else _DIFFERENT)
    return 0


if __name__ == "__main__":
    sys.exit(_serve(parent_pid=int(sys.argv[1]), cpu_limit_s=float(sys.argv[2])))
