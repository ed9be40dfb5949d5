"""How a run ends early: a signal asks it to, or a rank has an error. All ranks stop together, so that they can save."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
T = TypeVar("T")
SAME_CTRL_C = 1.0  # seconds; the terminal and torchrun both send the signal of one Ctrl-C


class StopError(BaseException):
    """The run was asked to end. No Exception, which a user's reward may catch."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class RankError(Exception):
    """Some ranks have an error, and all of them know: they stand at the same point and can save together.

    :param rank: The last of these ranks.
    :param own: This rank's own error, if it has one.
    """

    def __init__(self, rank: int, own: Exception | None) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank, self.own = rank, own


class StopRequest:
    """Remembers that a signal came. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._listening = False
        self._may_interrupt = False

    def install(self) -> None:
        """Listen, from now to the end of the process."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        self._listening = True

    def before_fork(self) -> None:
        """Hold signals back, because Python forgets those that reach a child before its own first instruction."""
        if self._listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def after_fork_in_parent(self) -> None:
        """Let them come again."""
        if self._listening:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def after_fork_in_child(self) -> None:
        """Undo :meth:`install` in a child, such as a worker of a reward's ``multiprocessing.Pool``.

        SIGTERM must end it, which is how a pool ends its workers. What is sent to the whole process group (Ctrl-C by a
        terminal, SIGUSR1 by Slurm) is its parent's: a pool waits for ever for the result of a worker that has died.
        """
        if self._listening:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._listening = self._may_interrupt = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_CTRL_C:
            os._exit(128 + number)
        if self._may_interrupt:
            raise StopError(self.number)

    def interrupt(self, function: Callable[[], T]) -> T | None:
        """Call a user's code, which may sleep or wait, and leave it as soon as a signal comes.

        Follow it with :meth:`check`, which ends the run on all ranks.

        :return: What the function returns; None after a signal.
        """
        try:
            self._may_interrupt = True
            return function() if self.number == 0 else None
        except StopError:
            return None
        finally:
            self._may_interrupt = False

    def check(self, device: torch.device, error: Exception | None = None) -> None:
        """Stop if any rank was asked to, or has an error. Collective.

        :param device: Where the ranks' flags are compared.
        :raises StopError: on all ranks, if a signal has come to one.
        :raises RankError: on all ranks, if one of several has an error. A single rank raises its error itself.
        """
        number, failed = self.number, 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            flags = torch.tensor([number, dist.get_rank() + 1 if error else 0], device=device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            number, failed = flags.tolist()
        elif error:
            raise error
        if failed:
            raise RankError(failed - 1, error)
        if number:
            raise StopError(number)

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """Do what can fail on one rank alone, without collectives in it, and :meth:`check` afterwards. Collective."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.check(device, error)

    def each(self, items: Iterator[T], device: torch.device) -> Iterator[T]:
        """Go through what each rank reads for itself, equally many items on all; a file may be gone. Collective."""
        while True:
            with self.together(device):
                item = next(items, None)
            if item is None:
                return
            yield item


stop_request = StopRequest()
os.register_at_fork(
    before=stop_request.before_fork,
    after_in_parent=stop_request.after_fork_in_parent,
    after_in_child=stop_request.after_fork_in_child,
)
