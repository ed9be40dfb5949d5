"""Signals that ask a run to end. All ranks stop together, at the next point from which the run can be resumed."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_CTRL_C = 1.0  # seconds; the terminal and torchrun both send the signal of one Ctrl-C


class StopError(Exception):
    """The run was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers that a signal came. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def install(self) -> None:
        """Listen, from now to the end of the process."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_CTRL_C:
            os._exit(128 + number)

    def check(self, device: torch.device) -> None:
        """Stop if any rank was asked to. Collective.

        :param device: Where the ranks' flags are compared.
        :raises StopError: on all ranks, if a signal has come to one.
        """
        number = self.number
        if dist.get_world_size() > 1:
            flag = torch.tensor([number], device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        if number:
            raise StopError(number)


stop_request = StopRequest()
